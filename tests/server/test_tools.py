"""Tools and structured output, end to end: the demo model, a real server, OpenAI's client."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from servers import Server

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
ADD: Any = {"type": "function", "function": {"name": "add", "parameters": {
    "type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"],
    "additionalProperties": False}}}  # fmt: skip
ASK: Any = [{"role": "user", "content": "What is the weather in Paris?"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.idle()
    assert server.stop() == 0, "".join(server.log)


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return server.client()


def call_of(client: openai.OpenAI, **asked: Any) -> tuple[str | None, list[tuple[str, Any]], str]:
    """(content, calls, finish reason), the same whole and streaming."""
    asked = {"model": "demo", "messages": ASK, "temperature": 0, "max_tokens": 100, **asked}
    whole = client.chat.completions.create(**asked).choices[0]
    calls = [(c.function.name, c.function.arguments) for c in whole.message.tool_calls or ()]  # type: ignore
    pieces: dict[int, list[str]] = {}
    content, ids, reason = "", set[str](), None
    for chunk in client.chat.completions.create(stream=True, **asked):
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        reason = choice.finish_reason or reason
        for call in choice.delta.tool_calls or ():
            assert call.function is not None
            one = pieces.setdefault(call.index, ["", ""])
            one[0] += call.function.name or ""
            one[1] += call.function.arguments or ""
            ids |= {call.id} if call.id else set()
    assert [tuple(pieces[i]) for i in sorted(pieces)] == calls and len(ids) == len(calls)
    assert content == (whole.message.content or "") and reason == whole.finish_reason
    return whole.message.content, [(name, json.loads(text)) for name, text in calls], str(reason)


def test_the_model_calls_a_tool(client: openai.OpenAI) -> None:
    content, calls, reason = call_of(client, tools=[WEATHER])
    assert calls == [("get_weather", {"city": "Paris"})] and not content and reason == "tool_calls"
    told = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}]},
        {"role": "tool", "tool_call_id": "1", "content": '{"weather": "sunny"}'},
    ]  # fmt: skip
    content, calls, reason = call_of(client, tools=[WEATHER], messages=told)
    assert content and not calls and reason == "stop"


def test_calls_are_enforced(client: openai.OpenAI) -> None:
    named = {"type": "function", "function": {"name": "add"}}
    _, calls, reason = call_of(client, tools=[WEATHER, ADD], tool_choice=named)
    assert [name for name, _ in calls] == ["add"] and set(calls[0][1]) == {"a", "b"} and reason == "stop"
    hello: Any = [{"role": "user", "content": "Say hello."}]
    _, calls, reason = call_of(client, tools=[WEATHER], tool_choice="required", messages=hello)
    assert calls and all(name == "get_weather" and "city" in args for name, args in calls) and reason == "tool_calls"
    _, calls, _ = call_of(client, tools=[WEATHER], tool_choice="none")
    assert not calls
    _, calls, _ = call_of(
        client, tools=[ADD], tool_choice="required", parallel_tool_calls=False, temperature=1.0, seed=3
    )
    assert len(calls) == 1


def test_what_tools_refuse(client: openai.OpenAI) -> None:
    named: Any = {"type": "function", "function": {"name": "nope"}}
    for asked in (
        {"tool_choice": "required"},
        {"tools": [WEATHER], "tool_choice": named},
        {"tools": [WEATHER], "tool_choice": "required", "response_format": {"type": "json_object"}},
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="demo", messages=ASK, **asked)  # type: ignore[call-overload]
        assert caught.value.param == "tool_choice"


def test_json(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer",
              "minimum": 0, "maximum": 99}}, "required": ["name", "age"], "additionalProperties": False}  # fmt: skip
    format: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    asked: dict[str, Any] = dict(model="demo", messages=ASK, temperature=1.0, seed=5, max_tokens=100)
    for _ in range(2):
        done = client.chat.completions.create(response_format=format, **asked).choices[0]
        found = json.loads(done.message.content or "")
        assert set(found) == {"name", "age"} and done.finish_reason == "stop" and isinstance(found["age"], int)
    done = client.chat.completions.create(response_format={"type": "json_object"}, **{**asked, "temperature": 0})
    assert (done.choices[0].message.content or "").startswith("{")
    for constraint in ({"choice": ["red", "blue"]}, {"regex": "red|blue"}, {"grammar": 'start: "red" | "blue"'}):
        text = client.completions.create(
            model="demo", prompt="The sky is", temperature=0, extra_body={"structured_outputs": constraint}
        )
        assert text.choices[0].text in ("red", "blue")


def test_a_hostile_schema_harms_nobody(client: openai.OpenAI) -> None:
    nested: Any = {"type": "string"}
    for _ in range(5):
        nested = {"oneOf": [{"type": "object", "properties": {str(i): nested}} for i in range(3)]}
    begin = time.monotonic()
    for constraint in ({"regex": "(a{1,5000}){1,5000}b"}, {"json": nested}):  # cheap, or refused: never a long time
        try:
            client.completions.create(model="demo", prompt="x", extra_body={"structured_outputs": constraint})
        except openai.BadRequestError as e:
            assert e.param == "structured_outputs"
    for constraint in ({"regex": "("}, {"json": {"type": "nonsense"}}, {"grammar": "start: x"}):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="demo", prompt="x", extra_body={"structured_outputs": constraint})
        assert caught.value.param == "structured_outputs"
    assert time.monotonic() - begin < 60
    assert client.completions.create(model="demo", prompt="x", max_tokens=1).choices[0].finish_reason == "length"
