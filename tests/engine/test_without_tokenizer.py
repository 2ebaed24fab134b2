"""Engines without a tokenizer: token ids in, token ids out, and one line for whatever needs text."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from quire import LLM, SamplingParams, TokensPrompt
from quire.config.hub import demo_model_path
from quire.engine.tokenizer import load_folder
from quire.types.errors import ClientError
from quire.types.params import StructuredOutputsParams

GREEDY = SamplingParams(temperature=0, max_tokens=8, logprobs=1)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model's folder, but for its tokenizer."""
    folder = tmp_path_factory.mktemp("bare")
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        shutil.copy(demo_model_path() / name, folder)
    return folder


@pytest.mark.parametrize("switched_off", [False, True])
def test_token_ids_in_and_out(bare: Path, switched_off: bool, caplog: pytest.LogCaptureFixture) -> None:
    ids = load_folder(demo_model_path()).encode("The capital of France is")
    prompt = TokensPrompt(prompt_token_ids=ids)
    with LLM("demo", dtype="float32") as llm:
        (expected,) = llm.generate([prompt], GREEDY, use_tqdm=False)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "quire"):
        llm = LLM("demo" if switched_off else str(bare), dtype="float32", skip_tokenizer_init=switched_off)
    assert ("has no tokenizer files" in caplog.text) is not switched_off
    with llm:
        (output,) = llm.generate([prompt], GREEDY, use_tqdm=False)
        assert output.outputs[0].token_ids == expected.outputs[0].token_ids and output.outputs[0].text == ""
        assert output.outputs[0].logprobs is not None
        for words, call in refusals(llm, prompt).items():
            with pytest.raises(ValueError, match=words) as e:
                call()
            assert "skip_tokenizer_init" in str(e.value) and "\n" not in str(e.value)


def refusals(llm: LLM, prompt: Any) -> dict[str, Any]:
    def asked(**params: Any) -> Any:
        return lambda: llm.generate([prompt], SamplingParams(**params), use_tqdm=False)

    return {
        "text prompt needs": lambda: llm.generate("text", GREEDY, use_tqdm=False),
        "stop strings need": asked(stop=["."]),
        "bad_words need": asked(bad_words=["x"]),
        "structured_outputs need": asked(structured_outputs=StructuredOutputsParams(regex="a+")),
        "chat needs": lambda: llm.chat([{"role": "user", "content": "hi"}], GREEDY, use_tqdm=False),
        "tokenizer is asked for": llm.get_tokenizer,
    }


def test_a_tokenizer_that_was_named_must_be_there(bare: Path) -> None:
    with pytest.raises(ClientError, match="no tokenizer files"):
        LLM("demo", tokenizer=str(bare))
    with LLM(str(bare), tokenizer="demo") as llm:
        assert llm.generate("The capital of France is", GREEDY, use_tqdm=False)[0].outputs[0].text
