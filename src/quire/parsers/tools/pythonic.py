"""Calls as a list of Python calls, [f(a=1), g(b="x")]: Llama 3.2 and 4, and others."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

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

_BEGIN = re.compile(r"\s*\[\s*[A-Za-z_][\w.]*\s*\(")
_MAYBE_BEGIN = re.compile(r"\s*(?:\[\s*(?:[A-Za-z_][\w.]*\s*)?)?")
_WORDS = {"true": True, "false": False, "null": None}


class Pythonic(Whole):
    def stream(self, tools: Sequence[Tool] = ()) -> _Stream:
        return _Stream()

    def call_rules(self, tools: Sequence[Tool]) -> CallRules:
        return CallRules(tuple(_call_rule(tool) for tool in tools), '"["', '", "', '"]"')


class _Stream:
    """The list is read when it is complete; before that nobody knows that it is one."""

    def __init__(self) -> None:
        self._held = ""
        self._state = "begin"
        self._content = Beside()
        self._depth = self._at = 0
        self._quote = ""

    def feed(self, text: str) -> list[Event]:
        out: list[Event] = []
        self._held += text
        if self._state == "begin":
            if _BEGIN.match(self._held):
                self._state = "list"
            elif not _MAYBE_BEGIN.fullmatch(self._held):
                self._state = "content"
        if self._state == "list" and self._find_end():
            calls = _calls(self._held[: self._at])
            self._state = "content"
            if calls:
                self._held = self._held[self._at :]
                self._content.call()
                for i, (name, arguments) in enumerate(calls):
                    out += [CallStart(i, name), CallArguments(i, json.dumps(arguments, ensure_ascii=False))]
        if self._state == "content":
            self._content.add(out, self._held)
            self._held = ""
        return out

    def finish(self) -> list[Event]:
        out: list[Event] = []
        self._content.add(out, self._held)
        self._content.finish(out)
        return out

    def _find_end(self) -> bool:
        """Whether the list is closed; `_at` is how far it was looked at."""
        while self._at < len(self._held):
            char = self._held[self._at]
            self._at += 1
            if self._quote:
                if char == "\\":
                    if self._at == len(self._held):
                        self._at -= 1
                        return False
                    self._at += 1
                elif char == self._quote:
                    self._quote = ""
            elif char in "\"'":
                self._quote = char
            elif char in "[({":
                self._depth += 1
            elif char in "])}":
                self._depth -= 1
                if self._depth == 0:
                    return True
        return False


def _calls(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Names and arguments; [] where the text is no list of calls with named, constant arguments."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        assert isinstance(tree, ast.List)
        out: list[tuple[str, dict[str, Any]]] = []
        for call in tree.elts:
            assert isinstance(call, ast.Call) and not call.args and all(k.arg for k in call.keywords)
            out.append((ast.unparse(call.func), {str(k.arg): _value(k.value) for k in call.keywords}))
        return out
    except (SyntaxError, ValueError, AssertionError, RecursionError, MemoryError, TypeError):
        return []


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id in _WORDS:
        return _WORDS[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {str(_value(k)): _value(v) for k, v in zip(node.keys, node.values, strict=True) if k is not None}
    value = ast.literal_eval(node)
    json.dumps(value)  # TypeError for bytes, sets and such
    return value


def _call_rule(tool: Tool) -> str:
    schema = parameters_of(tool)
    properties: Mapping[str, Any] = schema.get("properties") or {}
    required = [k for k in properties if k in (schema.get("required") or ())]
    optional = [k for k in properties if k not in required]
    shared = {k: schema[k] for k in ("$defs", "definitions") if k in schema}

    def argument(key: str) -> str:
        prop = properties[key]
        whole = {**shared, **prop, "x-guidance": {"whitespace_flexible": False}} if isinstance(prop, dict) else {}
        return f"{literal(key + '=')} %json {json.dumps(whole, ensure_ascii=False)}"

    def tail(keys: list[str]) -> str:
        return " ".join(f'(", " {argument(key)})?' for key in keys)

    if required:
        body = ' ", " '.join(argument(key) for key in required) + " " + tail(optional)
    else:
        ways = [f"{argument(key)} {tail(optional[i + 1 :])}" for i, key in enumerate(optional)]
        body = f"({' | '.join(ways)})?" if ways else ""
    return f'{literal(function_of(tool)["name"] + "(")} {body} ")"'
