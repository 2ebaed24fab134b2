"""The map of KV blocks: who holds what, for people to look at.

Owns nothing: reads the books of the core when somebody asks, at a cost that grows with the pages in use. What it
answers is bounded, however large the pool is: a window of it, in cells of one block or of several.
"""

from __future__ import annotations

from itertools import chain

import numpy as np
from numpy.typing import NDArray

from quire.core.sequence import Job, Status
from quire.core.state import State
from quire.types.stats import BlockMap, Holder

I64 = np.int64
MAX_CELLS = 4096
MAX_HOLDERS = 128


def block_map(state: State, first: int, count: int, cells: int) -> BlockMap:
    """Blocks `first .. first+count-1`, as far as they exist, in at most `cells` cells (and `MAX_CELLS`); a `count` of
    0 goes up to the last block."""
    pool, jobs = state.kv.pool, list(state.jobs.values())
    total = pool.num_blocks
    first = max(0, min(first, total - 1))
    count = min(count or total, total - first)

    tables = [(job.arrival, table) for job in jobs for seq in job.live.values() for table in seq.tables]
    pages = np.fromiter(chain.from_iterable(table for _, table in tables), I64)
    owners = np.repeat(np.array([who for who, _ in tables], I64), [len(table) for _, table in tables])
    pages, owners = pages[pages >= 0], owners[pages >= 0]
    holders = np.bincount(pages, minlength=total)
    owner = np.full(total, -1, I64)
    owner[pages[::-1]] = owners[::-1]  # of those who share a block, the first to come gives the colour
    contents = np.fromiter(pool.contents(), I64)
    cached = np.zeros(total, np.bool_)
    cached[contents] = True
    cached[pages] = False

    size = max(1, -(-count // max(1, min(cells, MAX_CELLS))))
    window = slice(first, first + count)
    columns = _cells(holders[window], cached[window], owner[window], size)
    last = max(int(pages.max(initial=-1)), int(contents.max(initial=-1)))
    return BlockMap(
        total=total,
        block_size=state.kv.block_size,
        first=first,
        count=count,
        per_cell=size,
        last=last,
        runs=_runs(columns),
        requests=[_holder(state, job, holders) for job in _foremost(jobs)],
        unlisted=max(0, len(jobs) - MAX_HOLDERS),
    )


def _cells(holders: NDArray[I64], cached: NDArray[np.bool_], owner: NDArray[I64], size: int) -> NDArray[I64]:
    """[cells, 4]: blocks held, blocks cached, the owner of the first held block or -1, the most holders of a block."""
    short = -len(holders) % size

    def split(x: NDArray[I64], fill: int) -> NDArray[I64]:
        return np.pad(x, (0, short), constant_values=fill).reshape(-1, size)

    holders, owner = split(holders, 0), split(owner, -1)
    held = holders > 0
    at = held.argmax(1)
    columns = (
        held.sum(1),
        split(cached.astype(I64), 0).sum(1),
        owner[np.arange(len(owner)), at],
        holders.max(1),
    )
    return np.stack(columns, axis=1).astype(I64)


def _runs(columns: NDArray[I64]) -> list[int]:
    """Equal neighbours as one: for each run its length and its columns, one after the other."""
    if not len(columns):
        return []
    starts = np.flatnonzero(np.append(True, (columns[1:] != columns[:-1]).any(1)))
    lengths = np.diff(np.append(starts, len(columns)))
    return np.column_stack((lengths, columns[starts])).ravel().tolist()


def _foremost(jobs: list[Job]) -> list[Job]:
    """As many as are listed: those that run before those that wait, first come first."""
    if len(jobs) > MAX_HOLDERS:
        jobs = sorted(jobs, key=lambda job: not _runs_now(job))[:MAX_HOLDERS]
    return jobs


def _runs_now(job: Job) -> bool:
    return any(seq.status is Status.RUNNING for seq in job.live.values())


def _holder(state: State, job: Job, holders: NDArray[I64]) -> Holder:
    live = list(job.live.values())
    pages = np.unique(np.fromiter((p for seq in live for table in seq.tables for p in table if p >= 0), I64))
    computed = (int(state.rows.computed[seq.row]) for seq in live if seq.row >= 0)
    return Holder(
        number=job.arrival,
        id=job.request.id,
        state="running" if _runs_now(job) else "preempted" if job.preemptions else "waiting",
        sequences=len(live),
        prompt_tokens=job.prompt_length,
        output_tokens=sum(seq.num_outputs for seq in live),
        computed=max(computed, default=0),
        cached_tokens=job.cached_tokens or 0,
        blocks=len(pages),
        shared=int((holders[pages] > 1).sum()),
        host_blocks=sum(len(seq.host or ()) for seq in live),
        preemptions=job.preemptions,
    )
