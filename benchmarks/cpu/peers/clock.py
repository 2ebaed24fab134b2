"""Notes when tokens arrive. Owns: one timing a request, filled while an engine's loop runs."""

from __future__ import annotations

import time
from collections.abc import Sequence

from benchmarks.cpu.workloads import Request, Timing


class Clock:
    """Starts when it is made: make it right before the first submission."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.counts = [0] * len(requests)
        self._first = [0.0] * len(requests)
        self._last = [0.0] * len(requests)
        self._start = time.perf_counter()

    def now(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    def add(self, index: int, tokens: int, now: float) -> None:
        """Request `index` got `tokens` more at `now`."""
        if not tokens:
            return
        if not self.counts[index]:
            self._first[index] = now
        self.counts[index] += tokens
        self._last[index] = now

    def timings(self) -> list[Timing]:
        """What was noted."""
        return [Timing(*x) for x in zip(self._first, self._last, self.counts, strict=True)]
