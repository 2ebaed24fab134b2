"""Tool calls in a model's text: parsers, one for each format that models were trained on.

Owns: what a parser is, and the registry. Plugins: entry points of the group `quire.tool_parsers`, each a class whose
instances are `ToolParser`s.

A parser works on a stream: `parse` is a stream that is fed once. What does not parse as a call is content.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from quire.parsers.registry import Parsers
from quire.types.errors import ClientError

Tool = Mapping[str, Any]  # {"type": "function", "function": {"name", "description", "parameters", "strict"}}


@dataclass(frozen=True, slots=True)
class Content:
    """New text that belongs to no call."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """Call number `index` begins. `id` is what the model called it, where its format has that."""

    index: int
    name: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


Event = Content | CallStart | CallArguments


@dataclass
class ToolCall:
    """`arguments` is JSON text; where the model wrote it, just as it did."""

    name: str
    arguments: str
    id: str | None = None


@dataclass
class ParsedTools:
    """`content`: the text beside the calls, None where there is none."""

    content: str | None
    calls: list[ToolCall] = field(default_factory=list[ToolCall])


class ToolStream(Protocol):
    """Whatever the text is cut into, the events gathered are what `parse` gives."""

    def feed(self, text: str) -> list[Event]: ...
    def finish(self) -> list[Event]:
        """The text has ended, perhaps within a call, which then has what there is of its arguments."""
        ...


class ToolParser(Protocol):
    """`special_tokens`: the format has special tokens, so that the text must be decoded with them
    (`skip_special_tokens=False`)."""

    special_tokens: bool

    def parse(self, text: str, tools: Sequence[Tool] = ()) -> ParsedTools: ...
    def stream(self, tools: Sequence[Tool] = ()) -> ToolStream: ...

    def call_rules(self, tools: Sequence[Tool]) -> CallRules:
        """The format as a grammar, for `parsers.enforce`."""
        ...


@dataclass(frozen=True)
class CallRules:
    """How calls of some tools are written, as grammar text in Lark's notation.

    `calls`: one rule body for each tool, in order, for one call. Around them: `begin`, `between`, `end` (bodies, may be
    empty). `trigger`: the text in whose place nothing but a call can come, None where calls cannot be told from content
    before they are complete; `begin`, or each call, begins with it. `several`: whether there may be more than one call.
    `more`: rules that the bodies name.
    """

    calls: tuple[str, ...]
    begin: str = ""
    between: str = ""
    end: str = ""
    trigger: str | None = None
    several: bool = True
    more: str = ""


def gather(events: Iterable[Event]) -> ParsedTools:
    """What the events of a stream add up to."""
    content: list[str] = []
    calls: dict[int, ToolCall] = {}
    for event in events:
        if isinstance(event, Content):
            content.append(event.text)
        elif isinstance(event, CallStart):
            calls[event.index] = ToolCall(event.name, "", event.id)
        else:
            calls[event.index].arguments += event.text
    return ParsedTools("".join(content) or None, [calls[i] for i in sorted(calls)])


class Beside:
    """The content of a stream. Blanks before a call, between calls and after them belong to nobody."""

    def __init__(self) -> None:
        self._blank = ""
        self._calls = False

    def add(self, out: list[Event], text: str) -> None:
        text = self._blank + text
        shown = text.rstrip()
        self._blank = text[len(shown) :]
        if shown:
            out.append(Content(shown))

    def call(self) -> None:
        """A call begins."""
        self._blank, self._calls = "", True

    def finish(self, out: list[Event]) -> None:
        if self._blank and not self._calls:
            out.append(Content(self._blank))


class Whole:
    """Base of parsers: whole text by their stream."""

    special_tokens = False

    def parse(self, text: str, tools: Sequence[Tool] = ()) -> ParsedTools:
        stream = self.stream(tools)
        return gather([*stream.feed(text), *stream.finish()])

    def stream(self, tools: Sequence[Tool] = ()) -> ToolStream:
        raise NotImplementedError


def function_of(tool: Tool) -> Mapping[str, Any]:
    """The function of a tool. Raises `ClientError` where it has no name."""
    function = tool.get("function", tool)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ClientError(f"a tool needs a function with a name, got {tool!r}", "tools", tool)
    return function


def parameters_of(tool: Tool) -> Any:
    """The JSON schema of a tool's arguments."""
    return function_of(tool).get("parameters") or {"type": "object", "properties": {}}


def literal(text: str) -> str:
    """A text as it stands in a grammar."""
    return json.dumps(text, ensure_ascii=False)


TOOL_PARSERS = Parsers(
    "quire.tool_parsers",
    "tool_call_parser",
    {
        "checkpoint": "quire.parsers.tools.checkpoint:Checkpoint",
        "hermes": "quire.parsers.tools.hermes:Hermes",
        "hf": "quire.parsers.tools.checkpoint:Checkpoint",
        "llama3_json": "quire.parsers.tools.llama:Llama3Json",
        "mistral": "quire.parsers.tools.mistral:Mistral",
        "pythonic": "quire.parsers.tools.pythonic:Pythonic",
        "qwen3": "quire.parsers.tools.hermes:Hermes",
        "qwen3_coder": "quire.parsers.tools.qwen_coder:QwenCoder",
        "qwen3_xml": "quire.parsers.tools.qwen_coder:QwenCoder",
    },
)


def tool_parser(name: str, **options: Any) -> ToolParser:
    """The parser `name`; `options` are its own (`checkpoint` needs `response_template`). Raises `ClientError`."""
    return TOOL_PARSERS.find(name)(**options)
