"""The format that the checkpoint itself declares: `response_template` in tokenizer_config.json, read by Transformers.

Owns: how Transformers' events become ours, and a grammar for the calls of a template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from quire.parsers.tools import (
    CallArguments,
    CallRules,
    CallStart,
    Content,
    Event,
    Tool,
    Whole,
    function_of,
    literal,
    parameters_of,
)
from quire.parsers.tools.json_grammar import arguments_rule
from quire.types.errors import ClientError

_CALLS = "tool_calls"


class Checkpoint(Whole):
    """`response_template`: what tokenizer_config.json says under that name. `prompt`: the end of the prompt, where the
    template begins the answer. Raises `ClientError` for templates that Transformers does not take."""

    special_tokens = True

    def __init__(self, response_template: Mapping[str, Any] | None = None, prompt: str = "") -> None:
        if not response_template:
            text = "the checkpoint declares no response_template in tokenizer_config.json: name a tool_call_parser"
            raise ClientError(text, "tool_call_parser")
        try:
            from transformers.utils.chat_parsing.response_templates import load_response_template
        except ImportError as e:
            text = "a checkpoint's response_template needs Transformers 5.23 or later: pip install -U transformers"
            raise ClientError(text, "tool_call_parser") from e
        self._prompt = prompt
        self._declared = dict(response_template)
        try:
            self._template = load_response_template(self._declared)
        except (ValueError, TypeError, KeyError) as e:
            raise ClientError(f"the checkpoint's response_template is wrong: {e}", "tool_call_parser") from e

    def stream(self, tools: Sequence[Tool] = ()) -> _Stream:
        from transformers.utils.chat_parsing import ResponseParser

        return _Stream(ResponseParser(self._template, self._prompt, tools=[dict(t) for t in tools]))

    def call_rules(self, tools: Sequence[Tool]) -> CallRules:
        field: dict[str, Any] = (self._declared.get("fields") or {}).get(_CALLS) or {}
        refused = ClientError(
            "tool calls of this checkpoint's response_template cannot be enforced: name a tool_call_parser, or use "
            "tool_choice='auto' without strict tools",
            "tool_choice",
        )
        calls = tuple(_call_rule(field, tool, refused) for tool in tools)
        begin = _plain(_sample(field, "open", "NAME", refused), refused).partition("NAME")[0]
        return CallRules(calls, trigger=begin or None, several=bool(field.get("repeats")))


class _Stream:
    """Reasoning that the template knows is dropped here; a reasoning parser before this one shows it. A call that does
    not parse, and all that comes after it, is content: Transformers' parser does not go on behind it."""

    def __init__(self, parser: Any) -> None:
        self._parser = parser
        self._index = -1
        self._region = ""
        self._failed = False

    def feed(self, text: str) -> list[Event]:
        out: list[Event] = []
        for at, char in enumerate(text):  # one by one: what comes before an error must not be lost with it
            if self._failed:
                out.append(Content(text[at:]))
                break
            self._take(out, lambda char=char: self._parser.feed(char))
        return out

    def finish(self) -> list[Event]:
        out: list[Event] = []
        if not self._failed:
            self._take(out, lambda: self._parser.finalize()[1])
        return out

    def _take(self, out: list[Event], work: Callable[[], list[dict[str, Any]]]) -> None:
        try:
            events = work()
        except (ValueError, KeyError):
            self._failed = True
            if self._region:
                out.append(Content(self._region))
            return
        for event in events:
            calls = event["field"] == _CALLS
            if event["type"] == "region_chunk" and event["field"] == "content":
                out.append(Content(event["text"]))
            elif event["type"] == "region_chunk" and calls:
                self._region += event["text"]
            elif event["type"] == "region_close" and calls:
                self._region = ""
                value = event["value"]
                for call in value if isinstance(value, list) else [value]:
                    self._add(out, call)

    def _add(self, out: list[Event], call: Any) -> None:
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            return
        arguments = function.get("arguments", function.get("parameters", {}))
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        self._index += 1
        id = call.get("id")
        out.append(CallStart(self._index, function["name"], id if isinstance(id, str) else None))
        out.append(CallArguments(self._index, text))


def _call_rule(field: dict[str, Any], tool: Tool, refused: ClientError) -> str:
    """One call: the anchors with the tool's name in them, around JSON arguments or a JSON object with both."""
    name = function_of(tool)["name"]
    transform = field.get("transform") or {}
    function = transform.get("function") if isinstance(transform, Mapping) else None
    opening = _plain(_sample(field, "open", name, refused), refused)
    closing = _plain(_sample(field, "close", name, refused), refused) if _has(field, "close") else ""
    args: Mapping[str, Any] = field.get("content_args") or {}
    if field.get("content") == "json" and not args.get("string_delims"):
        if isinstance(function, Mapping) and function.get("name") == "{name}":
            body = arguments_rule(tool)
        elif function == "{content}":
            head = literal(f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": ')
            body = f'{head} {arguments_rule(tool)} "}}"'
        else:
            raise refused
    elif field.get("content") == "xml-inline" and "tag_pattern" in args:
        body = _tags(tool, str(args["tag_pattern"]), refused)
    else:
        raise refused
    return " ".join(part for part in (literal(opening), body, literal(closing) if closing else "") if part)


def _has(field: dict[str, Any], side: str) -> bool:
    return side in field or f"{side}_pattern" in field


def _sample(field: dict[str, Any], side: str, name: str, refused: ClientError) -> str:
    """An anchor as regex text, with the tool's name where its pattern captures one."""
    if side in field:
        text = field[side] if isinstance(field[side], str) else field[side][0]
        return re.escape(text)
    pattern = field.get(f"{side}_pattern")
    if not isinstance(pattern, str):
        raise refused
    return re.sub(r"\(\?P<name>[^()]*\)", lambda _: re.escape(name), pattern)


def _plain(pattern: str, refused: ClientError) -> str:
    """A text that a simple pattern matches: blanks that may be there are left out. Raises where it is not simple."""
    text = re.sub(r"\\[sn]\*|\\s\?", "", pattern)
    text = re.sub(r"\\s\+?", "\n", text).replace("\\n", "\n")
    text = re.sub(r"\\([^\w])", lambda m: "\0" + m[1], text)
    if re.search(r"(?<!\0)[\[\](){}*+?|^$.\\]", text):
        raise refused
    text = text.replace("\0", "")
    if pattern and re.fullmatch(pattern, text) is None:
        raise refused
    return text


def _tags(tool: Tool, pattern: str, refused: ClientError) -> str:
    """Arguments as tags, a value between what stands before and behind it in the pattern. Texts are written without
    "<", so that where they end is plain."""
    match = re.fullmatch(r"(.*)\(\?P<key>[^()]*\)(.*)\(\?P<value>[^()]*\)(.*)", pattern, re.DOTALL)
    if match is None:
        raise refused
    before, between, behind = (_plain(part, refused) if part else "" for part in match.groups())
    schema = parameters_of(tool)
    parts: list[str] = []
    for key, prop in (schema.get("properties") or {}).items():
        kind = prop.get("type") if isinstance(prop, Mapping) else None
        value = "/[^<]+/" if kind == "string" and "enum" not in prop else f"%json {json.dumps(prop)}"
        if isinstance(prop, Mapping) and "enum" in prop and all(isinstance(v, str) for v in prop["enum"]):
            value = "(" + " | ".join(literal(v) for v in prop["enum"]) + ")"
        part = f"{literal(before + key + between)} {value} {literal(behind)}"
        parts.append(part if key in (schema.get("required") or ()) else f"({part})?")
    return " ".join(parts)
