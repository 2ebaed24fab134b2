"""`/v1/chat/completions`: the next message of a conversation.

Owns: the way from messages to a prompt, and from outputs to messages and their deltas. What is reasoning and what is a
tool call in the text is found by `talk`.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from quire.engine.chat import render_chat
from quire.server import logprobs
from quire.server.errors import ApiError
from quire.server.protocol import ChatRequest, Message
from quire.server.served import Run, Served
from quire.server.sse import EventStream, encode, frame
from quire.server.talk import Speech, Talk
from quire.types.errors import ClientError
from quire.types.outputs import CompletionOutput, RequestOutput


async def chat(served: Served, body: ChatRequest, request: Request) -> Response:
    """Raises `ApiError`, `ClientError`, `EngineError`."""
    model = served.check_text(body.model)
    prompt = await render(served, body)
    most = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    params = body.params(served.defaults, _logprobs(body), most)
    speech = Speech(served, body, prompt)
    speech.demand(params)
    prompts: list[Any] = [{"prompt": prompt, "cache_salt": body.cache_salt} if body.cache_salt else prompt]
    drafts = await served.prepare(prompts, params, body.add_special_tokens)
    talks = [speech.talk() for _ in range(params.n)]
    id = served.request_id("chatcmpl", body.request_id, request.headers.get("x-request-id"))
    run = Run(served, id, drafts, body.priority)
    answer = _Answer(served, body, run, model, talks, speech.named)
    if body.stream:
        return EventStream(run, answer.frames())
    (output,) = await run.whole(request.receive)
    return Response(encode(answer.whole(output)), media_type="application/json", headers={"x-request-id": id})


async def render(served: Served, body: Any) -> str:
    """The prompt of a conversation."""
    if body.chat_template is not None and not served.args.trust_request_chat_template:
        text = "chat_template in a request is not allowed here: start the server with --trust-request-chat-template"
        raise ApiError(400, text, "invalid_value", "chat_template")
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    if getattr(body, "tool_choice", None) == "none" and served.args.exclude_tools_when_tool_choice_none:
        tools = []
    kwargs = {**served.args.default_chat_template_kwargs, **(body.chat_template_kwargs or {})}
    if (effort := getattr(body, "reasoning_effort", None)) is not None:
        kwargs.setdefault("reasoning_effort", effort)
    tokenizer = served.tokenizer

    def work() -> str:
        return render_chat(
            tokenizer,
            [_plain(message) for message in body.messages],
            chat_template=body.chat_template or served.config.model.chat_template,
            content_format=served.args.chat_template_content_format,
            add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
            continue_final_message=body.continue_final_message,
            tools=tools or None,
            template_kwargs=kwargs,
        )

    return await served.engine.call(work, sum(_size(message.content) for message in body.messages))


def _size(content: Any) -> int:
    """About how many characters a message has."""
    return 100 + (len(content) if isinstance(content, str) else 1000 * len(content or ()))


def _plain(message: Message) -> dict[str, Any]:
    found = message.model_dump(exclude_unset=True)
    if found.get("tool_calls") is None:
        found.pop("tool_calls", None)
    return found


def _logprobs(body: ChatRequest) -> int | None:
    if not body.logprobs:
        if body.top_logprobs:
            raise ClientError("top_logprobs needs logprobs=true", "top_logprobs", body.top_logprobs)
        return None
    if body.logprob_token_ids is not None and body.top_logprobs is None:
        return None  # these are shown, instead of the likeliest
    top = body.top_logprobs or 0
    if top < 0:
        raise ClientError("top_logprobs must be at least 0", "top_logprobs", top)
    return top


class _Answer:
    """The choices of one body, as outputs come in."""

    def __init__(self, served: Served, body: ChatRequest, run: Run, model: str, talks: list[Talk], named: bool) -> None:
        self._body, self._run, self._talks, self._named = body, run, talks, named
        self._role = served.args.response_role
        self._as_id = bool(body.return_tokens_as_token_ids)
        self._head = {"id": run.id, "created": int(time.time()), "model": model}
        self._begun = [False] * len(talks)
        last = body.messages[-1]
        same = bool(body.echo) and last.role == self._role and isinstance(last.content, str)
        self._echo = last.content if same else ""

    def whole(self, output: RequestOutput) -> dict[str, Any]:
        choices = [self._choice(one) for one in output.outputs]
        answer = {**self._head, "object": "chat.completion", "choices": choices, "usage": self._run.usage()}
        if self._body.prompt_logprobs is not None:
            answer["prompt_logprobs"] = logprobs.prompt(output.prompt_logprobs)
        if self._body.return_token_ids:
            answer["prompt_token_ids"] = output.prompt_token_ids
        return answer

    def _choice(self, one: CompletionOutput) -> dict[str, Any]:
        parts = self._talks[one.index].feed(one.text, last=True)
        content = f"{self._echo}{parts.content}"
        message: dict[str, Any] = {"role": self._role, "content": content, "refusal": None}
        if parts.calls:
            message["content"] = content or None
            message["tool_calls"] = [{k: v for k, v in call.items() if k != "index"} for call in _merged(parts.calls)]
        if parts.reasoning:
            message["reasoning"] = parts.reasoning
        choice: dict[str, Any] = {
            "index": one.index,
            "message": message,
            "logprobs": self._lines(one),
            "finish_reason": self._reason(one),
            "stop_reason": one.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = one.token_ids
        return choice

    def _reason(self, one: CompletionOutput) -> str | None:
        called = self._talks[one.index].called and not self._named
        return "tool_calls" if called and one.finish_reason == "stop" else one.finish_reason

    def _lines(self, one: CompletionOutput) -> dict[str, Any] | None:
        if one.logprobs is None:
            return None
        named = self._body.logprob_token_ids
        top = len(named) if named is not None else self._body.top_logprobs or 0
        return logprobs.chat(one.logprobs, one.token_ids, top, self._as_id)

    async def frames(self) -> AsyncGenerator[bytes]:
        options = self._body.stream_options
        usage = bool(options and options.include_usage)
        each = usage and bool(options and options.continuous_usage_stats)
        head = {**self._head, "object": "chat.completion.chunk"}
        tail = {"usage": None} if usage else {}
        async for batch in self._run.outputs():
            frames: list[bytes] = []
            for _, output in batch:
                for one in output.outputs:
                    if (choice := self._delta(one)) is not None:
                        more = {"usage": self._run.usage()} if each else tail
                        frames.append(frame({**head, "choices": [choice], **more}))
            if frames:
                yield b"".join(frames)
        if usage:
            yield frame({**head, "choices": [], "usage": self._run.usage()})

    def _delta(self, one: CompletionOutput) -> dict[str, Any] | None:
        """The choice of a frame; None where the text is held back and there is nothing to tell yet."""
        ended = one.finish_reason is not None
        parts = self._talks[one.index].feed(one.text, ended)
        delta: dict[str, Any] = {}
        if not self._begun[one.index]:  # the role comes with the first token: an empty frame would lie about its time
            self._begun[one.index] = True
            delta = {"role": self._role}
            parts.content = f"{self._echo}{parts.content}"
        if parts.reasoning:
            delta["reasoning"] = parts.reasoning
        if parts.calls:
            delta["tool_calls"] = parts.calls
        if parts.content or not (parts.reasoning or parts.calls):
            delta["content"] = parts.content
        lines = self._lines(one)
        told = ended or parts.content or parts.reasoning or parts.calls or "role" in delta or lines
        if not told and not self._body.return_token_ids:
            return None
        choice: dict[str, Any] = {
            "index": one.index,
            "delta": delta,
            "logprobs": lines,
            "finish_reason": self._reason(one),
        }
        if one.finish_reason is not None:
            choice["stop_reason"] = one.stop_reason
        if self._body.return_token_ids:
            choice["token_ids"] = one.token_ids
        return choice


def _merged(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Deltas of whole calls as calls."""
    out: dict[int, dict[str, Any]] = {}
    for call in calls:
        if call["index"] in out:
            out[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        else:
            out[call["index"]] = call
    return list(out.values())
