"""Grammar text for calls written as JSON objects. Owns: where a tool's schema goes into it."""

from __future__ import annotations

import json
from collections.abc import Sequence

from quire.parsers.tools import Tool, function_of, literal, parameters_of


def arguments_rule(tool: Tool) -> str:
    """The body that matches a tool's arguments as JSON."""
    schema = parameters_of(tool)
    if isinstance(schema, dict):
        schema = {**schema, "x-guidance": {"coerce_one_of": True, "item_separator": ", ", "key_separator": ": "}}
        schema["x-guidance"]["whitespace_flexible"] = False
        if schema.get("type") == "object" and "additionalProperties" not in schema:
            schema["additionalProperties"] = False
    return f"%json {json.dumps(schema, ensure_ascii=False)}"


def json_calls(tools: Sequence[Tool], key: str, before: str, after: str) -> tuple[str, ...]:
    """A body for each tool: `before`, the object with the arguments under `key`, `after`."""
    bodies: list[str] = []
    for tool in tools:
        name = json.dumps(function_of(tool)["name"], ensure_ascii=False)
        head = literal(f'{{"name": {name}, "{key}": ')
        bodies.append(f'{before} {head} {arguments_rule(tool)} "}}" {after}'.strip())
    return tuple(bodies)
