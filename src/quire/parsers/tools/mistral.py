"""Calls behind [TOOL_CALLS]: a JSON array of them, or a name with its arguments: Mistral.

[TOOL_CALLS][{"name": ..., "arguments": ...}, ...], and of newer models [TOOL_CALLS]name[ARGS]{...}[TOOL_CALLS]...; the
latter with [CALL_ID]... before [ARGS], or without either.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from quire.parsers.reasoning import overlap
from quire.parsers.tools import (
    Beside,
    CallArguments,
    CallRules,
    CallStart,
    Event,
    Tool,
    Whole,
    function_of,
    literal,
)
from quire.parsers.tools.json_call import CallReader, JsonValue
from quire.parsers.tools.json_grammar import arguments_rule, json_calls

TAG, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_HEAD = re.compile(r"\s*(?P<name>[\w.-]+)(?:\[CALL_ID\](?P<id>\w+))?\s*(?:\[ARGS\])?\s*(?=\{)")
_MAYBE_HEAD = re.compile(r"\s*[\w.-]*(?:\[(?:[A-Z_]*\]?\w*(?:\[[A-Z]*\]?)?)?)?\s*")


class Mistral(Whole):
    """`named`: calls are written as a name with arguments where a grammar enforces them, not as an array."""

    special_tokens = True

    def __init__(self, named: bool = False) -> None:
        self._named = named

    def stream(self, tools: Sequence[Tool] = ()) -> _Stream:
        return _Stream()

    def call_rules(self, tools: Sequence[Tool]) -> CallRules:
        if not self._named:
            calls = json_calls(tools, "arguments", "", "")
            return CallRules(calls, f'{literal(TAG)} "["', '", "', '"]"', trigger=TAG)
        names = [literal(function_of(tool)["name"]) for tool in tools]
        calls = (f"{literal(TAG)} {n} {literal(ARGS)} {arguments_rule(t)}" for n, t in zip(names, tools, strict=True))
        return CallRules(tuple(calls), trigger=TAG)


class _Stream:
    """`_state`: "content"; "tag" (behind one); "array" (between calls of one); "object" (a call of an array);
    "arguments" (of a named call)."""

    def __init__(self) -> None:
        self._state = "content"
        self._held = self._raw = ""
        self._content = Beside()
        self._index = 0
        self._call = CallReader(0)
        self._value = JsonValue()

    def feed(self, text: str) -> list[Event]:
        out: list[Event] = []
        self._held += text
        while getattr(self, f"_{self._state}_step")(out):
            pass
        return out

    def finish(self) -> list[Event]:
        out: list[Event] = []
        if self._state == "object":
            if not self._call.started:
                self._content.add(out, self._call.raw)
        elif self._state != "arguments":
            self._content.add(out, self._raw + self._held)
        self._content.finish(out)
        return out

    def _content_step(self, out: list[Event]) -> bool:
        at = self._held.find(TAG)
        if at < 0:
            keep = overlap(self._held, TAG)
            self._content.add(out, self._held[: len(self._held) - keep])
            self._held = self._held[len(self._held) - keep :]
            return False
        self._content.add(out, self._held[:at])
        self._held, self._raw, self._state = self._held[at + len(TAG) :], TAG, "tag"
        return True

    def _tag_step(self, out: list[Event]) -> bool:
        seen = self._held.lstrip()
        if not seen:
            return False
        if seen[0] == "[" and not (ARGS.startswith(seen[: len(ARGS)]) or CALL_ID.startswith(seen[: len(CALL_ID)])):
            self._raw += self._held[: len(self._held) - len(seen) + 1]
            self._held, self._state = seen[1:], "array"
            return True
        if seen[0] == "[" and len(seen) == 1:
            return False
        head = _HEAD.match(self._held)
        if head is not None:
            self._content.call()
            out.append(CallStart(self._index, head["name"], head["id"]))
            self._held, self._state, self._value = self._held[head.end() :], "arguments", JsonValue()
            return True
        if _MAYBE_HEAD.fullmatch(self._held):
            return False
        return self._none(out)

    def _array_step(self, out: list[Event]) -> bool:
        seen = self._held.lstrip(" \t\r\n,")
        if not seen:
            return False
        self._raw += self._held[: len(self._held) - len(seen)]
        self._held = seen
        if seen[0] == "{":
            self._call, self._state = CallReader(self._index, self._raw), "object"
            return True
        if seen[0] == "]" and self._index > 0:
            self._held, self._raw, self._state = seen[1:], "", "content"
            return True
        return self._none(out)

    def _object_step(self, out: list[Event]) -> bool:
        call = self._call
        self._held = call.read(self._held, out, self._content)
        if not (call.done or call.failed):
            return False
        if call.started:
            self._index += 1
            self._raw, self._state = "", "array" if call.done else "content"
            return True
        self._raw = call.raw
        return self._none(out)

    def _arguments_step(self, out: list[Event]) -> bool:
        at = 0
        while at < len(self._held) and not self._value.done:
            self._value.take(self._held[at])
            at += 1
        if at:
            out.append(CallArguments(self._index, self._held[:at]))
            self._held = self._held[at:]
        if not self._value.done:
            return False
        self._raw, self._state, self._index = "", "content", self._index + 1
        return True

    def _none(self, out: list[Event]) -> bool:
        """What was behind the tag is no call: it is content."""
        self._content.add(out, self._raw)
        self._raw, self._state = "", "content"
        return True
