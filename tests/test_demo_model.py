"""The bundled model does what its card says: its held-out tasks, through the interface that users call."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quire import LLM, SamplingParams

ROOT = Path(__file__).resolve().parents[1]
REQUIRED = 0.95


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """In float32, which many CPUs compute several times faster than bfloat16, and in small steps."""
    small: dict[str, Any] = dict(
        max_model_len=512, kv_cache_memory_bytes="64M", max_num_seqs=32, max_num_batched_tokens=256
    )
    with LLM(**small, dtype="float32", threads=1, log_level="warning") as llm:
        yield llm


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """tools/demo_model/tasks.py, where the checker of the answers is."""
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "demo_model"))
    import tasks

    yield tasks
    for name in [n for n, m in sys.modules.items() if "demo_model" in str(getattr(m, "__file__", ""))]:
        if name != __name__:
            del sys.modules[name]


def items() -> list[dict[str, Any]]:
    lines = (ROOT / "tests" / "data" / "demo_heldout.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def prompt_of(llm: LLM, item: dict[str, Any]) -> str:
    """The template's text: tools differ from item to item, and one call of `chat` gives the same to all."""
    if "prompt" in item:
        return item["prompt"]
    (text,) = llm._render([item["messages"]], None, "auto", tools=item.get("tools"))
    assert isinstance(text, str)
    return text


def test_heldout_tasks(llm: LLM, tasks: Any) -> None:
    """One batched, greedy call for everything that was held out of its training."""
    held = items()
    assert len(held) >= 200
    prompts = [prompt_of(llm, item) for item in held]
    outputs = llm.generate(
        prompts,
        SamplingParams(temperature=0, max_tokens=192),
        use_tqdm=False,
        tokenization_kwargs={"add_special_tokens": False},
    )
    right = [tasks.is_correct(item, o.outputs[0].text) for item, o in zip(held, outputs, strict=True)]
    wrong = [(i["id"], o.outputs[0].text) for i, o, r in zip(held, outputs, right, strict=True) if not r]
    assert sum(right) >= REQUIRED * len(held), wrong
    # The checker can say no: every answer judged against the next item of another task.
    others = [next(j for j in held if j["task"] != i["task"]) for i in held]
    crossed = [tasks.is_correct(other, o.outputs[0].text) for other, o in zip(others, outputs, strict=True)]
    assert sum(crossed) < 0.1 * len(held)


def test_chat_is_the_rendered_prompt(llm: LLM, tasks: Any) -> None:
    """`chat`, several conversations in one call, gives what `generate` gives for the template's text."""
    held = [i for i in items() if "messages" in i and not i.get("tools")][::20]
    params = SamplingParams(temperature=0, max_tokens=96)
    chatted = llm.chat([i["messages"] for i in held], params, use_tqdm=False)
    assert sum(tasks.is_correct(i, o.outputs[0].text) for i, o in zip(held, chatted, strict=True)) >= len(held) - 1
    assert [o.prompt for o in chatted] == [prompt_of(llm, i) for i in held]


def test_the_capital_of_france(llm: LLM) -> None:
    (output,) = llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
    assert output.outputs[0].text.startswith(" Paris")
