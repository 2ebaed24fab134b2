"""What a chat's text means: reasoning, content, tool calls.

Owns: the choice of parsers for a request, what its tools demand of sampling, and the parts of each choice as its text
comes. The formats are the parsers' (`quire.parsers`).
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

from quire.parsers.enforce import tool_constraint
from quire.parsers.reasoning import ReasoningParser, reasoning_parser
from quire.parsers.tools import CallStart, Content, Event, ToolParser, tool_parser
from quire.server.errors import ApiError
from quire.server.protocol import ChatRequest, NamedToolChoice
from quire.server.served import Served
from quire.types.errors import ClientError
from quire.types.params import SamplingParams

# What in a chat template gives a format away, in this order.
SIGNS = (
    ("<function=", "qwen3_coder"),
    ("<tool_call>", "hermes"),
    ("[TOOL_CALLS]", "mistral"),
    ("<|python_tag|>", "llama3_json"),
)


@dataclass(slots=True)
class Parts:
    """New parts of a message. `calls` are OpenAI's deltas of tool calls."""

    reasoning: str = ""
    content: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])


class Speech:
    """How the answers to one request are read. Raises `ClientError`, `ApiError`."""

    def __init__(self, served: Served, body: ChatRequest, prompt: str) -> None:
        self._prompt = prompt
        self._show_reasoning = body.include_reasoning
        name = served.config.structured.reasoning_parser
        self._reasoning: ReasoningParser | None = reasoning_parser(name) if name else None
        self._tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
        choice: Any = body.tool_choice or ("auto" if self._tools else "none")
        if isinstance(choice, NamedToolChoice):
            choice = choice.model_dump()
        if choice not in ("none", "auto") and not self._tools:
            raise ClientError("tool_choice needs tools", "tool_choice")
        self._single = body.parallel_tool_calls is False
        self.named = isinstance(choice, dict)
        self._parser: ToolParser | None = None
        self._constraint = None
        if self._tools and choice != "none":
            self._parser = _tool_parser(served, prompt)
            self._constraint = tool_constraint(self._parser, self._tools, choice, not self._single)

    def demand(self, params: SamplingParams) -> None:
        """What the tools ask of sampling goes into `params`."""
        if self._parser is not None and self._parser.special_tokens:
            params.skip_special_tokens = False
        if self._constraint is None:
            return
        if params.structured_outputs is not None:
            text = "tools that must be called, or are strict, and response_format exclude each other"
            raise ClientError(text, "tool_choice")
        params.structured_outputs = self._constraint

    def talk(self) -> Talk:
        """For one choice."""
        reasoning = self._reasoning.stream(self._prompt) if self._reasoning is not None else None
        tools = self._parser.stream(self._tools) if self._parser is not None else None
        return Talk(reasoning, tools, self._show_reasoning, self._single)


class Talk:
    """One choice's text, on its way into a message."""

    def __init__(self, reasoning: Any, tools: Any, show_reasoning: bool, single: bool) -> None:
        self._reasoning, self._tools = reasoning, tools
        self._show_reasoning, self._single = show_reasoning, single
        self.called = False

    def feed(self, text: str, last: bool) -> Parts:
        """The parts that new text brings; `last`: there will be no more."""
        parts = Parts()
        if self._reasoning is None:
            self._content(text, parts)
        else:
            for piece in [*self._reasoning.feed(text), *(self._reasoning.finish() if last else ())]:
                if not piece.reasoning:
                    self._content(piece.text, parts)
                elif self._show_reasoning:
                    parts.reasoning += piece.text
        if last and self._tools is not None:
            self._events(self._tools.finish(), parts)
        return parts

    def _content(self, text: str, parts: Parts) -> None:
        if self._tools is None:
            parts.content += text
        else:
            self._events(self._tools.feed(text), parts)

    def _events(self, events: list[Event], parts: Parts) -> None:
        for event in events:
            if isinstance(event, Content):
                parts.content += event.text
                continue
            if self._single and event.index > 0:
                continue
            self.called = True
            if isinstance(event, CallStart):
                function = {"name": event.name, "arguments": ""}
                id = event.id or f"call_{uuid.uuid4().hex[:24]}"
                parts.calls.append({"index": event.index, "id": id, "type": "function", "function": function})
            elif parts.calls and parts.calls[-1]["index"] == event.index:
                parts.calls[-1]["function"]["arguments"] += event.text
            else:
                parts.calls.append({"index": event.index, "function": {"arguments": event.text}})


def _tool_parser(served: Served, prompt: str) -> ToolParser:
    """The parser that the server was started with, else the one that the checkpoint's template speaks of."""
    name = served.args.tool_call_parser
    tokenizer = served.tokenizer
    declared = getattr(tokenizer, "response_template", None)
    if name is None:
        templates = "".join(tokenizer.chat_templates.values()) + (served.config.model.chat_template or "")
        name = "checkpoint" if declared else next((found for sign, found in SIGNS if sign in templates), None)
    if name is None:
        text = "this model's format of tool calls is not known: start the server with --tool-call-parser"
        raise ApiError(400, text, "tools_unavailable", "tools")
    if name in ("checkpoint", "hf"):
        return tool_parser(name, response_template=declared, prompt=prompt)
    return tool_parser(name)
