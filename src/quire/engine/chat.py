"""Conversations to prompts: Jinja chat templates.

Owns: choosing and rendering the template (in a sandbox: templates come with checkpoints, which need not be trusted) and
the forms of a message's content. Knows no requests; the rendered text is tokenized by the input processor, without
adding special tokens again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from quire.engine.tokenizer import Tokenizer
from quire.types.errors import ClientError

Message = Mapping[str, Any]
_MARK = "\ue000quire-continue\ue000 "  # the space tells whether the template strips contents
_FORMATS = ("auto", "string", "openai")
_TEXT_PARTS = dict(text="text", input_text="text", output_text="text", refusal="refusal", thinking="thinking")


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    chat_template: str | None = None,
    content_format: str = "auto",
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: Sequence[Mapping[str, Any] | Callable[..., Any]] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The conversation as text.

    `chat_template`: Jinja source, or the path of a file that holds it; None: the tokenizer's own. `content_format`:
    "string" joins text parts, "openai" passes a list of parts, "auto" looks at the template.
    Raises ClientError for messages or templates that do not work.
    """
    if continue_final_message and add_generation_prompt:
        text = "continue_final_message=True needs add_generation_prompt=False: it continues a message, that begins one"
        raise ClientError(text, "continue_final_message", True)
    if content_format not in _FORMATS:
        text = f"chat_template_content_format must be one of {', '.join(_FORMATS)}, got {content_format!r}"
        raise ClientError(text, "chat_template_content_format", content_format)
    source = _choose(tokenizer, chat_template, tools is not None)
    parts = content_format == "openai" or (content_format == "auto" and _iterates_content(source))
    conversation = [_message(m, parts) for m in messages]
    if not conversation:
        raise ClientError("the conversation has no messages", "messages", messages)
    if continue_final_message:
        _mark_end(conversation[-1])
    import jinja2

    template = _compile(source)
    try:
        text = template.render(
            **tokenizer.special_tokens
            | {"messages": conversation, "tools": None if tools is None else [_schema(t) for t in tools]}
            | {"documents": None, "add_generation_prompt": add_generation_prompt}
            | dict(template_kwargs or {})
        )
    except jinja2.TemplateError as e:
        raise ClientError(f"the chat template refused the conversation: {e}", "messages") from e
    except (TypeError, KeyError, ValueError, AttributeError) as e:
        raise ClientError(f"the chat template failed: {type(e).__name__}: {e}", "chat_template") from e
    return _continued(text) if continue_final_message else text


def load_template(template: str) -> str:
    """The source of a template given as such or as the path of a file. A source has braces or line ends, a path not."""
    if any(c in template for c in "{}\n"):
        return template
    try:
        return Path(template).expanduser().read_text(encoding="utf-8")
    except OSError as e:
        text = f"chat_template {template!r} is neither a Jinja template nor a readable file ({e.strerror})"
        raise ClientError(text, "chat_template", template) from e


def _choose(tokenizer: Tokenizer, given: str | None, tools: bool) -> str:
    own = tokenizer.chat_templates
    if given is not None:
        return own[given] if given in own else load_template(given)
    if tools and "tool_use" in own:
        return own["tool_use"]
    if "default" in own:
        return own["default"]
    if own:
        names = ", ".join(sorted(own))
        raise ClientError(f"the tokenizer has no default chat template; give chat_template= one of {names}")
    raise ClientError("the tokenizer has no chat template; give chat_template= (source or file)", "chat_template")


def _message(message: Any, parts: bool) -> dict[str, Any]:
    """A copy of a message with its content as one string, or as a list of parts."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ClientError(f"a message must be a dict with 'role' and 'content', got {message!r}", "messages", message)
    out: dict[str, Any] = dict(message)
    content = out.get("content")
    if content is None:
        if not (out.get("tool_calls") or out["role"] == "assistant"):
            raise ClientError(f"a message of role {out['role']!r} needs 'content'", "messages", message)
        out["content"] = [] if parts else ""
    elif isinstance(content, str):
        out["content"] = [{"type": "text", "text": content}] if parts else content
    else:
        texts = [_part(part) for part in content]
        out["content"] = [{"type": "text", "text": t} for t in texts] if parts else "\n".join(texts)
    if out.get("tool_calls"):
        out["tool_calls"] = [_tool_call(call) for call in out["tool_calls"]]
    return out


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    if not isinstance(kind, str):
        raise ClientError("the type of a content part must be a string", "messages", part)
    key = _TEXT_PARTS.get(kind)
    if key is None:
        raise ClientError(f"content of type {kind!r} is not supported yet; only text is", "messages", part)
    if not isinstance(part.get(key), str):
        raise ClientError(f"a content part of type {kind!r} needs a string {key!r}", "messages", part)
    return part[key]


def _tool_call(call: Any) -> Any:
    """Templates want a call's arguments as an object; OpenAI's clients send them as a JSON string."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError as e:
        raise ClientError(f"the arguments of a tool call are not valid JSON: {e}", "messages", call) from e
    return {**call, "function": {**function, "arguments": arguments}}


def _schema(tool: Any) -> Any:
    """A tool's description; one given as a function is described from its signature and docstring."""
    if isinstance(tool, Mapping):
        return dict(tool)
    from transformers.utils.chat_template_utils import get_json_schema

    return get_json_schema(tool)


def _mark_end(message: dict[str, Any]) -> None:
    content = message["content"]
    if isinstance(content, str):
        message["content"] = content + _MARK
    elif content:
        content[-1]["text"] += _MARK
    else:
        raise ClientError("continue_final_message=True needs a final message with content", "continue_final_message")


def _continued(text: str) -> str:
    """What was rendered up to the end of the final message's content."""
    at = text.rfind(_MARK.strip())
    if at < 0:
        text = "continue_final_message=True: the chat template does not show the final message's content"
        raise ClientError(text, "continue_final_message", True)
    return text[:at] if text.startswith(_MARK, at) else text[:at].rstrip()


@lru_cache(maxsize=16)
def _compile(source: str) -> Any:
    """A template with what Transformers gives templates: loop controls, `generation` blocks, `tojson` that leaves
    characters as they are, `raise_exception`, `strftime_now`."""
    import jinja2

    try:
        return _environment().from_string(source)
    except jinja2.TemplateSyntaxError as e:
        raise ClientError(f"chat template: syntax error in line {e.lineno}: {e.message}", "chat_template") from e


def _environment() -> Any:
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what the assistant wrote, for training; here it is only its contents."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


@lru_cache(maxsize=16)
def _iterates_content(source: str) -> bool:
    """Whether a template loops over a message's content (or a name set to it), so expects a list of parts."""
    import jinja2
    from jinja2 import nodes

    def is_content(node: Any) -> bool:
        if isinstance(node, nodes.Getattr):
            return node.attr == "content"
        if isinstance(node, nodes.Getitem):
            return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
        return isinstance(node, nodes.Filter) and is_content(node.node)

    try:
        tree = _environment().parse(source)
    except jinja2.TemplateSyntaxError:
        return False  # compiling it gives the error its place
    assigned = [a for a in tree.find_all(nodes.Assign) if is_content(a.node) and isinstance(a.target, nodes.Name)]
    names = {a.target.name for a in assigned if isinstance(a.target, nodes.Name)}
    loops = [loop.iter for loop in tree.find_all(nodes.For)]
    return any(is_content(i) or (isinstance(i, nodes.Name) and i.name in names) for i in loops)
