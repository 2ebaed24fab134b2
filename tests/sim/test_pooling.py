"""Prompts that are pooled, in random workloads on the core: each ends once, with the name of its whole prompt, whatever
was preempted, aborted or failed meanwhile; and one that needs all its positions computes them without a break."""

from __future__ import annotations

import random
from collections import deque

import pytest

from quire.core.moves import Moves
from quire.core.planner import Draft
from quire.core.scheduler import Scheduler
from quire.types.errors import ClientError
from quire.types.kv import KVGroup
from quire.types.plan import Plan
from quire.types.pooling import PoolingParams
from quire.types.request import FinishReason, Request

from .device import SimDevice, names_of

FULL, SLIDING = KVGroup("full", (0,)), KVGroup("sliding", (1,), 9)
LONGEST = 48


def prompts_of(lots: random.Random, count: int) -> list[list[int]]:
    shared = [lots.randrange(9) for _ in range(LONGEST)]
    prompts = [[lots.randrange(9) for _ in range(lots.randint(1, LONGEST))] for _ in range(count)]
    return [shared[: len(p) // 2] + p[len(p) // 2 :] if lots.random() < 0.5 else p for p in prompts]


def disturbed(scheduler: Scheduler, lots: random.Random) -> None:
    """Now and then the last row in line is preempted in the middle of a plan."""
    planner, state = scheduler._planner, scheduler._state
    make = planner._draft

    def draft(moves: Moves) -> Draft:
        state.order()
        if state.running and state.counters.preemptions < 20 and lots.random() < 0.2:
            state.preempt(state.running[-1], moves)
        return make(moves)

    planner._draft = draft  # type: ignore[method-assign]


def continuous(plan: Plan, whole: set[int], upto: dict[int, int]) -> None:
    """Rows that need all positions compute each of them, one after the other, since they entered."""
    for row in plan.new_rows:
        assert row.pooling is not None
        whole.discard(row.row)
        if row.pooling.skip_reading_prefix_cache:
            whole.add(row.row)
            upto[row.row] = 0
    for row, start, count in zip(plan.rows.tolist(), plan.starts.tolist(), plan.counts.tolist(), strict=True):
        if row in whole:
            assert start == upto[row]
            upto[row] = start + count


@pytest.mark.parametrize("groups", [(FULL,), (FULL, SLIDING)], ids=["full", "mixed"])
@pytest.mark.parametrize("host", [0, 40], ids=["recompute", "swap"])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("seed", range(8))
def test_each_prompt_is_pooled_once(seed: int, depth: int, host: int, groups: tuple[KVGroup, ...]) -> None:
    lots = random.Random(seed)
    scheduler = Scheduler(
        groups, 16 * len(groups), 4, 5, 11, LONGEST, num_host_blocks=host, policy="priority", lead=depth - 1
    )
    device = SimDevice(groups, 4)
    disturbed(scheduler, lots)
    prompts, names = prompts_of(lots, 30), dict[str, list[float]]()
    aborted: set[str] = set()
    whole, upto, inflight = set[int](), dict[int, int](), deque[Plan]()
    waiting = deque(range(len(prompts)))
    while waiting or scheduler.has_work:
        for _ in range(min(len(waiting), lots.randrange(4))):
            i = waiting.popleft()
            params = PoolingParams(task="embed", skip_reading_prefix_cache=lots.random() < 0.4)
            scheduler.add(Request(str(i), prompts[i], params, 0, priority=lots.randrange(3)))
        if lots.random() < 0.03:
            name = str(lots.randrange(len(prompts)))
            aborted |= {name} if scheduler.abort(name) else set()
        while len(inflight) < depth and (plan := scheduler.schedule()) is not None:
            assert not len(plan.sample_rows)
            inflight.append(plan)
            continuous(plan, whole, upto)
        if not inflight:
            continue
        if lots.random() < 0.02:
            for plan in inflight:  # the device has them already
                device.execute(plan)
            inflight.clear()
            scheduler.discard()
            device.forget()
            scheduler.check()
            continue
        plan = inflight.popleft()
        for delta in scheduler.commit(plan, device.execute(plan)):
            assert delta.finish is FinishReason.STOP and delta.pooled is not None and not delta.tokens
            names.setdefault(delta.request_id, []).extend(delta.pooled.tolist())
        scheduler.check()
    for i, prompt in enumerate(prompts):
        expected = [float(names_of(prompt)[-1] % 2**24)]
        assert names.get(str(i), expected if str(i) in aborted else []) == expected
    stats = scheduler.stats()
    assert (stats.running, stats.waiting, stats.blocks_used, stats.generation_tokens) == (0, 0, 0, 0)


def test_a_prompt_may_fill_the_length() -> None:
    scheduler = Scheduler((FULL,), 40, 4, 4, 8, LONGEST)
    scheduler.add(Request("a", [1] * LONGEST, PoolingParams(task="embed"), 0))
    with pytest.raises(ClientError, match="49 tokens, max_model_len=48 is less"):
        scheduler.add(Request("b", [1] * (LONGEST + 1), PoolingParams(task="embed"), 0))
    device, ended = SimDevice((FULL,), 4), 0
    while scheduler.has_work:
        plan = scheduler.schedule()
        assert plan is not None
        ended += len(scheduler.commit(plan, device.execute(plan)))
    assert ended == 1


def test_without_groups_nothing_is_kept() -> None:
    """Encoders: whole prompts only, and no pages."""
    scheduler = Scheduler((), 0, 4, 4, LONGEST, LONGEST, prefix_caching=False, chunked_prefill=False)
    for i in range(9):
        scheduler.add(Request(str(i), [1] * (5 * i + 3), PoolingParams(task="embed"), 0))
    device, ended = SimDevice((), 4), 0
    while scheduler.has_work:
        plan = scheduler.schedule()
        assert plan is not None and len(plan.pool_index) == len(plan.rows) and not plan.starts.any()
        ended += len(plan.rows)
        scheduler.commit(plan, execute_encoder(device, plan))
        scheduler.check()
    assert ended == 9 and scheduler.stats().kv_cache_usage == 0
    assert scheduler.block_map().runs == []


def execute_encoder(device: SimDevice, plan: Plan) -> object:
    device._prepare(plan)
    import numpy as np

    from quire.types.plan import StepResult, ints

    return StepResult(plan.number, ints((), (0, 1)), ints(), pooled=(np.zeros(2, np.float32),) * len(plan.rows))
