"""Tool calls that a model must make, or must make right: the grammar for a parser's format. Owns: what tool_choice and
strict tools mean as a constraint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quire.parsers.tools import CallRules, Tool, ToolParser, function_of, literal
from quire.types.errors import ClientError
from quire.types.params import StructuredOutputsParams

MOST_CALLS = 16  # of one answer, where calls are enforced


def tool_constraint(
    parser: ToolParser, tools: Sequence[Tool], choice: Any = "auto", parallel: bool = True
) -> StructuredOutputsParams | None:
    """The constraint for OpenAI's `tool_choice`: "required" (at least one call), a tool by name ({"type": "function",
    "function": {"name": ...}}: one call), "auto" (what tools say that are `strict`: content as the model likes, calls
    only as their schemas have it), "none". None where there is nothing to enforce. `parallel`: whether there may be
    several calls.

    Raises `ClientError` for choices that make no sense, and formats whose calls cannot be enforced.
    """
    if choice is None or choice == "none":
        return None
    if choice not in ("auto", "required"):
        name = _named(choice)
        chosen = [tool for tool in tools if function_of(tool)["name"] == name]
        if not chosen:
            known = ", ".join(function_of(tool)["name"] for tool in tools) or "there are none"
            raise ClientError(f"tool_choice names {name!r}, which is not among the tools: {known}", "tool_choice")
        return StructuredOutputsParams(grammar=_required(parser.call_rules(chosen[:1]), several=False))
    if choice == "required":
        if not tools:
            raise ClientError("tool_choice='required' needs tools", "tool_choice", choice)
        rules = parser.call_rules(tools)
        return StructuredOutputsParams(grammar=_required(rules, parallel and rules.several))
    if not any(function_of(tool).get("strict") for tool in tools):
        return None
    return StructuredOutputsParams(grammar=_free(parser.call_rules(tools), parallel))


def _named(choice: Any) -> str:
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        text = f"tool_choice must be none, auto, required or a function by name, got {choice!r}"
        raise ClientError(text, "tool_choice", choice)
    return name


def _required(rules: CallRules, several: bool) -> str:
    more = f"({rules.between} call){{0,{MOST_CALLS - 1}}}" if several else ""
    return f"start: {rules.begin} call {more} {rules.end}\n{_calls(rules.calls)}{rules.more}"


def _free(rules: CallRules, parallel: bool) -> str:
    """Content up to the trigger, then calls, then content."""
    if rules.trigger is None:
        raise ClientError("strict tools cannot be enforced with tool_choice='auto' in this model's format", "tools")
    if rules.begin:
        first, rest = rules.begin, tuple(rules.calls)
    else:
        first, rest = "", rules.calls
    trigger = literal(rules.trigger)
    bodies = tuple(_without(body, trigger) for body in rest) if not first else rest
    begin = _without(first, trigger) if first else ""
    times = f"{{0,{MOST_CALLS}}}" if parallel else "?"
    inner = f"({rules.between} call){{0,{MOST_CALLS - 1}}}" if first and parallel else ""
    part = f"before {begin} call {inner} {rules.end}"
    lines = f"start: ({part}){times} TEXT\nbefore[lazy]: TEXT {trigger}\nTEXT: /(.|\\n)*/\n"
    return lines + _calls(bodies) + rules.more


def _without(body: str, trigger: str) -> str:
    """A rule that goes on behind the trigger."""
    if body.startswith(trigger):
        return body[len(trigger) :].strip()
    inner = trigger[:-1]  # the trigger is the beginning of a longer literal
    assert body.startswith(inner), "calls begin with their trigger"
    return '"' + body[len(inner) :]


def _calls(bodies: Sequence[str]) -> str:
    alternatives = " | ".join(f"call_{i}" for i in range(len(bodies)))
    return f"call: {alternatives}\n" + "".join(f"call_{i}: {body}\n" for i, body in enumerate(bodies))
