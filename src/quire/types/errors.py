"""The errors that quire raises on purpose. Owns: the split between what the caller can mend and what it cannot."""

from __future__ import annotations

from typing import Any


class QuireError(Exception):
    """Base of all errors that quire raises on purpose."""


class ClientError(QuireError, ValueError):
    """The caller's mistake: a one-line message that says what to change. `parameter` names the argument at fault and
    `value` is what was given, where there is one."""

    def __init__(self, message: str, parameter: str | None = None, value: Any = None) -> None:
        super().__init__(message)
        self.parameter = parameter
        self.value = value


class EngineError(QuireError, RuntimeError):
    """The engine failed, or the work of one request did; the message names the cause. Not the caller's fault."""


class BusyError(QuireError, RuntimeError):
    """Too much of its kind is waiting already: the same may be asked again later."""


ValidationError = ClientError
