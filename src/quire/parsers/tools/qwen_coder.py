"""Calls as tags: <tool_call><function=name><parameter=key>value</parameter></function></tool_call>: Qwen3 Coder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

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
    parameters_of,
)

START, FUNCTION, END_FUNCTION, END = "<tool_call>", "<function=", "</function>", "</tool_call>"
_NAME = re.compile(r"<function=([^>\n]+)>")
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>(.*?)(?:</parameter>|(?=<parameter=)|(?=</function>))", re.DOTALL)
_TEXT = 'PARAMETER_TEXT: /(.|\\n)*/\nparameter_text[lazy]: PARAMETER_TEXT "\\n</parameter>\\n"\n'


class QwenCoder(Whole):
    def stream(self, tools: Sequence[Tool] = ()) -> _Stream:
        return _Stream(tools)

    def call_rules(self, tools: Sequence[Tool]) -> CallRules:
        return CallRules(tuple(_call_rule(t) for t in tools), between='"\\n"', trigger=START, more=_TEXT)


class _Stream:
    """A call is read when it is complete: the types of its values are in the tool's schema, not in the text."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        self._schemas = {function_of(tool)["name"]: parameters_of(tool) for tool in tools}
        self._held = ""
        self._content = Beside()
        self._state = "content"
        self._index = -1

    def feed(self, text: str) -> list[Event]:
        out: list[Event] = []
        self._held += text
        while self._step(out):
            pass
        return out

    def finish(self) -> list[Event]:
        out: list[Event] = []
        if self._state == "call" and self._emit(out, self._held):
            self._held = ""
        if self._state != "after" or self._held.strip() not in ("", END):
            self._content.add(out, self._held)
        self._content.finish(out)
        return out

    def _step(self, out: list[Event]) -> bool:
        if self._state == "content":
            return self._content_step(out)
        if self._state == "after":
            seen = self._held.lstrip()
            if len(seen) < len(END) and END.startswith(seen):
                return False
            if seen.startswith(END):
                self._held = seen[len(END) :]
            self._state = "content"
            return True
        at = self._held.find(END_FUNCTION)
        if at < 0:
            return False
        end = at + len(END_FUNCTION)
        if self._emit(out, self._held[:end]):
            self._state = "after"
        else:
            self._content.add(out, self._held[:end])
            self._state = "content"
        self._held = self._held[end:]
        return True

    def _content_step(self, out: list[Event]) -> bool:
        found = [at for tag in (START, FUNCTION) if (at := self._held.find(tag)) >= 0]
        if found:
            at = min(found)
            self._content.add(out, self._held[:at])
            self._held, self._state = self._held[at:], "call"
            return True
        keep = max(overlap(self._held, START), overlap(self._held, FUNCTION))
        self._content.add(out, self._held[: len(self._held) - keep])
        self._held = self._held[len(self._held) - keep :]
        return False

    def _emit(self, out: list[Event], text: str) -> bool:
        name = _NAME.search(text)
        if name is None:
            return False
        schema = self._schemas.get(name[1].strip())
        properties = schema.get("properties") if isinstance(schema, Mapping) else None
        values = {
            key.strip(): _typed(_trimmed(value), (properties or {}).get(key.strip()))
            for key, value in _PARAMETER.findall(text, name.end())
        }
        self._index += 1
        self._content.call()
        out.append(CallStart(self._index, name[1].strip()))
        out.append(CallArguments(self._index, json.dumps(values, ensure_ascii=False)))
        return True


def _trimmed(value: str) -> str:
    """Without the line ends next to the tags."""
    return value.removeprefix("\n").removesuffix("\n")


def _typed(value: str, schema: Any) -> Any:
    """A value as its schema wants it; text where it does not parse as anything else that is allowed."""
    if schema is not None and _texts(schema):
        return value
    try:
        return json.loads(value)
    except ValueError:
        words = {"True": True, "False": False, "None": None}
        return words.get(value.strip(), value)


def _texts(schema: Any) -> bool:
    """Whether a schema means text: it says string, or is an enumeration of strings."""
    if not isinstance(schema, Mapping):
        return False
    if "enum" in schema:
        return all(isinstance(v, str) for v in schema["enum"])
    kind = schema.get("type")
    return kind == "string" or (isinstance(kind, list) and "string" in kind)


def _call_rule(tool: Tool) -> str:
    schema = parameters_of(tool)
    properties: Mapping[str, Any] = schema.get("properties") or {}
    required = schema.get("required") or ()
    shared = {k: schema[k] for k in ("$defs", "definitions") if k in schema}
    parts: list[str] = []
    for key, prop in properties.items():
        if isinstance(prop, Mapping) and "enum" in prop and _texts(prop):
            choices = " | ".join(literal(v) for v in prop["enum"])
            value = f'({choices}) "\\n</parameter>\\n"'
        elif _texts(prop):
            value = "parameter_text"
        else:
            whole = {**shared, **prop, "x-guidance": {"whitespace_flexible": False}}
            value = f'%json {json.dumps(whole, ensure_ascii=False)} "\\n</parameter>\\n"'
        part = f'{literal(f"<parameter={key}>")} "\\n" {value}'
        parts.append(part if key in required else f"({part})?")
    head = f'"{START}" "\\n" {literal(FUNCTION + function_of(tool)["name"] + ">")} "\\n"'
    return f'{head} {" ".join(parts)} "{END_FUNCTION}" "\\n" "{END}"'
