"""How long the device is at work in captured steps, and the host in waiting, seen from outside the engine.

Owns: two of torch's methods while `watch` is on. A replay of a CUDA graph is timed on the device, between two events of
its own; what lies between graphs (a copy of a step's inputs and outputs, and every gap) is not in it. For an engine
that runs in this process.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Seen:
    """`waited_s`: the host in `Event.synchronize`."""

    waited_s: float = 0.0
    marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def replayed_s(self) -> float:
        """Of the device, in graphs. Waits for it."""
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in self.marks) / 1e3


@contextmanager
def watch() -> Iterator[Seen]:
    seen = Seen()
    replay, wait = torch.cuda.CUDAGraph.replay, torch.cuda.Event.synchronize

    def timed_replay(self: Any) -> None:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        replay(self)
        end.record()
        seen.marks.append((begin, end))

    def timed_wait(self: Any) -> None:
        begin = time.perf_counter()
        wait(self)
        seen.waited_s += time.perf_counter() - begin

    torch.cuda.CUDAGraph.replay, torch.cuda.Event.synchronize = timed_replay, timed_wait
    try:
        yield seen
    finally:
        torch.cuda.CUDAGraph.replay, torch.cuda.Event.synchronize = replay, wait
