"""The map of blocks says what the pool and the tables say, after each step of random workloads."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest import mock

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings

from quire.core import blockmap
from quire.core.scheduler import Scheduler
from quire.types.kv import KVGroup
from quire.types.params import SamplingParams
from quire.types.request import Request
from quire.types.stats import BlockMap

from .test_sim import engines, jobs
from .workload import Engine, Job, Run

CHECK = Scheduler.check


def cells(found: BlockMap) -> list[tuple[int, int, int, int]]:
    runs = [found.runs[i : i + 5] for i in range(0, len(found.runs), 5)]
    assert all(run[0] > 0 for run in runs)
    assert all(a[1:] != b[1:] for a, b in pairwise(runs)), "equal neighbours are one run"
    out = [(held, cached, owner, most) for n, held, cached, owner, most in runs for _ in range(n)]
    assert len(out) == -(-found.count // found.per_cell)
    return out


def check_map(scheduler: Scheduler) -> None:
    state = scheduler._state
    pool = state.kv.pool
    tables: dict[int, list[int]] = {}
    for job in state.jobs.values():
        for seq in job.live.values():
            tables.setdefault(job.arrival, []).extend(page for table in seq.tables for page in table if page >= 0)
    whole = scheduler.block_map()
    assert (whole.first, whole.count, whole.per_cell) == (0, pool.num_blocks, 1)
    single = cells(whole)
    for block, (held, cached, owner, most) in enumerate(single):
        assert (most, held) == (pool.count(block), min(1, pool.count(block)))
        assert cached == (pool.count(block) == 0 and pool.key(block) is not None)
        holders = [number for number, pages in tables.items() if block in pages]
        assert owner == min(holders, default=-1)
    last = max((b for b, cell in enumerate(single) if cell[0] or cell[1]), default=-1)
    assert whole.last == last
    stats = scheduler.stats()
    assert (sum(c[0] for c in single), sum(c[1] for c in single)) == (stats.blocks_used, stats.blocks_cached)
    first, count = pool.num_blocks // 3, pool.num_blocks // 2
    part = scheduler.block_map(first, count, 5)
    for i, cell in enumerate(cells(part)):
        inside = single[first : first + count][i * part.per_cell : (i + 1) * part.per_cell]
        owner = next((c[2] for c in inside if c[0]), -1)
        assert cell == (sum(c[0] for c in inside), sum(c[1] for c in inside), owner, max(c[3] for c in inside))
    assert [one.number for one in whole.requests] == [job.arrival for job in state.jobs.values()]
    for one, job in zip(whole.requests, state.jobs.values(), strict=True):
        pages = set(tables.get(job.arrival, ()))
        assert (one.blocks, one.shared) == (len(pages), sum(pool.count(page) > 1 for page in pages))
        assert one.sequences == len(job.live) and one.prompt_tokens == job.prompt_length
    assert sum(one.host_blocks for one in whole.requests) >= sum(
        state.kv.host.count(page) > 0 for page in range(state.kv.host.num_blocks)
    )


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(jobs, engines)
def test_it_says_what_the_tables_say(work: list[Job], engine: Engine) -> None:
    def check(scheduler: Scheduler) -> None:
        CHECK(scheduler)
        check_map(scheduler)

    work = [replace(job, seed=16 * job.seed + i, cut=None if job.beams else job.cut) for i, job in enumerate(work)]
    with mock.patch.object(Scheduler, "check", check):
        Run(engine, work)


def large(count: int, **options: Any) -> Scheduler:
    scheduler = Scheduler((KVGroup("full", (0,)),), 100_000, 16, 512, 100_000, 4096)
    for i in range(count):
        prompt = [1] * 160 + [2 + i] * 100
        scheduler.add(Request(f"r{i}", prompt, SamplingParams(max_tokens=10, **options), 0))
    assert scheduler.schedule() is not None
    return scheduler


def test_a_large_pool_is_shown_in_bounds() -> None:
    scheduler = large(300)
    whole = scheduler.block_map()
    assert len(cells(whole)) <= blockmap.MAX_CELLS < whole.total == 100_000
    assert sum(c[0] for c in cells(whole)) == scheduler.stats().blocks_used
    assert len(whole.requests) == blockmap.MAX_HOLDERS and whole.unlisted == 300 - blockmap.MAX_HOLDERS
    assert len(msgspec.json.encode(whole)) < 100_000
    assert whole.last == scheduler.stats().blocks_used - 1
    part = scheduler.block_map(0, 64)
    assert part.per_cell == 1 and cells(part)[0] == (1, 0, 0, 300), "the prompts' beginning is shared"


def test_those_that_run_are_listed_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockmap, "MAX_HOLDERS", 3)
    scheduler = large(2)
    for i in range(2, 5):
        scheduler.add(Request(f"r{i}", [i], SamplingParams(), 0))
    found = scheduler.block_map()
    assert [(one.id, one.state) for one in found.requests] == [("r0", "running"), ("r1", "running"), ("r2", "waiting")]
    assert found.unlisted == 2


def test_parts_that_do_not_exist_are_left_out() -> None:
    scheduler = large(1)
    found = scheduler.block_map(99_990, 50)
    assert (found.first, found.count, cells(found)) == (99_990, 10, [(0, 0, -1, 0)] * 10)
    found = scheduler.block_map(1 << 30, 50)
    assert (found.first, found.count) == (99_999, 1)
