"""Reasoning parsers: where reasoning ends, and that a stream gives the same however it is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.parsers.reasoning import Split, reasoning_parser
from quire.types.errors import ClientError

NAMES = ["deepseek_r1", "qwen3", "tags:[THINK],[/THINK]"]


def streamed(name: str, pieces: list[str], prompt: str = "") -> Split:
    stream = reasoning_parser(name).stream(prompt)
    out = [piece for text in pieces for piece in stream.feed(text)] + stream.finish()
    reasoning = "".join(p.text for p in out if p.reasoning)
    return Split(reasoning or None, "".join(p.text for p in out if not p.reasoning) or None)


@pytest.mark.parametrize(
    ("name", "prompt", "text", "reasoning", "content"),
    [
        ("deepseek_r1", "", "I think\n</think>\n\nParis.", "I think", "Paris."),
        ("deepseek_r1", "", "<think>\nI think</think>Paris.", "I think", "Paris."),
        ("deepseek_r1", "", "still thinking </thi", "still thinking </thi", None),
        ("deepseek_r1", "<think>\n\n</think>\n\n", "Paris.", None, "Paris."),
        ("qwen3", "", "<think>\nA.\n\nB.\n</think>\n\nParis.\n", "A.\n\nB.", "Paris.\n"),
        ("qwen3", "", "Paris, <think>ing.", None, "Paris, <think>ing."),
        ("qwen3", "<|im_start|>assistant\n<think>\n", "A.</think>B", "A.", "B"),
        ("qwen3", "", "<think>\n\n</think>\n\nParis", None, "Paris"),
        ("tags:[THINK],[/THINK]", "", "[THINK]a[/THINK]b", "a", "b"),
    ],
)
def test_split(name: str, prompt: str, text: str, reasoning: str | None, content: str | None) -> None:
    assert reasoning_parser(name).split(text, prompt) == Split(reasoning, content)
    assert streamed(name, list(text), prompt) == Split(reasoning, content)


TEXTS = st.lists(st.sampled_from(["<think>", "</think>", "<", "</", "think>", " ", "\n", "a", "[THINK]", "[/THINK]"]))


@given(st.sampled_from(NAMES), TEXTS, st.sampled_from(["", "<think>\n", "</think>\n\n"]))
def test_any_text_cut_anywhere(name: str, pieces: list[str], prompt: str) -> None:
    whole = reasoning_parser(name).split("".join(pieces), prompt)
    assert streamed(name, pieces, prompt) == whole
    assert streamed(name, list("".join(pieces)), prompt) == whole


def test_names() -> None:
    with pytest.raises(ClientError, match="did you mean qwen3"):
        reasoning_parser("qwen")
    with pytest.raises(ClientError, match="two tags"):
        reasoning_parser("tags:<a>")
