"""Recording what a function does to the device. Owns: the recorders, and the memory that their recordings share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor


class Captured(Protocol):
    def replay(self) -> None: ...


class Recorder(Protocol):
    """Runs a function once, then keeps what it does to the device, and what it gave."""

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Captured, Tensor]: ...


class CudaRecorder:
    """CUDA graphs that share one pool of memory: what one leaves behind must be read before another one runs.

    Nothing waits for the device, and no memory is given back to it, as `torch.cuda.graph` would: a step that comes in a
    new size is recorded while the one before it runs."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Captured, Tensor]:
        outside, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        self._stream.wait_stream(outside)
        try:
            with torch.cuda.stream(self._stream):
                function()  # kernels are loaded, libraries make their workspaces
                # threads that load kernels may ask the device what they like meanwhile
                graph.capture_begin(self._pool, capture_error_mode="thread_local")
                try:
                    out = function()
                except BaseException:
                    with suppress(Exception):  # it says that the recording is broken, not why
                        graph.capture_end()
                    raise
                graph.capture_end()
        finally:  # what failed half-way may still write where the next step does
            outside.wait_stream(self._stream)
        return graph, out


class _Again:
    def __init__(self, function: Callable[[], Any]) -> None:
        self.replay = function


class PlainRecorder:
    """Records nothing: a replay runs the function again, and writes what it gives to where it was the first time. For
    tests without a GPU."""

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Captured, Tensor]:
        out = function()
        return _Again(lambda: out.copy_(function())), out
