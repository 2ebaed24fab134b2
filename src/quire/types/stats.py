"""Statistics of a running engine. Owns the values' names; who counts is elsewhere."""

from __future__ import annotations

from typing import Literal

import msgspec


class EngineStats(msgspec.Struct, frozen=True):
    """A snapshot. Blocks: `blocks_used` + `blocks_cached` + `blocks_free` = `blocks_total`; a cached block is unused
    but holds a prefix that may be hit again, so it is free to take. `host_blocks_used` counts host blocks that hold
    anything, of swapped sequences or evicted prefixes. `kv_cache_usage` is used / total, 0 to 1. Counters run since the
    start: tokens, preemptions, prefix cache queries and hits (in tokens), requests received, whatever became of them.
    `waiting_tokens` are the known tokens of the waiting sequences. `deferred`: of those that wait, how many wait for
    their grammars.
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
    deferred: int = 0

    @property
    def kv_cache_usage(self) -> float:
        return self.blocks_used / self.blocks_total if self.blocks_total else 0.0

    @property
    def prefix_hit_rate(self) -> float:
        return self.prefix_hits / self.prefix_queries if self.prefix_queries else 0.0


class Holder(msgspec.Struct, frozen=True):
    """A request in the map of blocks. `number`: its place in the order of arrival. `sequences` are those that have not
    ended; `output_tokens` what they have made; `computed` how many tokens of the longest are in the cache;
    `cached_tokens` how much of the prompt the prefix cache gave. `blocks` it holds, of which others, or several of its
    sequences, hold `shared` too; `host_blocks` are swapped out."""

    number: int
    id: str
    state: Literal["running", "waiting", "preempted"]
    sequences: int
    prompt_tokens: int
    output_tokens: int
    computed: int
    cached_tokens: int
    blocks: int
    shared: int
    host_blocks: int
    preemptions: int


class BlockMap(msgspec.Struct, frozen=True):
    """Who holds the KV blocks `first .. first+count-1` of `total`, in cells of `per_cell` blocks (the last may have
    fewer).

    `runs` has five numbers for each run of equal cells: cells in the run; in each of them, blocks held and blocks
    cached (the others are free); the number of the request that holds the first held block, -1 where none is held (of
    requests that share a block, the first to come); the most holders that one of its blocks has. `last` is the last
    block of the pool that holds or remembers anything, -1 if none. `requests` are first come first, `unlisted` more are
    there. `seconds`: what making the map cost the engine.
    """

    total: int
    block_size: int
    first: int
    count: int
    per_cell: int
    last: int
    runs: list[int]
    requests: list[Holder]
    unlisted: int = 0
    seconds: float = 0.0
