"""Prompts and parameters to requests: every form, every refusal, what is filled in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_client import VOCAB, make_config
from tokenizer_zoo import trained

from quire.engine.inputs import InputProcessor, default_params
from quire.engine.tokenizer import load_tokenizer
from quire.types.errors import ClientError, EngineError
from quire.types.params import (
    BeamSearchParams,
    RepetitionDetectionParams,
    SamplingParams,
    StructuredOutputsParams,
)
from quire.types.request import Request


def processor(folder: Path, **args: Any) -> InputProcessor:
    config = make_config(folder, **args)
    return InputProcessor(config, load_tokenizer(config))


def ask(p: InputProcessor, prompt: Any, params: SamplingParams | BeamSearchParams | None = None, **kw: Any) -> Request:
    return p.process(prompt, params or SamplingParams(), request_id="r", **kw)


@pytest.mark.parametrize("kind", ["byte_level", "llama"])
def test_forms_of_a_prompt(tmp_path: Path, kind: str) -> None:
    p = processor(tmp_path, kind=kind)
    tokens = trained(kind).encode("The capital of France")
    text = ask(p, "The capital of France")
    assert text.prompt_token_ids == tokens
    assert ask(p, {"prompt": "The capital of France"}).prompt_token_ids == tokens
    for given in (tokens, tuple(tokens), np.array(tokens), [np.int64(t) for t in tokens]):
        got = ask(p, given).prompt_token_ids
        assert got == tokens and all(type(t) is int for t in got)
    request = ask(p, {"prompt_token_ids": tokens, "prompt": "shown", "cache_salt": "s"})
    assert request.prompt_token_ids == tokens and request.cache_salt == "s"
    (draft,) = p.drafts([{"prompt_token_ids": tokens, "prompt": "shown"}], [SamplingParams()])
    assert draft.text == "shown"
    (draft,) = p.drafts(["The capital"], [SamplingParams()], add_special_tokens=False)
    assert draft.tokens == trained(kind).encode("The capital", add_special_tokens=False)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "empty"),
        ([], "empty"),
        ({"prompt_token_ids": []}, "empty"),
        ([5, VOCAB], str(VOCAB)),
        ([-1], "-1"),
        ([1.5], "1.5"),
        ([True], "True"),
        (["a"], "'a'"),
        ([5] * 256, "256 tokens.*max_model_len=256"),
        (7, "int"),
        ({}, "prompt_token_ids"),
        ({"prompt": 3}, "string"),
        ({"prompt": "a", "promt": "b"}, "promt"),
        ({"prompt": "a", "cache_salt": 3}, "cache_salt"),
        ({"prompt": "a", "multi_modal_data": {"image": 1}}, "multi_modal_data is not supported yet"),
    ],
)
def test_bad_prompts(tmp_path: Path, prompt: Any, words: str) -> None:
    with pytest.raises(ClientError, match=words) as e:
        ask(processor(tmp_path), prompt)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("params", "parameter"),
    [
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"stop_token_ids": [VOCAB]}, "stop_token_ids"),
        ({"allowed_token_ids": [VOCAB]}, "allowed_token_ids"),
        ({"logit_bias": {VOCAB: 1.0}}, "logit_bias"),
        ({"truncate_prompt_tokens": 257}, "truncate_prompt_tokens"),
        ({"structured_outputs": StructuredOutputsParams(structural_tag="a")}, "structured_outputs"),
        ({"thinking_token_budget": 3}, "thinking_token_budget"),
        ({"repetition_detection": RepetitionDetectionParams(1, 1, 2)}, "repetition_detection"),
        ({"logprob_token_ids": [VOCAB]}, "logprob_token_ids"),
        ({"flat_logprobs": True}, "flat_logprobs"),
    ],
)
def test_bad_parameters(tmp_path: Path, params: dict[str, Any], parameter: str) -> None:
    with pytest.raises(ClientError, match=parameter) as e:
        ask(processor(tmp_path), "a b", SamplingParams(**params))
    assert e.value.parameter == parameter and "\n" not in str(e.value)


@pytest.mark.parametrize("params", ["x", {"temperature": 0}, None])
def test_parameters_of_another_type(tmp_path: Path, params: Any) -> None:
    with pytest.raises(ClientError, match="must be SamplingParams, got"):
        processor(tmp_path).drafts(["a"], [params])


def test_processors_of_a_request_stay_in_this_process(tmp_path: Path) -> None:
    params = SamplingParams(logits_processors=[lambda ids, logits: logits])
    assert ask(processor(tmp_path), "a", params).params.logits_processors  # type: ignore[union-attr]
    with pytest.raises(ClientError, match=r"processes of their own.*'uni'") as e:
        ask(processor(tmp_path, distributed_executor_backend="mp"), "a", params)
    assert e.value.parameter == "logits_processors"


def test_bad_sampling_defaults_name_their_file(tmp_path: Path) -> None:
    config = make_config(tmp_path, override_generation_config={"temperature": 9})
    with pytest.raises(ClientError, match=r"temperature.*generation_config") as e:
        default_params(config)
    assert e.value.parameter == "temperature"


def test_lora_is_not_yet(tmp_path: Path) -> None:
    with pytest.raises(ClientError, match="lora_request"):
        ask(processor(tmp_path), "a", lora_request=object())


def test_max_logprobs_of_the_engine(tmp_path: Path) -> None:
    assert ask(processor(tmp_path, max_logprobs=-1), "a", SamplingParams(logprobs=-1)).params.logprobs == -1  # type: ignore
    assert ask(processor(tmp_path, max_logprobs=30), "a", SamplingParams(logprobs=30)).params.logprobs == 30  # type: ignore


def test_beams_take_logprobs(tmp_path: Path) -> None:
    def ask_beams(width: int, most: int) -> None:
        ask(processor(tmp_path, max_logprobs=most), "a", BeamSearchParams(beam_width=width, max_tokens=2))

    ask_beams(10, 20)
    ask_beams(11, -1)
    for width, most in ((11, 20), (1 << 40, -1)):
        with pytest.raises(ClientError, match=f"beam_width={width}.*max_logprobs") as e:
            ask_beams(width, most)
        assert e.value.parameter == "beam_width"


class Picky:
    """A logits processor that is asked whether it can serve a request."""

    @classmethod
    def validate(cls, params: SamplingParams) -> None:
        extra = params.extra_args or {}
        if extra.get("color") == "green":
            raise ValueError("not green")
        if extra.get("color") == "red":
            raise KeyError("red")


def test_processors_may_refuse_a_request(tmp_path: Path) -> None:
    p = processor(tmp_path, logits_processors=[Picky])
    ask(p, "a", SamplingParams(extra_args={"color": "blue"}))
    with pytest.raises(ClientError, match=r"not green.*Picky") as e:
        ask(p, "a", SamplingParams(extra_args={"color": "green"}))
    assert e.value.parameter == "extra_args"
    with pytest.raises(EngineError, match=r"Picky.*failed in validate: KeyError"):
        ask(p, "a", SamplingParams(extra_args={"color": "red"}))
    for bad in (3, "no_such_module:Class"):
        with pytest.raises(ClientError, match=f"logits.processor.*{bad}"):
            processor(tmp_path, logits_processors=[bad])


def test_lengths(tmp_path: Path) -> None:
    p = processor(tmp_path)

    def limits(n: int, **params: Any) -> tuple[int | None, int]:
        got = ask(p, [5] * n, SamplingParams(**params)).params
        assert isinstance(got, SamplingParams)
        return got.max_tokens, got.min_tokens

    assert limits(10) == (16, 0)
    assert limits(10, max_tokens=None) == (246, 0)
    assert limits(250, max_tokens=100, min_tokens=50) == (6, 6)
    assert limits(255, max_tokens=None) == (1, 0)
    assert ask(p, [5] * 250, BeamSearchParams(2, 100)).params.max_tokens == 6


def test_truncation_keeps_the_end(tmp_path: Path) -> None:
    p = processor(tmp_path)
    prompt = [10 + i % 200 for i in range(400)]
    assert ask(p, prompt, SamplingParams(truncate_prompt_tokens=7)).prompt_token_ids == prompt[-7:]
    assert ask(p, prompt, SamplingParams(truncate_prompt_tokens=-1)).prompt_token_ids == prompt[-255:]


def test_the_users_parameters_stay_as_they_are(tmp_path: Path) -> None:
    params = SamplingParams(max_tokens=None, bad_words=["two"])
    before = params.clone()
    request = ask(processor(tmp_path), "one", params)
    assert params == before and request.params is not params
    params.temperature = 3.0
    with pytest.raises(ClientError, match="temperature"):
        ask(processor(tmp_path), "one", params)


def test_bad_words_at_the_beginning_and_inside(tmp_path: Path) -> None:
    request = ask(processor(tmp_path), "x", SamplingParams(bad_words=["two", " capital"]))
    encode = trained().encode
    got = request.params.bad_words_token_ids  # type: ignore[union-attr]
    for word in ("two", "capital"):
        bare, spaced = encode(word), encode(" " + word)
        assert bare in got
        assert spaced in got
    p = processor(tmp_path, kind="metaspace")  # where a word has its space anyway
    request = ask(p, "x", SamplingParams(bad_words=["two"]))
    bare = trained("metaspace").encode("two", add_special_tokens=False)
    assert request.params.bad_words_token_ids == [bare]  # type: ignore[union-attr]


def test_end_tokens_and_stream(tmp_path: Path) -> None:
    p = processor(tmp_path)
    request = ask(p, "x")
    assert request.eos_token_ids == (1,) == request.params.eos_token_ids  # type: ignore[union-attr]
    assert not request.stream and ask(p, "x", SamplingParams(stop="a")).stream


def test_seeds_are_drawn_in_order_and_only_for_good_requests(tmp_path: Path) -> None:
    a, b, c = processor(tmp_path), processor(tmp_path), processor(tmp_path, seed=5)
    first = [ask(a, "x").seed for _ in range(3)]
    with pytest.raises(ClientError):
        b.drafts(["x", ""], [SamplingParams()] * 2)
    assert [ask(b, "x").seed for _ in range(3)] == first and len(set(first)) == 3
    assert [ask(c, "x").seed for _ in range(3)] != first
    assert ask(a, "x", SamplingParams(seed=7)).seed == 7
    assert ask(a, "x", SamplingParams(seed=-2)).seed == 2**64 - 2
    assert all(0 <= s < 2**64 for s in first)


def test_without_a_tokenizer(tmp_path: Path) -> None:
    p = processor(tmp_path, skip_tokenizer_init=True)
    assert ask(p, [5, 6]).prompt_token_ids == [5, 6]
    for prompt, params in (
        ("text", {}),
        ([5], {"stop": "a"}),
        ([5], {"bad_words": ["a"]}),
    ):
        with pytest.raises(ClientError, match="skip_tokenizer_init"):
            ask(p, prompt, SamplingParams(**params))
