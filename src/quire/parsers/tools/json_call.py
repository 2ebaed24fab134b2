"""One call written as a JSON object, character by character. Owns: telling its name and its arguments as they come.

{"name": ..., "arguments": {...}}, in any order; "parameters" is another word for "arguments"; "id" and "type" may stand
there too. Knows nothing of what is around the object.
"""

from __future__ import annotations

import json

from quire.parsers.tools import Beside, CallArguments, CallStart, Event

_ARGUMENTS = ("arguments", "parameters")
_OTHERS = ("id", "type")
_BLANK = " \t\r\n"


class JsonValue:
    """Finds the end of one JSON value. `done` once it is there. What is inside of it is not checked."""

    def __init__(self) -> None:
        self._stack: list[str] = []
        self._string = self._escaped = self._begun = False
        self.done = False

    def take(self, char: str) -> bool:
        """Whether the character belongs to the value."""
        if self._string:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._string = False
                self.done = not self._stack
            return True
        if char == '"':
            self._string = self._begun = True
        elif char in "{[":
            self._begun = True
            self._stack.append("}" if char == "{" else "]")
        elif char in "}]":
            if not self._stack:
                self.done = True  # a number or word before the end of what holds it
                return False
            self._stack.pop()
            self.done = not self._stack
        elif not self._stack:
            if char in _BLANK + ",":
                self.done = self._begun
                return not self.done
            self._begun = True
        return True


class JsonCall:
    """Feed it the object's characters, "{" first. `ok` is False as soon as it cannot be a call; `done` when it is
    complete. `name`, `id` are known once they are not None; `arguments` is what there is of them to be shown: nothing
    before the name is known."""

    def __init__(self) -> None:
        self.ok, self.done = True, False
        self.name: str | None = None
        self.id: str | None = None
        self._state = "open"
        self._key = ""
        self._text = ""
        self._value = JsonValue()
        self._arguments = ""
        self._seen = False  # arguments have begun

    @property
    def arguments(self) -> str:
        return self._arguments if self.name is not None else ""

    def take(self, char: str) -> None:
        """One more character."""
        if self._state == "value" and self._take_value(char):
            return
        if char in _BLANK and self._state != "key":
            return
        if self._state == "open":
            self._go(char == "{", "first")
        elif self._state in ("first", "next"):
            if char == "}" and self._state == "first":
                self.ok = False
            else:
                self._text = char
                self._go(char == '"', "key")
        elif self._state == "key":
            self._text += char
            if char == '"' and not _escaped(self._text):
                self._key = _string(self._text) or ""
                self._go(self._key in ("name", *_ARGUMENTS, *_OTHERS), "colon")
        elif self._state == "colon":
            self._go(char == ":", "value")
            self._value, self._text = JsonValue(), ""
        elif self._state == "comma":
            if char == "}":
                self.done = True
                self.ok = self.name is not None and self._seen
            else:
                self._go(char == ",", "next")

    def _go(self, right: bool, state: str) -> None:
        self._state = state
        self.ok = self.ok and right

    def _take_value(self, char: str) -> bool:
        """Whether the character was the value's."""
        if not self._text and char in _BLANK:
            return True
        arguments = self._key in _ARGUMENTS
        if not self._text and arguments and char not in '{"n':
            self.ok = False
            return True
        belongs = self._value.take(char)
        if belongs:
            self._text += char
            if arguments and self._text[0] == "{":
                self._seen = True
                self._arguments += char
        if self._value.done:
            self._state = "comma"
            self._end_value()
        return belongs

    def _end_value(self) -> None:
        if self._key == "name":
            self.name = _string(self._text)
            self.ok = self.ok and bool(self.name)
        elif self._key == "id" and (self.name is None or not self._seen):  # later ones come too late for a stream
            self.id = _string(self._text)
        elif self._key in _ARGUMENTS and not self._seen:  # JSON within a string, or null
            inner = "{}" if self._text == "null" else _string(self._text)
            self._seen, self._arguments = True, inner or "{}"
            self.ok = self.ok and inner is not None


class CallReader:
    """Reads one call from a stream and says what it brings. Call number `index`, if it is one: `started` then.

    `raw` is all that was read, `failed` whether it cannot be a call (or no longer), `done` whether it is complete.
    """

    def __init__(self, index: int, raw: str = "") -> None:
        self._index, self.raw = index, raw
        self._call = JsonCall()
        self._shown = 0
        self.started = False

    @property
    def failed(self) -> bool:
        return not self._call.ok

    @property
    def done(self) -> bool:
        return self._call.ok and self._call.done

    def read(self, text: str, out: list[Event], beside: Beside) -> str:
        """Answers the rest of the text, if the call ended within it."""
        call, at = self._call, 0
        while at < len(text) and call.ok and not call.done:
            call.take(text[at])
            at += 1
            if not self.started and call.ok and call.name is not None and call.arguments:
                self.started = True
                beside.call()
                out.append(CallStart(self._index, call.name, call.id))
        self.raw += text[:at]
        if self.started and len(call.arguments) > self._shown:
            out.append(CallArguments(self._index, call.arguments[self._shown :]))
            self._shown = len(call.arguments)
        return text[at:]


def _escaped(text: str) -> bool:
    body = text[:-1]
    return len(text) < 2 or (len(body) - len(body.rstrip("\\"))) % 2 == 1


def _string(text: str) -> str | None:
    try:
        value = json.loads(text, strict=False)
    except ValueError:
        return None
    return value if isinstance(value, str) else None
