"""What every request passes before it reaches an endpoint.

Owns: request ids, keys, the limits on bodies, the answers while there is no engine, and the line in the log. One plain
ASGI callable around the application: on the way of a stream's frames it adds one function call.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
import uuid
from typing import Any

from quire.server import page
from quire.server.errors import ApiError, unavailable
from quire.server.served import Served
from quire.utils.logging import fields

log = logging.getLogger("quire.access")

OPEN = frozenset({"/health", "/ready", "/ping", *page.FILES})  # no key, and always an answer
UNLOGGED = OPEN | {"/metrics", "/engine/stats", "/engine/blocks"}  # asked for again and again
ADMIN = OPEN | {"/metrics", "/version", "/load", "/openapi.json", "/docs", "/redoc", "/v1/models"}


class Guard:
    def __init__(self, app: Any, served: Served) -> None:
        self._app, self._served = app, served
        self._keys = [key.encode() for key in served.args.api_key or ()]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        if not given or len(given) > 128 or not (given.isascii() and given.decode().isprintable()):
            given = uuid.uuid4().hex.encode()
            scope["headers"] = [(k, v) for k, v in scope["headers"] if k != b"x-request-id"]
            scope["headers"].append((b"x-request-id", given))
        answer = _Answer(send, given, self._served)
        begin = time.monotonic()
        try:
            self._check(scope, headers)
            body = _Body(receive, int(self._served.args.max_request_bytes), self._served.args.request_timeout)
            try:
                await self._work(scope, body, answer)
            except Exception:
                if body.failed is None or answer.status:
                    raise
            if body.failed is not None and not answer.status:
                raise body.failed
        except ApiError as error:
            await _reply(answer, error)
        finally:
            self._note(scope, answer.status or 499, time.monotonic() - begin, given)

    async def _work(self, scope: Any, body: _Body, answer: _Answer) -> None:
        """Raises `ApiError` where the server's end comes before the request's preparation does."""
        task = asyncio.current_task()
        assert task is not None
        if scope["method"] == "POST" and scope["path"] not in ADMIN:
            self._served.preparing.add(task)
        try:
            await self._app(scope, body, answer)
        except asyncio.CancelledError:
            if not self._served.draining or answer.status:
                raise
            task.uncancel()
            raise unavailable("the server is shutting down", "shutting_down") from None
        finally:
            self._served.preparing.discard(task)

    def _check(self, scope: Any, headers: dict[bytes, bytes]) -> None:
        path, served = scope["path"], self._served
        if path not in OPEN and self._keys and scope["method"] != "OPTIONS":
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            known = [hmac.compare_digest(key.strip(), k) for k in self._keys]
            if scheme.lower() != b"bearer" or not any(known):
                raise ApiError(401, "a valid key is needed: Authorization: Bearer KEY", "invalid_api_key")
        if path not in ADMIN and scope["method"] == "POST":
            if served.draining:
                raise unavailable("the server is shutting down", "shutting_down")
            if not served.started:
                raise unavailable("the model is still being loaded", "starting", 2)
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > int(served.args.max_request_bytes):
            raise too_large(int(served.args.max_request_bytes))

    def _note(self, scope: Any, status: int, seconds: float, id: bytes) -> None:
        route = scope.get("route")
        handler = getattr(route, "path", "none")
        self._served.metrics.answered(scope["method"], handler, status)
        if self._served.args.disable_uvicorn_access_log or scope["path"] in UNLOGGED:
            return
        client = scope.get("client") or ("-", 0)
        path = scope["raw_path"].decode("latin-1")  # as it was sent: nobody writes lines of his own into the log
        name, method = id.decode(), scope["method"]
        about = fields(request_id=name, client=client[0], method=method, path=path, status=status, seconds=seconds)
        log.info("%s %s %s %d in %.3f s, request %s", client[0], method, path, status, seconds, name, extra=about)


def too_large(limit: int) -> ApiError:
    return ApiError(413, f"the request's body is longer than {limit} bytes", "request_too_large")


class _Answer:
    """Passes the answer on, with the request's id, and remembers its status."""

    def __init__(self, send: Any, id: bytes, served: Served) -> None:
        self._send, self._id, self._served = send, id, served
        self.status = 0

    async def __call__(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._served.prepared()
            if not any(k.lower() == b"x-request-id" for k, _ in message["headers"]):
                message = {**message, "headers": [*message["headers"], (b"x-request-id", self._id)]}
        await self._send(message)


class _Body:
    """Passes the body on, as long as it is neither too long nor too late."""

    def __init__(self, receive: Any, limit: int, timeout: float) -> None:
        self._receive, self._limit = receive, limit
        self._until = asyncio.get_running_loop().time() + timeout
        self._size, self._whole = 0, False
        self.failed: ApiError | None = None

    async def __call__(self) -> Any:
        if self._whole:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._until):  # one for the whole body, however many pieces it comes in
                message = await self._receive()
        except TimeoutError:
            self.failed = ApiError(408, "the request's body did not arrive in time", "request_timeout")
            raise self.failed from None
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self._size > self._limit:
                self.failed = too_large(self._limit)
                raise self.failed
        return message


async def _reply(send: Any, error: ApiError) -> None:
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    headers += [(k.encode(), v.encode()) for k, v in error.headers.items()]
    data = error.data
    headers.append((b"content-length", str(len(data)).encode()))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": data})
