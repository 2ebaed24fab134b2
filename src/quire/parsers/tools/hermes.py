"""Calls as JSON within <tool_call> tags: Hermes, Qwen 2.5 and 3, and quire's demo model."""

from __future__ import annotations

from collections.abc import Sequence

from quire.parsers.reasoning import overlap
from quire.parsers.tools import Beside, CallRules, Event, Tool, Whole
from quire.parsers.tools.json_call import CallReader
from quire.parsers.tools.json_grammar import json_calls

START, END = "<tool_call>", "</tool_call>"


class Hermes(Whole):
    def stream(self, tools: Sequence[Tool] = ()) -> _Stream:
        return _Stream()

    def call_rules(self, tools: Sequence[Tool]) -> CallRules:
        calls = json_calls(tools, "arguments", f'"{START}" "\\n"', f'"\\n" "{END}"')
        return CallRules(calls, between='"\\n"', trigger=START)


class _Stream:
    """In content, or in a call."""

    def __init__(self) -> None:
        self._held = ""
        self._content = Beside()
        self._call: CallReader | None = None
        self._index = 0

    def feed(self, text: str) -> list[Event]:
        out: list[Event] = []
        self._held += text
        while self._call_step(out, self._call) if self._call else self._content_step(out):
            pass
        return out

    def finish(self) -> list[Event]:
        out: list[Event] = []
        if self._call is None:
            self._content.add(out, self._held)
        elif not self._call.started:
            self._content.add(out, self._call.raw + self._held)
        self._content.finish(out)
        return out

    def _content_step(self, out: list[Event]) -> bool:
        at = self._held.find(START)
        if at < 0:
            keep = overlap(self._held, START)
            text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
            self._content.add(out, text)
            return False
        self._content.add(out, self._held[:at])
        self._held = self._held[at + len(START) :]
        self._call = CallReader(self._index, START)
        return True

    def _call_step(self, out: list[Event], call: CallReader) -> bool:
        self._held = call.read(self._held, out, self._content)
        if not (call.done or call.failed):
            return False
        if call.started:
            return self._leave()
        self._content.add(out, call.raw)  # no call: its tag was content, and so is what came of it
        self._call = None
        return True

    def _leave(self) -> bool:
        """After a call, up to its end tag (or the next start tag, where the model forgot it)."""
        end, again = self._held.find(END), self._held.find(START)
        if end >= 0 and not 0 <= again < end:
            self._held = self._held[end + len(END) :]
        elif again >= 0:
            self._held = self._held[again:]
        else:
            return False
        self._call, self._index = None, self._index + 1
        return True
