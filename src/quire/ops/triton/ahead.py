"""Kernels compiled before they are launched, side by side, while a start goes on.

Owns: the threads, and what becomes of a kernel that this thread calls: is it launched, or compiled (`Ahead`)? Knows no
kernels and imports no Triton. Nothing depends on it: a kernel that was not foreseen is compiled when it is launched.

Of a kernel's compilation a quarter is Python; the rest (passes, code generation, the assembler's process) leaves the
interpreter to others, so that threads do. Where the cache of kernels is full already, they read it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Protocol

import torch

from quire.ops.dispatch import REFERENCE, Binder

log = logging.getLogger(__name__)

THREADS = 16
# Ops that write where their inputs say, or read there: what foresees must not run them on numbers that nothing made.
_INDEXED = ("attention", "heads", "embedding")


class Compiler(Protocol):
    """In `with compiler:` the kernels that this thread calls may not be launched; what they would have written is
    undefined then."""

    def foresee(self, function: Callable[[], None]) -> None:
        """Have the kernels compiled that it calls, if that can be done without running it."""
        ...

    def __enter__(self) -> Any: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def close(self) -> None:
        """No more is asked for; what was is done beside all else."""
        ...


class Ahead:
    """Kernels are compiled instead of launched. A launch later waits for its own kernel alone."""

    def __init__(self, device: torch.device) -> None:
        self._threads = ThreadPoolExecutor(min(THREADS, _cores()), "quire-kernels", _in_thread, (device,))
        self.known = set[Hashable]()

    def __enter__(self) -> Ahead:
        assert AHEAD.get() is None, "one at a time"
        AHEAD.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        AHEAD.set(None)

    def foresee(self, function: Callable[[], None]) -> None:
        try:
            with self:
                function()
        except Exception as error:  # what is wrong shows where it is needed
            log.info("kernels cannot be compiled ahead: %s: %s", type(error).__name__, error)

    def submit(self, key: Hashable, compile: Callable[[], Any]) -> Future[Any] | None:
        """What will become of it; None if it was asked for before."""
        if key in self.known:
            return None
        self.known.add(key)
        return self._threads.submit(compile)

    def close(self) -> None:
        self._threads.shutdown(wait=False)


class NotAhead:
    """Kernels are launched as ever."""

    def foresee(self, function: Callable[[], None]) -> None:
        pass

    def __enter__(self) -> NotAhead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def close(self) -> None:
        pass


AHEAD: ContextVar[Ahead | None] = ContextVar("quire_kernels_ahead", default=None)


def make_ahead(ops: Binder, kv_dtype: torch.dtype, device: torch.device) -> Compiler:
    """For a model whose ops are bound."""
    plain = any(choice.chosen == REFERENCE for choice in ops.report() if choice.op in _INDEXED)
    return NotAhead() if device.type != "cuda" or plain or kv_dtype == torch.int8 else Ahead(device)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_thread(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
