"""The application: routes, and what their documents say.

Owns: which function answers which path, and that every error has OpenAI's shape.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from quire.server import live, page, pooling, protocol
from quire.server import protocol_pooling as pooled
from quire.server.chat import chat, render
from quire.server.completions import complete, generate
from quire.server.errors import ApiError, api_error
from quire.server.guard import Guard
from quire.server.protocol import (
    ChatRequest,
    ChatResponse,
    CompletionRequest,
    CompletionResponse,
    DetokenizeRequest,
    DetokenizeResponse,
    ErrorResponse,
    GenerateRequest,
    GenerateResponse,
    Health,
    Load,
    ModelCard,
    ModelList,
    TokenizeRequest,
    TokenizeResponse,
    Version,
)
from quire.server.served import Served
from quire.server.sse import EVENTS, LINES
from quire.types.errors import ClientError, QuireError
from quire.utils.logging import fields
from quire.utils.version import VERSION

log = logging.getLogger(__name__)

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorResponse, "description": "The request cannot be answered as it is"},
    "5XX": {"model": ErrorResponse, "description": "The server cannot answer, now or at all"},
}
EVENT: dict[str, Any] = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string", "description": "A part of the answer as JSON, an error, or [DONE]"}},
}


def streaming(model: type, media_type: str, item: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    stream = {media_type: {"schema": item}}
    return {**ERRORS, 200: {"model": model, "content": stream, "description": "The answer, whole or in parts"}}


def build(served: Served) -> Any:
    """The ASGI application of a server."""
    docs = not served.args.disable_fastapi_docs
    app = FastAPI(
        title="quire",
        version=VERSION,
        description="OpenAI's interface, with vLLM's additions.",
        openapi_url="/openapi.json" if docs else None,
        docs_url="/docs" if docs else None,
        redoc_url=None,
        root_path=served.args.root_path,
    )
    app.router.route_class = _Route
    _errors(app)
    _generation(app, served)
    _pooling(app, served)
    _models(app, served)
    _operation(app, served)
    if not served.args.disable_ui:
        page.routes(app, ERRORS)
        live.routes(app, served, ERRORS)
    guarded: Any = Guard(app, served)
    if served.args.allowed_origins:
        guarded = CORSMiddleware(
            guarded,
            allow_origins=served.args.allowed_origins,
            allow_methods=served.args.allowed_methods or ["*"],
            allow_headers=served.args.allowed_headers or ["*"],
            allow_credentials=served.args.allow_credentials,
        )
    return guarded


class _Request(Request):
    async def json(self) -> Any:
        """The body, by a parser that is stricter than Python's: no NaN, no half of a surrogate pair (which could be
        passed on to nobody), no nesting without end."""
        body = await self.body()
        enabled = gc.isenabled()
        gc.disable()  # nothing made here is garbage, and looking for some takes most of the time of lists in lists
        try:
            return msgspec.json.decode(body)
        except (msgspec.DecodeError, RecursionError) as error:
            raise ApiError(400, f"the body is not JSON: {error}", "invalid_json") from error
        finally:
            if enabled:
                gc.enable()


class _Route(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handle(_Request(request.scope, request.receive))

        return strict


def _errors(app: FastAPI) -> None:
    async def known(request: Request, error: Exception) -> Response:
        found = api_error(error)
        if found.status >= 500:
            id = request.headers.get("x-request-id")
            log.error("request %s: %s", id, found.message, extra=fields(request_id=id))
        return JSONResponse(found.body, found.status, found.headers)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = _telling(error.errors())
        if isinstance(error.body, bytes):
            text = "the body must be JSON and say so: send Content-Type: application/json"
            return await known(request, ApiError(400, text, "invalid_content_type"))
        where = ".".join(str(part) for part in first["loc"] if part != "body" and "[" not in str(part))
        text = f"{where}: {first['msg']}" if where else first["msg"]
        return await known(request, ApiError(400, text, "invalid_value", where.split(".")[0] or None))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if isinstance(error.__cause__, ApiError):  # from reading the body
            return await known(request, error.__cause__)
        text = f"{request.method} {request.url.path}: {error.detail}"
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        found = ApiError(error.status_code, text, code)
        return JSONResponse(found.body, found.status, {**found.headers, **(error.headers or {})})

    async def unknown(request: Request, error: Exception) -> Response:
        id = request.headers.get("x-request-id")
        log.error("request %s failed", id, exc_info=error, extra=fields(request_id=id))
        found = api_error(error)
        return JSONResponse(found.body, found.status)

    app.add_exception_handler(ApiError, known)
    app.add_exception_handler(QuireError, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unknown)


def _generation(app: FastAPI, served: Served) -> None:
    @app.post("/v1/completions", responses=streaming(CompletionResponse, EVENTS, EVENT), response_class=Response)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue one or more prompts."""
        return await complete(served, body, request)

    @app.post("/v1/chat/completions", responses=streaming(ChatResponse, EVENTS, EVENT), response_class=Response)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Write the next message of a conversation."""
        return await chat(served, body, request)

    @app.post("/generate", responses=streaming(GenerateResponse, LINES, {"type": "string"}), response_class=Response)
    async def plain(body: GenerateRequest, request: Request) -> Response:
        """Continue a prompt: the plain interface."""
        return await generate(served, body, request)


def _pooling(app: FastAPI, served: Served) -> None:
    def answers(model: type) -> dict[int | str, dict[str, Any]]:
        return {**ERRORS, 200: {"model": model, "description": "The answer"}}

    def post(path: str, model: type) -> Any:
        name = path.strip("/").replace("/", "_")
        return app.post(path, responses=answers(model), response_class=Response, operation_id=name)

    @post("/v1/embeddings", pooled.EmbeddingResponse)
    async def embeddings(body: pooled.EmbeddingRequest, request: Request) -> Response:
        """A vector of each text."""
        return await pooling.embeddings(served, body, request)

    @post("/pooling", pooled.PoolingResponse)
    async def pool(body: pooled.PoolingRequest, request: Request) -> Response:
        """What the model makes of each text, or of each of its tokens."""
        return await pooling.pooling(served, body, request)

    @post("/classify", pooled.ClassifyResponse)
    async def classify(body: pooled.ClassifyRequest, request: Request) -> Response:
        """The class of each text, with the probabilities of all."""
        return await pooling.classify(served, body, request)

    @post("/score", pooled.ScoreResponse)
    @post("/v1/score", pooled.ScoreResponse)
    async def score(body: pooled.ScoreRequest, request: Request) -> Response:
        """How well the texts of each pair belong together."""
        return await pooling.score(served, body, request)

    @post("/rerank", pooled.RerankResponse)
    @post("/v1/rerank", pooled.RerankResponse)
    @post("/v2/rerank", pooled.RerankResponse)
    async def rerank(body: pooled.RerankRequest, request: Request) -> Response:
        """Documents in the order in which they answer a query."""
        return await pooling.rerank(served, body, request)


def _models(app: FastAPI, served: Served) -> None:
    def card(name: str) -> ModelCard:
        config = served.config.model
        return ModelCard(id=name, created=served.created, root=config.model, max_model_len=config.max_model_len)

    @app.get("/v1/models", responses=ERRORS)
    async def models() -> ModelList:
        """The names under which the model is served."""
        return ModelList(data=[card(name) for name in served.names])

    @app.get("/v1/models/{name:path}", responses=ERRORS)
    async def model(name: str) -> ModelCard:
        """One of them."""
        return card(served.check_model(name))

    @app.post("/tokenize", responses=ERRORS)
    async def tokenize(body: TokenizeRequest) -> TokenizeResponse:
        """Text, or a conversation, as token ids."""
        served.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ClientError("give prompt or messages, and one of them only", "prompt")
        text = body.prompt if body.prompt is not None else await render(served, body)
        served.engine.engine.inputs.check_length(text)
        special = body.add_special_tokens if body.add_special_tokens is not None else body.messages is None
        tokenizer = served.tokenizer

        def work() -> tuple[list[int], list[str] | None]:
            ids = tokenizer.encode(text, special)
            return ids, [tokenizer.id_to_token(i) or "" for i in ids] if body.return_token_strs else None

        ids, strings = await served.engine.call(work, len(text))
        return TokenizeResponse(
            count=len(ids), max_model_len=served.config.model.max_model_len, tokens=ids, token_strs=strings
        )

    @app.post("/detokenize", responses=ERRORS)
    async def detokenize(body: DetokenizeRequest) -> DetokenizeResponse:
        """Token ids as text."""
        served.check_model(body.model)
        vocab = served.config.model.arch.vocab_size
        if any(token >= vocab for token in body.tokens):
            raise ClientError(f"tokens must be in the vocabulary of {vocab}", "tokens")
        decode = partial(served.tokenizer.decode, body.tokens, False)
        return DetokenizeResponse(prompt=await served.engine.call(decode, 4 * len(body.tokens)))


def _operation(app: FastAPI, served: Served) -> None:
    def health(trouble: str | None) -> Response:
        body = {"status": trouble or "ok"}
        return JSONResponse(body, 200 if trouble is None else 503)

    health_answers: dict[int | str, dict[str, Any]] = {
        200: {"model": Health, "description": "All is well"},
        503: {"model": Health, "description": "No tokens can be expected now"},
        "4XX": ERRORS["4XX"],
    }

    @app.get("/health", responses=health_answers, response_class=Response)
    async def health_(request: Request) -> Response:
        """Whether tokens are being made, or could be: 503 while the engine starts, is lost, or makes no progress."""
        return health(served.ill())

    @app.get("/ping", responses=health_answers, response_class=Response)
    @app.post("/ping", responses=health_answers, response_class=Response, operation_id="ping_post")
    async def ping() -> Response:
        """As /health."""
        return health(served.ill())

    @app.get("/ready", responses=health_answers, response_class=Response)
    async def ready() -> Response:
        """As /health, and 503 while the server shuts down: whether to send it new requests."""
        return health("shutting down" if served.draining else served.ill())

    @app.get("/version", responses=ERRORS)
    async def version() -> Version:
        """quire's version."""
        return Version(version=VERSION)

    @app.get("/load", responses=ERRORS)
    async def load() -> Load:
        """How many requests for text are being answered."""
        return Load(server_load=len(served.runs))

    text: dict[int | str, dict[str, Any]] = {
        **ERRORS, 200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "All series"}
    }  # fmt: skip

    @app.get("/metrics", responses=text, response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus' text format."""
        from quire.metrics.prometheus import CONTENT_TYPE

        if served.started:
            served.metrics.restarts(served.client.restarts)
        return Response(served.metrics.render(), media_type=CONTENT_TYPE)

    async def profile(method: str) -> protocol.Profile:
        folder = served.args.profiler_dir
        if folder is None:
            raise ApiError(400, "start the server with --profiler-dir to allow profiling", "profiler_disabled")
        client = served.client
        return protocol.Profile(path=await served.engine.post(lambda: client.call(method, folder)))

    @app.post("/start_profile", responses=ERRORS)
    async def start_profile() -> protocol.Profile:
        """Record what the engine's process does, with torch's profiler."""
        return await profile("start_profile")

    @app.post("/stop_profile", responses=ERRORS)
    async def stop_profile() -> protocol.Profile:
        """End the recording; answers where the trace is."""
        return await profile("stop_profile")


_LIMITS = ("too_long", "too_short", "greater_than_equal", "less_than_equal")


def _telling(errors: Sequence[Any]) -> Any:
    """The error to tell: a value of one of several types has one for each, of which a limit says more than the types
    that were not meant."""
    same = [error for error in errors if error["loc"][:2] == errors[0]["loc"][:2]]
    return next((error for error in same if error["type"] in _LIMITS), errors[0])
