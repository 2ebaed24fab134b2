"""Tools and answers in each format, for the tests of parsers and of the grammars that enforce them."""

from __future__ import annotations

from typing import Any

from quire.parsers.tools import ToolParser, tool_parser

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
        },
    },
}
NUMBER = {"type": "number", "minimum": -1000, "maximum": 1000}
ADD: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": NUMBER, "b": NUMBER, "exact": {"type": "boolean"}},
            "required": ["a", "b"],
        },
    },
}
PING: dict[str, Any] = {"type": "function", "function": {"name": "ping"}}
TOOLS = [WEATHER, ADD, PING]

QWEN_TEMPLATE: dict[str, Any] = {
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"\s*<\|im_end\|>", "content": "text"},
    },
}
XML_TEMPLATE: dict[str, Any] = {
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
            "close_pattern": r"</function>\s*</tool_call>",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {"tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\s*(?P<value>.*?)\s*</parameter>"},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"content": "text"},
    },
}
NAMED_TEMPLATE: dict[str, Any] = {
    "start_anchor": "<start>",
    "fields": {
        "tool_calls": {
            "open_pattern": r"<call:(?P<name>\w+)>",
            "close": "</call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"content": "text"},
    },
}

PARSERS: dict[str, ToolParser] = {
    "hermes": tool_parser("hermes"),
    "llama3_json": tool_parser("llama3_json"),
    "mistral": tool_parser("mistral"),
    "mistral-named": tool_parser("mistral", named=True),
    "pythonic": tool_parser("pythonic"),
    "qwen3_coder": tool_parser("qwen3_coder"),
    "checkpoint-json": tool_parser("checkpoint", response_template=QWEN_TEMPLATE),
    "checkpoint-xml": tool_parser("checkpoint", response_template=XML_TEMPLATE),
    "checkpoint-named": tool_parser("checkpoint", response_template=NAMED_TEMPLATE),
}

PARIS = {"city": "Paris", "unit": "celsius"}
SUM = {"a": 1, "b": 2.5}
Calls = list[tuple[str, dict[str, Any]]]
BOTH: Calls = [("get_weather", PARIS), ("add", SUM)]

# (parser, text, content, calls)
# fmt: off
# ruff: noqa: E501
ANSWERS: list[tuple[str, str, str | None, Calls]] = [
    ("hermes", "Just text, 2 < 3.\n", "Just text, 2 < 3.\n", []),
    (
        "hermes",
        'Let me look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius"}}\n</tool_call>\n'
        '<tool_call>\n{"arguments": {"a": 1, "b": 2.5}, "name": "add"}\n</tool_call>',
        "Let me look.",
        BOTH,
    ),
    ("hermes", '<tool_call>{"name":"ping","arguments":{}}</tool_call> done', " done", [("ping", {})]),
    ("hermes", '<tool_call>{"name": "ping", "arguments": "{\\"a\\": 1}"}</tool_call>', None, [("ping", {"a": 1})]),
    ("hermes", '<tool_call>{"name": "ping", "parameters": null}</tool_call>', None, [("ping", {})]),
    (
        "hermes",
        '<tool_call>{"name": "p", "arguments": {"x": "a </tool_call> \\" } b"}}</tool_call>',
        None,
        [("p", {"x": 'a </tool_call> " } b'})],
    ),
    ("hermes", "<tool_call>not a call</tool_call>", "<tool_call>not a call</tool_call>", []),
    ("hermes", '<tool_call>{"city": "Paris"}</tool_call>', '<tool_call>{"city": "Paris"}</tool_call>', []),
    ("hermes", "a <tool_cal", "a <tool_cal", []),
    ("llama3_json", '{"name": "get_weather", "parameters": {"city": "Paris", "unit": "celsius"}}; '
     '{"name": "add", "parameters": {"a": 1, "b": 2.5}}', None, BOTH),
    ("llama3_json", '<|python_tag|>{"name": "ping", "parameters": {}}', None, [("ping", {})]),
    ("llama3_json", 'Yes. <|python_tag|>{"name": "ping", "parameters": {}}', "Yes.", [("ping", {})]),
    ("llama3_json", '{"answer": 42}', '{"answer": 42}', []),
    ("llama3_json", "Hello {name}", "Hello {name}", []),
    ("llama3_json", "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    (
        "mistral",
        'So: [TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius"}}, '
        '{"name": "add", "arguments": {"a": 1, "b": 2.5}, "id": "abcdefghi"}]',
        "So:",
        BOTH,
    ),
    (
        "mistral",
        '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris", "unit": "celsius"}[TOOL_CALLS]add[CALL_ID]x1[ARGS]{"a": 1, "b": 2.5}',
        None,
        BOTH,
    ),
    ("mistral", '[TOOL_CALLS]ping{}', None, [("ping", {})]),
    ("mistral", "[TOOL_CALLS] is a tag", "[TOOL_CALLS] is a tag", []),
    ("mistral", "plain [TOOL", "plain [TOOL", []),
    ("pythonic", '[get_weather(city="Paris", unit=\'celsius\'), add(a=1, b=2.5)]', None, BOTH),
    ("pythonic", "[ping()]", None, [("ping", {})]),
    ("pythonic", '[a.b(x=[1, {"k": None}], y=-3, z=true)]', None, [("a.b", {"x": [1, {"k": None}], "y": -3, "z": True})]),
    ("pythonic", "[1, 2]", "[1, 2]", []),
    ("pythonic", "[f(g(1))]", "[f(g(1))]", []),
    ("pythonic", 'Text [f(x="a")]', 'Text [f(x="a")]', []),
    (
        "qwen3_coder",
        "I will.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=unit>\ncelsius\n"
        "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n"
        "<parameter=b>\n2.5\n</parameter>\n</function>\n</tool_call>",
        "I will.",
        BOTH,
    ),
    ("qwen3_coder", "<function=get_weather>\n<parameter=city>\n12\n</parameter>\n</function>", None,
     [("get_weather", {"city": "12"})]),
    ("qwen3_coder", "a < b and <function f", "a < b and <function f", []),
    ("checkpoint-json", 'Look.\n<tool_call>\n{"name": "ping", "arguments": {}}\n</tool_call>', "Look.", [("ping", {})]),
    (
        "checkpoint-xml",
        "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n2.5\n</parameter>\n</function>\n</tool_call>",
        None,
        [("add", SUM)],
    ),
    ("checkpoint-named", 'x<call:add>{"a": 1, "b": 2.5}</call>', "x", [("add", SUM)]),
]
