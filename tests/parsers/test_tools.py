"""Tool parsers: what each format means, and that a stream gives the same however it is cut."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.parsers.tools import TOOL_PARSERS, CallStart, ParsedTools, ToolParser, gather, tool_parser
from quire.types.errors import ClientError
from tests.parsers.cases import ANSWERS, PARSERS, TOOLS, Calls

PIECES = [
    "<tool_call>", "</tool_call>", "\n", " ", "{", "}", '"', "[", "]", "(", ")", ",", ":", ";", "=", "\\",
    '{"name": "add", "arguments": {"a": 1}}', '{"name": "add", "parameters": {"a": [1, "}"]}', '{"name": ',
    '"arguments"', '{"arguments": {}, ',
    "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "x1", "add", "add(", "a=1", '"text"', "<|python_tag|>", "<function=add>",
    "</function>", "<parameter=a>", "</parameter>", "1", "é", "[add(a=1)]", "<call:add>", "</call>", "null", "true",
]  # fmt: skip


def streamed(parser: ToolParser, pieces: list[str]) -> ParsedTools:
    stream = parser.stream(TOOLS)
    events = [event for piece in pieces for event in stream.feed(piece)]
    return gather([*events, *stream.finish()])


def cut(text: str, places: list[int]) -> list[str]:
    at = [0, *sorted(p % (len(text) + 1) for p in places), len(text)]
    return [text[a:b] for a, b in pairwise(at)]


@pytest.mark.parametrize(("name", "text", "content", "calls"), ANSWERS)
def test_answers(name: str, text: str, content: str | None, calls: Calls) -> None:
    parsed = PARSERS[name].parse(text, TOOLS)
    assert [(c.name, json.loads(c.arguments)) for c in parsed.calls] == calls
    assert parsed.content == content
    assert streamed(PARSERS[name], list(text)) == parsed, "character by character"


@given(st.sampled_from(sorted(PARSERS)), st.lists(st.sampled_from(PIECES), max_size=14), st.lists(st.integers(0, 400)))
def test_any_text_cut_anywhere(name: str, pieces: list[str], places: list[int]) -> None:
    text = "".join(pieces)
    parser = PARSERS[name]
    whole = parser.parse(text, TOOLS)
    assert streamed(parser, cut(text, places)) == whole
    assert streamed(parser, list(text)) == whole
    if not whole.calls and not name.startswith("checkpoint"):
        assert (whole.content or "") == text, "text without calls is as it was"


@given(st.sampled_from(ANSWERS), st.lists(st.integers(0, 400)))
def test_answers_cut_anywhere(answer: tuple[str, str, str | None, Calls], places: list[int]) -> None:
    name, text, _, _ = answer
    assert streamed(PARSERS[name], cut(text, places)) == PARSERS[name].parse(text, TOOLS)


@pytest.mark.parametrize("name", ["hermes", "llama3_json", "mistral"])
def test_arguments_come_as_they_are_written(name: str) -> None:
    begin = {"hermes": "<tool_call>", "llama3_json": "", "mistral": "[TOOL_CALLS]["}[name]
    stream = PARSERS[name].stream(TOOLS)
    first = stream.feed(begin + '{"name": "add", "arguments": {"a": 1, ')
    assert isinstance(first[0], CallStart) and gather(first).calls[0].arguments == '{"a": 1, '
    assert gather([*first, *stream.feed('"b')]).calls[0].arguments == '{"a": 1, "b'
    # and a text that ends there has a call with what there is
    assert gather([*first, *stream.finish()]).calls[0].name == "add"


def test_registry() -> None:
    assert {"hermes", "llama3_json", "mistral", "pythonic", "qwen3", "qwen3_coder", "checkpoint"} <= set(
        TOOL_PARSERS.names()
    )
    with pytest.raises(ClientError, match="did you mean hermes"):
        tool_parser("hermess")
    with pytest.raises(ClientError, match="response_template"):
        tool_parser("checkpoint")
    with pytest.raises(ClientError, match="response_template is wrong"):
        tool_parser("checkpoint", response_template={"fields": {}})
    TOOL_PARSERS.register("mine", "quire.parsers.tools.pythonic:Pythonic")
    assert tool_parser("mine").parse("[ping()]").calls[0].name == "ping"
    with pytest.raises(ClientError, match="module:Class"):
        TOOL_PARSERS.register("mine", "nowhere")
