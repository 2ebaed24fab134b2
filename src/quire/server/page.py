"""The page at `/`: a playground, and a live view of the engine.

Owns: its files and the headers that they are sent with. They are the same for everybody and say nothing about the
server, so they need no key; what the page shows comes from endpoints that do (`live`, `/v1/...`). The policy in the
headers lets the page load nothing from elsewhere, run no script but its own, and turn no text into markup.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response

from quire.server.errors import ApiError

_KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}


def _load() -> dict[str, tuple[bytes, str]]:
    """Content and media type of each file, by its path in the URL."""
    found: dict[str, tuple[bytes, str]] = {}
    for file in files("quire.server").joinpath("ui").iterdir():
        kind = _KINDS.get(file.name.rpartition(".")[2])
        if kind is not None:
            path = "/" if file.name == "index.html" else f"/ui/{file.name}"
            found[path] = file.read_bytes(), f"{kind}; charset=utf-8"
    return found


FILES = _load()


def routes(app: FastAPI, errors: dict[int | str, dict[str, Any]]) -> None:
    html: dict[int | str, dict[str, Any]] = {
        **errors, 200: {"content": {"text/html": {"schema": {"type": "string"}}}, "description": "The page"}
    }  # fmt: skip
    any_kind: dict[int | str, dict[str, Any]] = {
        **errors, 200: {"content": {"*/*": {"schema": {"type": "string"}}}, "description": "The file"}
    }  # fmt: skip

    @app.get("/", responses=html, response_class=Response)
    async def page(request: Request) -> Response:
        """A playground and a live view of the engine, for a browser. Needs no key; what it shows does."""
        return _answer("/", request)

    @app.get("/ui/{name}", responses=any_kind, response_class=Response)
    async def part(name: str, request: Request) -> Response:
        """A file of that page."""
        return _answer(f"/ui/{name}", request)


def _answer(path: str, request: Request) -> Response:
    if path not in FILES:
        raise ApiError(404, f"the page has no file {path}", "not_found")
    data, kind = FILES[path]
    tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
    headers = {**_HEADERS, "etag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(data, media_type=kind, headers=headers)
