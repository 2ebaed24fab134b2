"""What the engine does now, for the page and for whoever else looks: `/engine/stats`, `/engine/blocks`.

Owns: how often the engine is asked for the map of its blocks. Statistics are here already, with each step; the map is
made when somebody looks, and may take no more than `SHARE` of the engine's time however many look: one that took it t
seconds is good for t / `SHARE`.
"""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any, Literal, NamedTuple

from fastapi import FastAPI, Query
from pydantic import BaseModel
from starlette.responses import Response

from quire.server.errors import ApiError, unavailable
from quire.server.served import Served
from quire.server.sse import encode
from quire.utils.version import VERSION

SHARE = 0.01
LEAST_S = 0.1
PATIENCE_S = 10.0  # with an engine that does not answer
CROWD = 32  # those who wait for maps of different parts of the pool


class Latencies(BaseModel):
    """A distribution of seconds since the server began. `counts[i]`: observations up to `bounds[i]` and above the
    bound before; the last count: those above all bounds."""

    bounds: list[float]
    counts: list[int]
    sum: float


class Engine(BaseModel):
    """The engine's statistics; counters run since its start. Blocks are used + cached + free = total. `deferred`: how
    many of those that wait do so for their grammars."""

    blocks_total: int
    blocks_used: int
    blocks_free: int
    blocks_cached: int
    host_blocks_total: int
    host_blocks_used: int
    running: int
    waiting: int
    preemptions: int
    prefix_queries: int
    prefix_hits: int
    prompt_tokens: int
    generation_tokens: int
    block_size: int
    waiting_tokens: int
    received: int
    deferred: int


class Stats(BaseModel):
    """`time` in seconds, of a clock that only goes forward: rates are differences of two answers. `status`: "ok", or
    why no tokens can be expected now. `engine` is null while it starts. `restarts`: of the engine's process."""

    time: float
    status: str
    version: str
    model: str
    max_model_len: int
    max_num_seqs: int
    requests: int
    restarts: int
    engine: Engine | None
    latencies: dict[str, Latencies]


class Holder(BaseModel):
    """A request. `number`: its place in the order of arrival. `computed`: tokens of its longest sequence in the cache;
    `cached_tokens`: of its prompt, found in the prefix cache. It holds `blocks`, `shared` of them not alone, and
    `host_blocks` that are swapped out."""

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


class Blocks(BaseModel):
    """The blocks `first` to `first + count - 1` of `total`, in cells of `per_cell` blocks.

    `runs` has five numbers for each run of equal cells: how many cells; in each of them, how many blocks are held and
    how many cached (the rest is free); the number of the request that holds the first held block, -1 if none (of
    several, the first to come); the most holders that a block has. `last`: the last block of the pool that is not free,
    -1 if none. `unlisted`: requests beyond those in `requests`. `seconds`: what the map cost the engine.
    """

    total: int
    block_size: int
    first: int
    count: int
    per_cell: int
    last: int
    runs: list[int]
    requests: list[Holder]
    unlisted: int
    seconds: float


class BlockMaps:
    """The engine's maps of its blocks, as they are asked for."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._known: dict[tuple[int, int], _Made] = {}
        self._next = 0.0  # when the engine may be asked again

    async def get(self, first: int, count: int) -> bytes:
        """As JSON. Raises `ApiError`, `EngineError`."""
        key, since = (first, count), time.monotonic()
        if (found := self._good(key, since)) is not None:
            return found
        if self._waiting >= CROWD:
            raise ApiError(429, "too many ask for the map of blocks at once", "too_many_maps", retry_s=1)
        self._waiting += 1
        try:
            async with self._turn:
                if (found := self._good(key, since)) is not None:
                    return found
                await asyncio.sleep(self._next - time.monotonic())
                return await self._ask(key)
        finally:
            self._waiting -= 1

    def _good(self, key: tuple[int, int], since: float) -> bytes | None:
        """A map that is still good, or that was made while somebody waited for it."""
        made = self._known.get(key)
        return made.data if made is not None and (made.until > time.monotonic() or made.begun >= since) else None

    async def _ask(self, key: tuple[int, int]) -> bytes:
        client, begun = self._served.client, time.monotonic()
        answer = self._served.engine.post(lambda: client.ask("block_map", *key))
        try:
            async with asyncio.timeout(PATIENCE_S):
                found = await asyncio.wrap_future(await answer)
        except TimeoutError:
            raise unavailable("the engine does not answer", "engine_stalled") from None
        self._next = time.monotonic() + max(LEAST_S, found["seconds"] / SHARE)
        self._known.pop(key, None)
        self._known[key] = made = _Made(encode(found), begun, self._next)
        if len(self._known) > CROWD:
            del self._known[next(iter(self._known))]
        return made.data


class _Made(NamedTuple):
    data: bytes
    begun: float  # when the engine was asked for it
    until: float  # when it is out of date


def stats(served: Served) -> dict[str, Any]:
    """See `Stats`."""
    config, client = served.config, served.client if served.started else None
    trouble = "shutting down" if served.draining else served.ill()
    return {
        "time": time.monotonic(),
        "status": trouble or "ok",
        "version": VERSION,
        "model": served.names[0],
        "max_model_len": config.model.max_model_len,
        "max_num_seqs": config.scheduler.max_num_seqs,
        "requests": len(served.runs),
        "restarts": client.restarts if client else 0,
        "engine": client.stats() if client else None,
        "latencies": {name: found._asdict() for name, found in served.metrics.latencies().items()},
    }


def routes(app: FastAPI, served: Served, errors: dict[int | str, dict[str, Any]]) -> None:
    maps = BlockMaps(served)

    def answers(model: type) -> dict[int | str, dict[str, Any]]:
        return {**errors, 200: {"model": model, "description": "As of now"}}

    @app.get("/engine/stats", responses=answers(Stats), response_class=Response)
    async def engine_stats() -> Response:
        """Counts of requests, tokens and blocks, and the distributions of latencies."""
        return Response(encode(stats(served)), media_type="application/json")

    @app.get("/engine/blocks", responses=answers(Blocks), response_class=Response)
    async def engine_blocks(
        first: Annotated[int, Query(ge=0, le=2**31 - 1, description="The first block")] = 0,
        count: Annotated[int, Query(ge=0, le=2**31 - 1, description="How many; 0: up to the last")] = 0,
    ) -> Response:
        """Who holds which KV blocks: a map of a part of the pool or of all of it, in a bounded number of cells."""
        return Response(await maps.get(first, count), media_type="application/json")
