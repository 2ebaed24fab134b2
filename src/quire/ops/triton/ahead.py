"""Kernels compiled before they are launched, side by side, while a start goes on.

Owns: the threads, and what becomes of a kernel that this thread calls: is it launched, or compiled (`Ahead`)? Knows no
kernels and imports no Triton. Nothing depends on it: a kernel that was not foreseen is compiled when it is launched.

Of a kernel's compilation a quarter is Python; the rest (passes, code generation, the assembler and the C compiler as
processes) leaves the interpreter to others, so that threads do. Where the cache of kernels is full already, they read
it. Before any kernel Triton reads itself, 400 MB, for the name of its cache: that begins with the object.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor, wait
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
    def serves(self, ops: Binder, kv_dtype: torch.dtype) -> Compiler: ...
    def close(self) -> None:
        """No more is asked for; what was is done beside all else."""
        ...


class Ahead:
    """Kernels are compiled instead of launched. A launch later waits for its own kernel alone."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._threads = ThreadPoolExecutor(min(THREADS, _cores()), "quire-kernels")
        self._opened = self._threads.submit(self._open)
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
        return self._threads.submit(self._compile, compile)

    def serves(self, ops: Binder, kv_dtype: torch.dtype) -> Compiler:
        """This, or what launches, for a model whose ops are bound."""
        plain = any(choice.chosen == REFERENCE for choice in ops.report() if choice.op in _INDEXED)
        if not plain and kv_dtype != torch.int8:
            return self
        self.close()
        return NotAhead()

    def _open(self) -> None:
        """What all kernels need once, and threads would do all at once."""
        self._here()
        if self._device.type == "cuda":
            from quire.ops.triton import launch

            launch.open_compiler()

    def _compile(self, compile: Callable[[], Any]) -> Any:
        wait((self._opened,))
        self._here()
        return compile()

    def _here(self) -> None:
        """The device of this thread."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

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

    def serves(self, ops: Binder, kv_dtype: torch.dtype) -> Compiler:
        return self

    def close(self) -> None:
        pass


AHEAD: ContextVar[Ahead | None] = ContextVar("quire_kernels_ahead", default=None)


def make_ahead(device: torch.device) -> Compiler:
    return Ahead(device) if device.type == "cuda" else NotAhead()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
