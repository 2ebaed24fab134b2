"""A running engine's statistics for people: a snapshot at any time, a log line now and then.

Owns: rates between two lines and when the next is due. The numbers come from the core; the clock is given.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from quire.types.stats import EngineStats
from quire.utils.logging import fields

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Metric:
    """One value of `get_metrics`: a gauge goes up and down, a counter only up (since the engine's start)."""

    name: str
    kind: Literal["gauge", "counter"]
    value: float
    labels: dict[str, str] = field(default_factory=dict[str, str])


class StatLogger:
    """`interval`: seconds between two lines; None: no lines. A line is written only when something was done since."""

    def __init__(
        self, stats: Callable[[], EngineStats], interval: float | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stats, self._interval, self._clock = stats, interval, clock
        self._due = clock()  # the first step after a pause begins an interval
        self._last: tuple[float, EngineStats] | None = None

    @property
    def stats(self) -> EngineStats:
        return self._stats()

    def tick(self) -> None:
        """Call after each step."""
        if self._interval is None:
            return
        now = self._clock()
        if now < self._due:
            return
        self._due = now + self._interval
        stats, last = self._stats(), self._last
        self._last = (now, stats)
        if last is not None and now - last[0] < 2 * self._interval + 1:
            about = fields(seconds=now - last[0], **msgspec.structs.asdict(stats))
            logger.info("%s", line(stats, last[1], now - last[0]), extra=about)

    def metrics(self) -> list[Metric]:
        """The statistics under the names that a metrics endpoint gives them."""
        s = self._stats()
        gauges = {
            "num_requests_running": s.running,
            "num_requests_waiting": s.waiting,
            "kv_cache_usage_perc": s.kv_cache_usage,
            "kv_blocks_total": s.blocks_total,
            "kv_blocks_used": s.blocks_used,
            "kv_blocks_free": s.blocks_free,
            "kv_blocks_cached": s.blocks_cached,
        }
        counters = {
            "num_preemptions": s.preemptions,
            "prefix_cache_queries": s.prefix_queries,
            "prefix_cache_hits": s.prefix_hits,
            "prompt_tokens": s.prompt_tokens,
            "generation_tokens": s.generation_tokens,
        }
        return [Metric(f"quire:{k}", "gauge", v) for k, v in gauges.items()] + [
            Metric(f"quire:{k}", "counter", v) for k, v in counters.items()
        ]


def line(now: EngineStats, before: EngineStats, seconds: float) -> str:
    """What was done between two snapshots, and how full the engine is."""
    seconds = max(seconds, 1e-9)
    prompt = (now.prompt_tokens - before.prompt_tokens) / seconds
    generated = (now.generation_tokens - before.generation_tokens) / seconds
    return (
        f"prompt {prompt:.1f} tokens/s, generation {generated:.1f} tokens/s,"
        f" running {now.running}, waiting {now.waiting}, preempted {now.preemptions},"
        f" KV cache {now.kv_cache_usage:.1%} in use"
        f" ({now.blocks_used} used + {now.blocks_cached} cached + {now.blocks_free} free of {now.blocks_total} blocks),"
        f" prefix cache hits {now.prefix_hit_rate:.1%}"
    )
