"""From what the user asked for to the text of a grammar that llguidance compiles.

Owns: the meaning of each kind of `StructuredOutputsParams`. Knows no tokenizer; nothing here is costly.
"""

from __future__ import annotations

import json
import re
from typing import Any

from quire.types.errors import ClientError
from quire.types.params import StructuredOutputsParams

MAX_LENGTH = 1 << 18  # characters of a grammar
# Between two tokens of JSON: what people write, one or two blanks, or a line end and indentation. Were it unbounded, a
# model that likes line ends would fill its answer with them.
WHITESPACE = r"(?: {1,2}|\r?\n[ \t]{0,32})"


def grammar_source(params: StructuredOutputsParams) -> str:
    """The grammar's text. Raises `ClientError` for what cannot be a grammar; what only its compilation shows is found
    there."""
    try:
        source = _source(params)
    except RecursionError:
        raise _error(params, "it is nested too deeply") from None
    except ValueError as e:
        raise _error(params, _first_line(e)) from e
    if len(source) > MAX_LENGTH:
        raise _error(params, f"it has {len(source)} characters, more than {MAX_LENGTH}")
    return source


def _source(params: StructuredOutputsParams) -> str:
    from llguidance import LLMatcher

    if params.json is not None or params.json_object:
        schema = {"type": "object"} if params.json is None else _schema(params)
        options: Any = {"coerce_one_of": True, "whitespace_pattern": params.whitespace_pattern or WHITESPACE}
        if params.disable_any_whitespace:
            options = {"coerce_one_of": True, "whitespace_flexible": False}
        return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)
    if params.regex is not None:
        return LLMatcher.grammar_from_regex(params.regex)
    if params.choice is not None:
        # One terminal, which the lexer tells apart without a parser's item for each of them.
        return LLMatcher.grammar_from_regex("|".join(_escaped(text) for text in params.choice))
    assert params.grammar is not None
    if "::=" in params.grammar:
        from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

        try:
            return any_to_lark(params.grammar)
        except GbnfToLarkError as e:
            raise ValueError(str(e)) from e
    return params.grammar


def kind(params: StructuredOutputsParams) -> str:
    """The field that holds the constraint."""
    kinds = ("json", "regex", "choice", "grammar", "json_object")
    return next(name for name in kinds if getattr(params, name) is not None)


def _error(params: StructuredOutputsParams, why: str) -> ClientError:
    return ClientError(f"structured_outputs.{kind(params)} cannot be used: {why}", "structured_outputs")


def _schema(params: StructuredOutputsParams) -> Any:
    schema = json.loads(params.json) if isinstance(params.json, str) else params.json
    if not isinstance(schema, dict | bool):
        raise ValueError("a JSON schema is an object")
    return _closed(schema) if params.disable_additional_properties else schema


def _closed(schema: Any) -> Any:
    """Every object of the schema without properties that it does not name."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    new = {key: _closed(value) for key, value in schema.items()}
    named = isinstance(schema.get("properties"), dict) or "patternProperties" in schema
    if schema.get("type") == "object" or (named and "type" not in schema):
        new.setdefault("additionalProperties", False)
    return new


def _escaped(text: str) -> str:
    return re.sub(r"[^\w\s]|[\n\r\t\f\v]", lambda m: _quoted(m.group()), text)


def _quoted(char: str) -> str:
    return f"\\x{{{ord(char):x}}}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
