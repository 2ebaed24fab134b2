"""A server seen from the command line: its model's name, and streams of events.

Owns: HTTP as far as the commands need it, with the standard library alone: blocking for a person at a terminal,
asynchronous (`stream`) for load. Any server with OpenAI's interface will do.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import ssl
from collections.abc import AsyncGenerator, Generator, Mapping
from typing import Any
from urllib.parse import urlsplit

from quire.types.errors import ClientError, EngineError

DONE = "[DONE]"


class Remote:
    """`url`: of the server, with or without /v1. Raises EngineError where it cannot be reached or refuses."""

    def __init__(self, url: str, key: str | None = None, timeout_s: float = 600.0) -> None:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ClientError(f"--url={url!r} is no address of a server such as http://localhost:8000", "url", url)
        self.https = parts.scheme == "https"
        self.host, self.port = parts.hostname, parts.port or (443 if self.https else 80)
        self.path = parts.path.rstrip("/").removesuffix("/v1")
        self.headers = {"Host": parts.netloc, "Content-Type": "application/json"}
        if key:
            self.headers["Authorization"] = f"Bearer {key}"
        self._timeout_s = timeout_s

    def get(self, path: str) -> Any:
        """The JSON at a path."""
        connection, answer = self._request("GET", path, None)
        try:
            return json.loads(answer.read())
        finally:
            connection.close()

    def model(self) -> str:
        """The name of the server's first model."""
        return self.get("/v1/models")["data"][0]["id"]

    def events(self, path: str, body: Mapping[str, Any]) -> Generator[Any]:
        """The JSON of each event. Closing the generator closes the connection, which ends the request."""
        connection, answer = self._request("POST", path, body)
        try:
            while line := answer.readline():
                event = parsed(line)
                if event is not None:
                    yield event
        except (OSError, http.client.HTTPException) as e:
            raise EngineError(f"the connection broke: {e}") from e
        finally:
            connection.close()

    def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        make = http.client.HTTPSConnection if self.https else http.client.HTTPConnection
        connection = make(self.host, self.port, timeout=self._timeout_s)
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, self.path + path, data, self.headers)
            answer = connection.getresponse()
        except OSError as e:
            raise EngineError(f"no server answers at {self.host} port {self.port}: {e}") from e
        if answer.status != 200:
            text = answer.read().decode(errors="replace")
            connection.close()
            raise EngineError(refusal(answer.status, text))
        return connection, answer

    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[Any]:
        """As `events`, on a connection of its own, for many at once."""
        secure = ssl.create_default_context() if self.https else None
        try:
            reader, writer = await asyncio.open_connection(self.host, self.port, ssl=secure, limit=1 << 22)
        except OSError as e:
            raise EngineError(f"no server answers at {self.host} port {self.port}: {e}") from e
        try:
            data = json.dumps(body).encode()
            lines = [f"POST {self.path}{path} HTTP/1.1", *(f"{k}: {v}" for k, v in self.headers.items())]
            lines += [f"Content-Length: {len(data)}", "Connection: close", "", ""]
            writer.write("\r\n".join(lines).encode() + data)
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            status = int(head[0].split()[1])
            if status != 200:
                raise EngineError(refusal(status, (await reader.read()).decode(errors="replace")))
            chunked = any(line.lower().replace(" ", "") == "transfer-encoding:chunked" for line in head)
            rest = b""
            async for piece in _chunks(reader) if chunked else _pieces(reader):
                *whole, rest = (rest + piece).split(b"\n")
                for line in whole:
                    event = parsed(line)
                    if event is not None:
                        yield event
        except (OSError, asyncio.IncompleteReadError, ValueError) as e:
            raise EngineError(f"the connection broke: {e}") from e
        finally:
            writer.close()


async def _chunks(reader: asyncio.StreamReader) -> AsyncGenerator[bytes]:
    while size := int((await reader.readline()).split(b";")[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]


async def _pieces(reader: asyncio.StreamReader) -> AsyncGenerator[bytes]:
    while piece := await reader.read(1 << 16):
        yield piece


def parsed(line: bytes) -> Any:
    """The JSON of an event's line; None for other lines and for the end. Raises EngineError for an error's."""
    if not line.startswith(b"data:"):
        return None
    data = line[5:].strip()
    if data == DONE.encode():
        return None
    event = json.loads(data)
    if isinstance(event, dict) and "error" in event:
        raise EngineError(str(event["error"].get("message", event["error"])))
    return event


def refusal(status: int, text: str) -> str:
    """An error's answer in one line."""
    try:
        message = json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = text.strip().splitlines()[0] if text.strip() else "no reason given"
    return f"the server answers {status}: {message}"
