"""Statistics of a running engine. Owns the values' names; who counts is elsewhere."""

from __future__ import annotations

import msgspec


class EngineStats(msgspec.Struct, frozen=True):
    """A snapshot. Blocks: `blocks_used` + `blocks_cached` + `blocks_free` = `blocks_total`; a cached block is unused
    but holds a prefix that may be hit again, so it is free to take. `host_blocks_used` counts host blocks that hold
    anything, of swapped sequences or evicted prefixes. `kv_cache_usage` is used / total, 0 to 1. Counters run since
    the start: tokens, preemptions, prefix cache queries and hits (in tokens), requests received. `waiting_tokens` are
    the known tokens of the waiting sequences.
    """

    blocks_total: int = 0
    blocks_used: int = 0
    blocks_free: int = 0
    blocks_cached: int = 0
    host_blocks_total: int = 0
    host_blocks_used: int = 0
    running: int = 0
    waiting: int = 0
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    block_size: int = 0
    waiting_tokens: int = 0
    received: int = 0

    @property
    def kv_cache_usage(self) -> float:
        return self.blocks_used / self.blocks_total if self.blocks_total else 0.0

    @property
    def prefix_hit_rate(self) -> float:
        return self.prefix_hits / self.prefix_queries if self.prefix_queries else 0.0
