"""`/v1/embeddings`, `/pooling`, `/classify`, `/score` and `/rerank`: prompts in, vectors and scores out.

Owns: how bodies become prompts, and how vectors are written. Pairs and their scores are `engine.scoring`'s.
"""

from __future__ import annotations

import base64
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from quire.engine.scoring import Plan as ScorePlan
from quire.engine.scoring import texts_of
from quire.server.chat import render
from quire.server.errors import ApiError
from quire.server.protocol_pooling import (
    ClassifyRequest,
    EmbeddingRequest,
    Encoding,
    Inputs,
    PoolingRequest,
    RerankRequest,
    ScoreRequest,
    Scoring,
)
from quire.server.served import Run, Served
from quire.server.sse import encode
from quire.types.errors import ClientError
from quire.types.outputs import PoolingOutput, PoolingRequestOutput
from quire.types.pooling import CLASSIFY, EMBED, TOKEN_CLASSIFY, TOKEN_EMBED, PoolingParams

Vector = PoolingRequestOutput[PoolingOutput]
_PAIRS = (("text_1", "text_2"), ("data_1", "data_2"), ("queries", "documents"), ("queries", "items"))


async def embeddings(served: Served, body: EmbeddingRequest, request: Request) -> Response:
    """Raises `ApiError`, `ClientError`, `EngineError`, as all of these."""
    _check(served, body.model, EMBED)
    run, outputs = await _pool(served, body, body.params(EMBED, body.dimensions), "embd", request)
    data = [
        {"index": i, "object": "embedding", "embedding": _written(output.outputs.data, body)}
        for i, output in enumerate(outputs)
    ]
    return _answer(served, run, body.model, data)


async def pooling(served: Served, body: PoolingRequest, request: Request) -> Response:
    tasks = _check(served, body.model, None)
    each_token = (task for task in (TOKEN_EMBED, TOKEN_CLASSIFY) if task in tasks)
    task = body.task or next(each_token, tasks[0])
    run, outputs = await _pool(served, body, body.params(task, body.dimensions), "pool", request)
    data = [
        {"index": i, "object": "pooling", "data": _written(output.outputs.data, body)}
        for i, output in enumerate(outputs)
    ]
    return _answer(served, run, body.model, data)


async def classify(served: Served, body: ClassifyRequest, request: Request) -> Response:
    _check(served, body.model, CLASSIFY)
    run, outputs = await _pool(served, body, body.params(CLASSIFY), "classify", request)
    assert served.config.pooling is not None
    labels = served.config.pooling.labels
    data = []
    for i, output in enumerate(outputs):
        probs = output.outputs.data
        best = labels[int(probs.argmax())]
        data.append({"index": i, "label": best, "probs": probs.tolist(), "num_classes": len(probs)})
    return _answer(served, run, body.model, data)


async def score(served: Served, body: ScoreRequest, request: Request) -> Response:
    given = [(a, b) for a, b in _PAIRS if getattr(body, a) is not None and getattr(body, b) is not None]
    if len(given) != 1:
        text = "give pairs of texts, under one pair of names: " + ", ".join(f"{a} and {b}" for a, b in _PAIRS)
        raise ClientError(text, given[1][1] if given else "text_1")
    first, second = (_plain(getattr(body, name)) for name in given[0])
    run, scores = await _scores(served, body, first, second, given[0], "score", request)
    data = [{"index": i, "object": "score", "score": value} for i, (_, value) in enumerate(scores)]
    return _answer(served, run, body.model, data)


async def rerank(served: Served, body: RerankRequest, request: Request) -> Response:
    query, documents = _plain(body.query), _plain(body.documents)
    run, scores = await _scores(served, body, query, documents, ("query", "documents"), "rerank", request)
    texts = texts_of(documents, "documents")
    order = sorted(range(len(texts)), key=lambda i: -scores[i][1])[: body.top_n or None]
    results: list[dict[str, Any]] = [{"index": i, "relevance_score": scores[i][1]} for i in order]
    if body.return_documents is not False:
        for result in results:
            result["document"] = {"text": texts[result["index"]]}
    model = served.check_model(body.model)
    answer = {"id": run.id, "model": model, "usage": run.usage(), "results": results}
    return Response(encode(answer), media_type="application/json", headers={"x-request-id": run.id})


def _check(served: Served, model: str | None, task: str | None) -> tuple[str, ...]:
    """The tasks of the model. Raises `ApiError` where it is not served here, or has not this one."""
    name, known = served.check_model(model), served.config.pooling
    if known is None:
        text = f"the model {name!r} generates text; a server started with --runner pooling embeds with it"
        raise ApiError(400, text, "unsupported_task", "model")
    if task is not None and task not in known.tasks:
        raise ApiError(400, f"the model {name!r} has {', '.join(known.tasks)}, not {task}", "unsupported_task", "model")
    return known.tasks


async def _pool(
    served: Served, body: Inputs, params: PoolingParams, prefix: str, request: Request
) -> tuple[Run[Vector], list[Vector]]:
    if (body.input is None) == (body.messages is None):
        raise ClientError("give input or messages, and one of them only", "input")
    if body.messages is not None:
        prompts: list[Any] = [await render(served, body)]
        special = bool(body.add_special_tokens)
    else:
        prompts = _prompts(body.input)
        special = body.add_special_tokens is not False
    if body.cache_salt is not None:
        prompts = [_salted(prompt, body.cache_salt) for prompt in prompts]
    return await _run(served, body, prompts, params, special, prefix, request)


def _prompts(given: Any) -> list[Any]:
    many = isinstance(given, list) and not (given and isinstance(given[0], int))
    prompts: list[Any] = given if many else [given]
    if not prompts:
        raise ClientError("input is empty: give text, token ids, or a list of either", "input")
    return prompts


def _salted(prompt: Any, salt: str) -> dict[str, Any]:
    if isinstance(prompt, dict):
        return {**prompt, "cache_salt": salt}
    return {"prompt" if isinstance(prompt, str) else "prompt_token_ids": prompt, "cache_salt": salt}


async def _run(
    served: Served, body: Any, prompts: list[Any], params: PoolingParams, special: bool, prefix: str, request: Request
) -> tuple[Run[Vector], list[Vector]]:
    drafts = await served.prepare(prompts, params, special)
    run = Run[Vector](
        served,
        served.request_id(prefix, body.request_id, request.headers.get("x-request-id")),
        drafts,
        body.priority,
    )
    return run, await run.whole(request.receive)


async def _scores(
    served: Served, body: Scoring, first: Any, second: Any, names: tuple[str, str], prefix: str, request: Request
) -> tuple[Run[Vector], list[tuple[Vector, float]]]:
    _check(served, body.model, None)
    kwargs = {**served.args.default_chat_template_kwargs, **(body.chat_template_kwargs or {})}
    if body.instruction is not None:
        kwargs["instruction"] = body.instruction
    size = _size(served, texts_of(first, names[0]), texts_of(second, names[1]))
    plan = await served.engine.call(
        partial(
            ScorePlan,
            served.config,
            served.tokenizer,
            first,
            second,
            body.params(None),
            served.config.model.chat_template,
            (body.max_tokens_per_query, body.max_tokens_per_doc),
            kwargs,
        ),
        size,
    )
    prompts = plan.prompts
    if body.cache_salt is not None:
        prompts = [_salted(prompt, body.cache_salt) for prompt in prompts]
    run, outputs = await _run(served, body, prompts, plan.params, plan.add_special_tokens, prefix, request)
    return run, plan.scores(outputs)


def _size(served: Served, first: list[str], second: list[str]) -> int:
    """Characters to tokenize. Raises `ClientError` where a text that is in each pair makes a small body much work."""
    pooling = served.config.pooling
    times = len(second) if len(first) == 1 and pooling is not None and pooling.scores_pairs else 1
    size = times * sum(map(len, first)) + sum(map(len, second))
    most = 2 * int(served.args.max_request_bytes)
    if size > most:
        text = f"the {len(second)} pairs, each with the first text, have {size} characters together, more than {most}"
        raise ClientError(f"{text}: send fewer texts at a time, or a shorter first one", "data_2", len(second))
    return size


def _plain(given: Any) -> Any:
    """Texts as `scoring` takes them."""
    if isinstance(given, list):
        return [_plain(item) for item in given]
    return given if isinstance(given, str) else given.model_dump(exclude_none=True)


def _written(vectors: NDArray[np.float32], body: Encoding) -> Any:
    if body.encoding_format == "float":
        return vectors.tolist()
    order = sys.byteorder if body.endianness == "native" else body.endianness
    sign = "<" if order == "little" else ">"
    match body.embed_dtype:
        case "float32":
            data = vectors.astype(f"{sign}f4")
        case "float16":
            data = vectors.astype(f"{sign}f2")
        case _:
            data = _bfloat16(vectors).astype(f"{sign}u2")
    return base64.b64encode(data.tobytes()).decode()


def _bfloat16(vectors: NDArray[np.float32]) -> NDArray[np.uint32]:
    """The upper halves of the numbers, rounded to the nearest, ties to even."""
    bits = np.ascontiguousarray(vectors, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16).astype(np.uint32)


def _answer(served: Served, run: Run[Any], model: str | None, data: Sequence[Any]) -> Response:
    name = served.check_model(model)
    answer = {
        "id": run.id,
        "object": "list",
        "created": int(time.time()),
        "model": name,
        "data": data,
        "usage": run.usage(),
    }
    return Response(encode(answer), media_type="application/json", headers={"x-request-id": run.id})
