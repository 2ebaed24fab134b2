"""`/v1/completions`, and the plain `/generate`: text that continues a prompt.

Owns: how a body's prompts, samples and echoes become choices, whole and streaming.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from quire.server import logprobs
from quire.server.protocol import MAX_SEQUENCES, CompletionRequest, GenerateRequest
from quire.server.served import Run, Served
from quire.server.sse import LINES, EventStream, encode, frame
from quire.types.errors import ClientError
from quire.types.outputs import CompletionOutput, RequestOutput
from quire.types.params import SamplingParams


async def complete(served: Served, body: CompletionRequest, request: Request) -> Response:
    """Raises `ApiError`, `ClientError`, `EngineError`."""
    model = served.check_text(body.model)
    prompts = _prompts(body)
    params = _params(served, body)
    if len(prompts) * params.n > MAX_SEQUENCES:
        text = f"{len(prompts)} prompts and n={params.n} are more than {MAX_SEQUENCES} texts: make several requests"
        raise ClientError(text, "n", params.n)
    drafts = await served.prepare(prompts, params, body.add_special_tokens)
    id = served.request_id("cmpl", body.request_id, request.headers.get("x-request-id"))
    run = Run(served, id, drafts, body.priority)
    answer = _Answer(served, body, params, run, model)
    if body.stream:
        return EventStream(run, answer.frames())
    outputs = await run.whole(request.receive)
    return Response(encode(answer.whole(outputs)), media_type="application/json", headers={"x-request-id": id})


def _prompts(body: CompletionRequest) -> list[Any]:
    if body.suffix:
        raise ClientError("suffix is not supported: quire's models continue a text, they do not fill in", "suffix")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise ClientError("best_of is not supported: ask for n choices and choose among them", "best_of")
    prompt: Any = body.prompt
    many = isinstance(prompt, list) and not (prompt and isinstance(prompt[0], int))
    prompts: list[Any] = prompt if many else [prompt]
    if not prompts:
        raise ClientError("prompt is empty: give text, token ids, or a list of either", "prompt")
    if body.cache_salt is None:
        return prompts
    return [{"prompt" if isinstance(p, str) else "prompt_token_ids": p, "cache_salt": body.cache_salt} for p in prompts]


def _params(served: Served, body: CompletionRequest) -> SamplingParams:
    if body.logprobs is not None and body.logprobs < 0:
        raise ClientError("logprobs must be at least 0", "logprobs", body.logprobs)
    most = body.max_tokens
    if body.echo and most == 0:
        most = 1  # the engine makes at least one; it is not shown
    params = body.params(served.defaults, body.logprobs, most)
    if body.echo and body.logprobs is not None and params.prompt_logprobs is None:
        params.prompt_logprobs = body.logprobs
    return params


class _Answer:
    """The choices of one body, as outputs come in."""

    def __init__(self, served: Served, body: CompletionRequest, params: SamplingParams, run: Run, model: str) -> None:
        self._served, self._body, self._run = served, body, run
        self._n = params.n
        self._as_id = bool(body.return_tokens_as_token_ids)
        self._only_prompt = bool(body.echo) and body.max_tokens == 0
        self._offsets: dict[int, int] = {}  # by choice
        self._prompt_lines: dict[int, Any] = {}  # a stream has them once, and each sample shows them
        self._echoed: set[int] = set()
        self._head = {"id": run.id, "object": "text_completion", "created": int(time.time()), "model": model}

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        choices = [self._choice(i, output, one) for i, output in enumerate(outputs) for one in output.outputs]
        if self._only_prompt:
            self._run.completion_tokens = 0
        return {**self._head, "choices": choices, "usage": self._run.usage()}

    async def frames(self) -> AsyncGenerator[bytes]:
        options = self._body.stream_options
        usage = bool(options and options.include_usage)
        each = usage and bool(options and options.continuous_usage_stats)
        tail = {"usage": None} if usage else {}
        async for batch in self._run.outputs():
            frames: list[bytes] = []
            for i, output in batch:
                for one in output.outputs:
                    choice = self._choice(i, output, one)
                    more = {"usage": self._run.usage()} if each else tail
                    frames.append(frame({**self._head, "choices": [choice], **more}))
            yield b"".join(frames)
        if usage:
            if self._only_prompt:
                self._run.completion_tokens = 0
            yield frame({**self._head, "choices": [], "usage": self._run.usage()})

    def _choice(self, prompt: int, output: RequestOutput, one: CompletionOutput) -> dict[str, Any]:
        index = prompt * self._n + one.index
        body, text, tokens = self._body, one.text, one.token_ids
        lines: list[Any] | None = None if one.logprobs is None else list(one.logprobs)
        if self._only_prompt:
            text, tokens, lines = "", [], None if lines is None else []
        if body.echo and index not in self._echoed:
            self._echoed.add(index)
            text = self._prompt_text(prompt) + text
            if output.prompt_logprobs is not None:
                self._prompt_lines[prompt] = output.prompt_logprobs
            if lines is not None and prompt in self._prompt_lines:
                lines = [*self._prompt_lines[prompt], *lines]
                tokens = [*output.prompt_token_ids, *tokens]
        choice: dict[str, Any] = {"index": index, "text": text, "logprobs": None, "finish_reason": one.finish_reason}
        if lines is not None:
            shown = body.logprobs if body.logprob_token_ids is None else len(body.logprob_token_ids)
            choice["logprobs"], self._offsets[index] = logprobs.completion(
                lines, tokens, self._offsets.get(index, 0), shown or 0, self._as_id, self._name
            )
        if one.finish_reason is not None:
            choice["stop_reason"] = one.stop_reason
            if self._only_prompt:
                choice["finish_reason"] = "length"
        if body.prompt_logprobs is not None and output.prompt_logprobs is not None:
            choice["prompt_logprobs"] = logprobs.prompt(output.prompt_logprobs)
        if body.return_token_ids:
            choice["token_ids"] = one.token_ids
            choice["prompt_token_ids"] = output.prompt_token_ids
        return choice

    def _name(self, token: int) -> str:
        return self._served.tokenizer.decode([token], False)

    def _prompt_text(self, prompt: int) -> str:
        draft = self._run.drafts[prompt]
        return draft.text if draft.text is not None else self._served.tokenizer.decode(draft.tokens)


async def generate(served: Served, body: GenerateRequest, request: Request) -> Response:
    """vLLM's demo server: `{"text": [prompt + output, ...]}`, streaming as one JSON object a line."""
    served.check_text(None)
    params = body.params(served.defaults, None, 16 if body.max_tokens is None else body.max_tokens)
    drafts = await served.prepare([body.prompt], params)
    run = Run(served, served.request_id("gen", None, request.headers.get("x-request-id")), drafts, body.priority)
    if body.stream:
        return EventStream(run, _lines(run, body.prompt, params.n), LINES)
    (output,) = await run.whole(request.receive)
    return Response(encode({"text": [body.prompt + one.text for one in output.outputs]}), media_type="application/json")


async def _lines(run: Run, prompt: str, n: int) -> AsyncGenerator[bytes]:
    texts = [prompt] * n
    async for batch in run.outputs():
        for _, output in batch:
            for one in output.outputs:
                texts[one.index] += one.text
        yield encode({"text": texts}) + b"\n"
