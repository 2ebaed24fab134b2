"""What goes wrong, as HTTP: statuses and OpenAI's error bodies.

Owns: the mapping from quire's exceptions to them. Every body is `{"error": {message, type, param, code}}`.
"""

from __future__ import annotations

from typing import Any

import msgspec

from quire.types.errors import BusyError, ClientError, EngineError

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    499: "client_closed_request",
    500: "server_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """An answer other than 200. `retry_s`: the client may try again after so many seconds."""

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None, retry_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_s = status, message, code, param, retry_s

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def data(self) -> bytes:
        return msgspec.json.encode(self.body)

    @property
    def headers(self) -> dict[str, str]:
        found = {} if self.retry_s is None else {"retry-after": str(self.retry_s)}
        if self.status == 401:
            found["www-authenticate"] = "Bearer"
        return found


class ClientGone(ApiError):
    """Nobody waits for the answer any more."""

    def __init__(self) -> None:
        super().__init__(499, "the client closed the connection", "client_closed_request")


def unavailable(message: str, code: str, retry_s: int = 5) -> ApiError:
    return ApiError(503, message, code, retry_s=retry_s)


def api_error(error: BaseException) -> ApiError:
    """Any exception as the answer that it means."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ClientError):
        too_long = error.parameter == "prompt" and isinstance(error.value, int)
        return ApiError(400, str(error), "context_length_exceeded" if too_long else "invalid_value", error.parameter)
    if isinstance(error, BusyError):
        return ApiError(429, str(error), "queue_full", retry_s=1)
    if isinstance(error, RecursionError):
        return ApiError(400, "the body is nested too deeply", "invalid_value")
    if isinstance(error, EngineError):
        return ApiError(500, str(error).splitlines()[0], "engine_error")
    return ApiError(500, f"{type(error).__name__}: {error}", "internal_error")
