"""Recording what a function does to the device. Owns: the recorders, and the memory that their recordings share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor


class Captured(Protocol):
    def replay(self) -> None: ...


class Recorder(Protocol):
    """Runs a function once, then keeps what it does to the device, and what it gave."""

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Captured, Tensor]: ...


class CudaRecorder:
    """CUDA graphs that share one pool of memory: what one leaves behind must be read before another one runs."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Captured, Tensor]:
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):  # kernels are compiled, libraries make their workspaces
            function()
        graph = torch.cuda.CUDAGraph()
        # threads that compile kernels may ask the device what they like meanwhile
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            out = function()
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
