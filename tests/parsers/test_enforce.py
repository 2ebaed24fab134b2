"""Enforced tool calls: whatever a grammar lets through parses as calls of the tools, by their schemas."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import jsonschema
import numpy as np
import pytest

from quire.config.hub import demo_model_path
from quire.parsers.enforce import tool_constraint
from quire.parsers.tools import Tool, parameters_of
from quire.structured.compiler import Compiler
from quire.types.errors import ClientError
from quire.types.params import StructuredOutputsParams
from tests.parsers.cases import ADD, ANSWERS, BOTH, PARSERS, PING, TOOLS, WEATHER

EOS = 2


@pytest.fixture(scope="module")
def compiler() -> Compiler:
    return Compiler(demo_model_path(), 3072, (EOS,), 20.0)


def walk(compiler: Compiler, params: StructuredOutputsParams, seed: int, most: int = 600) -> str | None:
    """A text that the grammar allows, drawn at random, with a liking for its end; None if it found none."""
    matcher = compiler.compile(params).matcher()
    draw = random.Random(seed)
    words = np.zeros(-(-compiler.size // 32), np.int32)
    out = b""
    for _ in range(most):
        matcher.fill(words)
        assert not matcher.error, matcher.error
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
        assert len(allowed), "a grammar that allows nothing"
        if EOS in allowed and (len(allowed) == 1 or draw.random() < 0.5):
            return out.decode()
        closing = [t for t in allowed[:200] if compiler.token_bytes(int(t)) in (b'"', b"}", b"\n", b")", b"]")]
        token = int(draw.choice(closing or allowed)) if draw.random() < 0.4 else int(draw.choice(allowed))
        if token == EOS:
            return out.decode()
        out += compiler.token_bytes(token)
        assert matcher.consume([token])
    return None


def check(name: str, text: str, tools: Sequence[Tool]) -> list[str]:
    """The names of the calls in a text that has nothing else, each by its schema."""
    parsed = PARSERS[name].parse(text, tools)
    assert parsed.content is None, text
    schemas = {tool["function"]["name"]: parameters_of(tool) for tool in tools}
    for call in parsed.calls:
        jsonschema.validate(json.loads(call.arguments), schemas[call.name])
    return [call.name for call in parsed.calls]


@pytest.mark.parametrize("name", sorted(PARSERS))
def test_required_and_named(compiler: Compiler, name: str) -> None:
    required = tool_constraint(PARSERS[name], TOOLS, "required")
    single = tool_constraint(PARSERS[name], TOOLS, "required", parallel=False)
    named = tool_constraint(PARSERS[name], TOOLS, {"type": "function", "function": {"name": "add"}})
    assert required is not None and single is not None and named is not None
    seen: list[str] = []
    for seed in range(12):
        if (text := walk(compiler, required, seed)) is not None:
            calls = check(name, text, TOOLS)
            assert calls
            seen += calls
        if (text := walk(compiler, single, seed)) is not None:
            assert len(check(name, text, TOOLS)) == 1, text
        if (text := walk(compiler, named, seed)) is not None:
            assert check(name, text, TOOLS) == ["add"], text
    if name == "qwen3_coder":  # a text ends where its closing tag comes, which no random walk finds
        text = next(t for n, t, _, calls in ANSWERS if n == name and calls == BOTH)
        assert compiler.compile(required).matcher().consume(compiler.tokenize(text[text.index("<") :].encode()))
        seen.append("get_weather")
    assert set(seen) == {"get_weather", "add", "ping"}, "every tool can be called"


@pytest.mark.parametrize(
    "name", ["hermes", "mistral", "mistral-named", "qwen3_coder", "checkpoint-json", "checkpoint-xml"]
)
def test_strict_tools_leave_content_free(compiler: Compiler, name: str) -> None:
    strict = [{"type": "function", "function": {**tool["function"], "strict": True}} for tool in (WEATHER, ADD)]
    params = tool_constraint(PARSERS[name], strict, "auto")
    assert params is not None
    matcher = compiler.compile(params).matcher()
    assert matcher.consume(compiler.tokenize(b"Some text, {not} [a] call.")), matcher.error
    good = tool_constraint(PARSERS[name], strict, "required")
    assert good is not None
    text = next(t for seed in range(50) if (t := walk(compiler, good, seed)) is not None)
    assert matcher.consume(compiler.tokenize(b" " + text.encode())), (text, matcher.error)
    bad = text.replace("get_weather", "get_leather").replace("add", "dad")
    again = compiler.compile(params).matcher()
    assert not again.consume(compiler.tokenize(bad.encode())), "a call of no tool"
    assert tool_constraint(PARSERS[name], TOOLS, "auto") is None, "tools that are not strict are not enforced"


def test_choices_that_make_no_sense() -> None:
    hermes = PARSERS["hermes"]
    assert tool_constraint(hermes, TOOLS, "none") is None
    bad: list[tuple[Any, Any, str]] = [
        ([], "required", "needs tools"),
        ([PING], {"function": {"name": "pong"}}, "ping"),
        ([PING], "sometimes", "must be none, auto"),
        ([{"type": "function"}], "required", "with a name"),
    ]
    for tools, choice, message in bad:
        with pytest.raises(ClientError, match=message):
            tool_constraint(hermes, tools, choice)
    strict = [{"type": "function", "function": {"name": "f", "strict": True}}]
    with pytest.raises(ClientError, match="strict tools cannot be enforced"):
        tool_constraint(PARSERS["pythonic"], strict, "auto")
