"""HTTP on a connection. Owns: the limits on the head of a request; uvicorn does the rest (`guard` limits bodies)."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_BYTES = 64 << 10


class Protocol(HttpToolsProtocol):
    """Closes connections whose next request has begun and does not come to the end of its head, or that say nothing at
    all, for `head_timeout_s` seconds; and those whose heads are longer than `HEAD_BYTES`."""

    def __init__(self, *args: Any, head_timeout_s: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timeout_s = head_timeout_s
        self._due: asyncio.TimerHandle | None = None  # while a head is expected
        self._size = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        self._settle()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._due is not None:
            self._size += len(data)
            if self._size > HEAD_BYTES:
                self._refuse(b"431 Request Header Fields Too Large")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect()

    def on_headers_complete(self) -> None:
        self._settle()
        super().on_headers_complete()

    def _expect(self) -> None:
        if self._due is None:
            self._size = 0
            self._due = self.loop.call_later(self._head_timeout_s, self._refuse, b"408 Request Timeout")

    def _settle(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None

    def _refuse(self, status: bytes) -> None:
        self._settle()
        if not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 " + status + b"\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            self.transport.close()
