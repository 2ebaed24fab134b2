"""Server-sent events: answers that are sent while they are made.

Owns: the frames, the headers, and what happens when the client leaves or something goes wrong halfway: a frame with an
error body, never a silent cut.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import msgspec
from starlette.responses import Response

from quire.server.errors import ClientGone, api_error
from quire.server.served import Run
from quire.utils.logging import fields

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
EVENTS, LINES = "text/event-stream", "application/x-ndjson"
_HEADERS = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
encode = msgspec.json.Encoder().encode


def frame(value: Any) -> bytes:
    return b"data: " + encode(value) + b"\n\n"


class EventStream(Response):
    """Sends what `frames` makes of a run, as events or as lines of JSON, with an end that says whether it is one."""

    def __init__(self, run: Run, frames: AsyncGenerator[bytes], media_type: str = EVENTS) -> None:
        super().__init__(headers={"x-request-id": run.id}, media_type=media_type)
        self._run, self._frames, self._events = run, frames, media_type == EVENTS

    async def __call__(self, scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        run = self._run
        watcher = asyncio.ensure_future(run.watch(receive))
        headers = [*_HEADERS, (b"x-request-id", run.id.encode()), (b"content-type", f"{self.media_type}".encode())]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            try:
                async for data in self._frames:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            except ClientGone:
                log.info("request %s: the client left", run.id, extra=fields(request_id=run.id))
                return
            except Exception as error:
                found = api_error(error)
                level = logging.ERROR if found.status >= 500 else logging.INFO
                text = "request %s failed while it was being answered: %s"
                log.log(level, text, run.id, found.message, extra=fields(request_id=run.id))
                body = frame(found.body) if self._events else found.data + b"\n"
                await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": DONE if self._events else b"", "more_body": False})
        finally:
            watcher.cancel()
            run.close()
            await self._frames.aclose()
