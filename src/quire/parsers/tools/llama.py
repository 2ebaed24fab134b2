"""Calls as bare JSON objects, several with ";" between them: Llama 3.1 to 3.3."""

from __future__ import annotations

from collections.abc import Sequence

from quire.parsers.reasoning import overlap
from quire.parsers.tools import Beside, CallRules, Event, Tool, Whole
from quire.parsers.tools.json_call import CallReader
from quire.parsers.tools.json_grammar import json_calls

TAG = "<|python_tag|>"


class Llama3Json(Whole):
    """A text that begins with "{", or what follows the tag. The tag is a special token; where the text comes without
    those, calls behind content are not found."""

    def stream(self, tools: Sequence[Tool] = ()) -> _Stream:
        return _Stream()

    def call_rules(self, tools: Sequence[Tool]) -> CallRules:
        return CallRules(json_calls(tools, "parameters", "", ""), between='"; "')


class _Stream:
    """`_state`: "begin" (nothing but blanks so far), "call", "between" calls, "content"."""

    def __init__(self) -> None:
        self._state = "begin"
        self._held = self._raw = ""
        self._content = Beside()
        self._index = 0
        self._call = CallReader(0)

    def feed(self, text: str) -> list[Event]:
        out: list[Event] = []
        self._held += text
        while self._step(out):
            pass
        return out

    def finish(self) -> list[Event]:
        out: list[Event] = []
        if self._state != "call":
            self._content.add(out, self._raw + self._held)
        elif not self._call.started:
            self._content.add(out, self._call.raw)
        self._content.finish(out)
        return out

    def _step(self, out: list[Event]) -> bool:
        if self._state == "call":
            return self._call_step(out)
        if self._state == "content":
            at = self._held.find(TAG)
            if at < 0:
                keep = overlap(self._held, TAG)
                self._content.add(out, self._held[: len(self._held) - keep])
                self._held = self._held[len(self._held) - keep :]
                return False
            self._content.add(out, self._held[:at])
            self._held, self._raw, self._state = self._held[at + len(TAG) :], TAG, "begin"
            return True
        skipped = " \t\r\n" if self._state == "begin" else " \t\r\n;"
        seen = self._held.lstrip(skipped)
        if TAG.startswith(seen[: len(TAG)]) and len(seen) < len(TAG):  # nothing yet, or the beginning of a tag
            return False
        if seen.startswith(TAG):
            self._raw += self._held[: len(self._held) - len(seen)] + TAG
            self._held = seen[len(TAG) :]
            return True
        self._state = "call" if seen[0] == "{" else "content"
        if self._state == "call":
            self._call = CallReader(self._index, self._raw + self._held[: len(self._held) - len(seen)])
            self._held, self._raw = seen, ""
        else:
            self._held, self._raw = self._raw + self._held, ""
            if self._held.startswith(TAG):  # of no call: content, and not to be found again
                self._content.add(out, TAG)
                self._held = self._held[len(TAG) :]
        return True

    def _call_step(self, out: list[Event]) -> bool:
        call = self._call
        self._held = call.read(self._held, out, self._content)
        if not (call.done or call.failed):
            return False
        if call.started:
            self._index += 1
        else:
            self._content.add(out, call.raw)
        self._state = "between" if call.done else "content"
        return True
