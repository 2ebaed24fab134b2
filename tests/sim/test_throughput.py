"""What scheduling is for: plans stay in flight, nobody is let in where there is no room, and one who must wait does not
hold up the others."""

from __future__ import annotations

import time
from collections import deque

import pytest

from quire.core.scheduler import Scheduler
from quire.types.kv import KVGroup
from quire.types.params import SamplingParams
from quire.types.plan import Plan, StepResult
from quire.types.request import Request

from .device import SimDevice

GROUPS = (KVGroup("full", (0,)),)


def make(num_blocks: int = 2000, block_size: int = 16, **options: int) -> tuple[Scheduler, SimDevice]:
    settings = {"max_num_seqs": 64, "max_num_batched_tokens": 2048, "max_model_len": 256, **options}
    return Scheduler(GROUPS, num_blocks, block_size, **settings), SimDevice(GROUPS, block_size)


def request(name: str, prompt: list[int], max_tokens: int = 64, **options: int) -> Request:
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True), int(name), **options)


def step(scheduler: Scheduler, device: SimDevice) -> Plan:
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.commit(plan, device.execute(plan))
    scheduler.check()
    return plan


@pytest.mark.parametrize("queued", [0, 3, 8, 64, 1000])
def test_every_stage_of_a_pipeline_has_a_plan(queued: int) -> None:
    """However many wait behind the rows, each plan takes its share of them and leaves the others to the next."""
    scheduler, device = make(stages=4, max_num_seqs=8)
    for i in range(8 + queued):
        scheduler.add(request(str(i), [i + 1, 2, 3]))
    in_flight: deque[tuple[Plan, StepResult]] = deque()
    depths, sizes = list[int](), list[int]()
    for _ in range(60):
        while len(in_flight) < 4 and (plan := scheduler.schedule()) is not None:
            in_flight.append((plan, device.execute(plan)))
        depths.append(len(in_flight))
        sizes.append(len(in_flight[0][0].rows))
        scheduler.commit(*in_flight.popleft())
        scheduler.check()
    assert sum(depths) / len(depths) > 3.9
    assert max(sizes) == 2, "eight rows, four stages"


def test_one_stage_puts_all_rows_into_one_plan() -> None:
    scheduler, device = make(max_num_seqs=8)
    for i in range(20):
        scheduler.add(request(str(i), [i + 1, 2, 3]))
    assert len(step(scheduler, device).rows) == 8
    assert len(step(scheduler, device).rows) == 8


def test_a_lead_fills_the_pipeline_with_the_same_rows() -> None:
    scheduler, device = make(max_num_seqs=8, lead=1)
    for i in range(8):
        scheduler.add(request(str(i), [i + 1, 2, 3]))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert first is not None and second is not None and scheduler.schedule() is None
    assert sorted(first.rows.tolist()) == sorted(second.rows.tolist()) == list(range(8))
    assert second.upper.all()
    for plan in (first, second):
        scheduler.commit(plan, device.execute(plan))
    scheduler.check()


def test_nobody_enters_without_room() -> None:
    """The pool holds two prompts of eight blocks; a third is not let in to be preempted at once."""
    scheduler, device = make(num_blocks=20)
    for i in range(3):
        scheduler.add(request(str(i), [i * 300 + j for j in range(128)], max_tokens=20))
    for _ in range(20):
        step(scheduler, device)
        stats = scheduler.stats()
        assert stats.preemptions == 0
        assert (stats.running, stats.waiting) in ((2, 1), (0, 1))
    step(scheduler, device)
    assert scheduler.stats().running == 1, "now there is room"
    assert device.computed == 3 * 128 + 2 * 19


def test_room_is_asked_for_the_whole_prompt_not_for_its_first_chunk() -> None:
    scheduler, device = make(num_blocks=20, max_num_batched_tokens=16)
    scheduler.add(request("0", list(range(128))))
    for _ in range(9):
        step(scheduler, device)
    scheduler.add(request("1", list(range(300, 500))))
    for _ in range(5):
        assert step(scheduler, device).rows.tolist() == [0]
        assert scheduler.stats().waiting == 1
    assert scheduler.stats().preemptions == 0


@pytest.mark.parametrize("chunked", [True, False])
def test_a_head_that_must_wait_does_not_stop_decoding(chunked: bool) -> None:
    scheduler, device = make(num_blocks=16, max_num_batched_tokens=256, chunked_prefill=chunked)
    scheduler.add(request("0", [1, 2, 3], max_tokens=40))
    step(scheduler, device)
    scheduler.add(request("1", list(range(250))))
    scheduler.add(request("2", [4, 5, 6]))
    for _ in range(39):
        plan = step(scheduler, device)
        assert plan.counts.tolist() == [1], "the first goes on; nobody overtakes the head of the queue"
        assert scheduler.stats().waiting == 2
    assert step(scheduler, device).counts.tolist() == [250]


def test_a_head_that_must_wait_is_let_in_when_its_prefix_is_shared() -> None:
    """Its situation counts anew when something has changed: here a block that it shares was found."""
    scheduler, device = make(num_blocks=17, block_size=16)
    prompt = [7 * i % 501 for i in range(160)]
    scheduler.add(request("0", prompt, max_tokens=30))
    scheduler.add(request("1", [9] * 120, max_tokens=2))
    scheduler.add(request("2", prompt, max_tokens=8))
    step(scheduler, device)
    assert (scheduler.stats().running, scheduler.stats().waiting) == (1, 2)
    scheduler.abort("1")
    plan = step(scheduler, device)
    assert sorted(plan.counts.tolist()) == [1, 16], "all of its prompt but the last block is there"


def test_a_head_that_must_wait_costs_no_look_up_each_step() -> None:
    scheduler, device = make(num_blocks=16)
    scheduler.add(request("0", [1, 2, 3], max_tokens=40))
    step(scheduler, device)
    scheduler.add(request("1", list(range(250))))
    step(scheduler, device)
    calls = list[int]()
    kv = scheduler._state.kv
    lookup = kv.lookup
    kv.lookup = lambda seq: calls.append(1) or lookup(seq)  # type: ignore[method-assign]
    for _ in range(8):
        step(scheduler, device)
    assert not calls


def test_a_swapped_sequence_whose_pages_are_still_here_copies_nothing() -> None:
    scheduler, device = make(num_blocks=16, num_host_blocks=40, max_num_seqs=2, max_num_batched_tokens=512)
    scheduler.add(request("0", list(range(108)), max_tokens=100))
    scheduler.add(request("1", [500 + i for i in range(112)], max_tokens=100))
    while scheduler.stats().preemptions == 0:
        plan = step(scheduler, device)
    assert len(plan.swap_out) == 8 and scheduler.stats().waiting == 1
    scheduler.abort("0")  # nothing has been written over what the second one had
    plan = step(scheduler, device)
    assert scheduler.stats().running == 1
    assert len(plan.swap_in) == 0 and plan.fence == -1, "its blocks are still on the device"
    assert plan.starts.tolist() == [128], "and nothing is computed twice"


def test_many_that_wait_cost_nothing_while_they_do() -> None:
    """A step must not look at each of the queue: thousands that wait may not make it ten times as slow."""

    def seconds(waiting: int) -> float:
        scheduler, device = make(max_num_seqs=4, max_model_len=2048)
        for i in range(4 + waiting):
            scheduler.add(request(str(i), [1 + i % 50, 2, 3], max_tokens=1000))
        step(scheduler, device)
        times = list[float]()
        for _ in range(40):
            begin = time.perf_counter()
            plan = scheduler.schedule()
            times.append(time.perf_counter() - begin)
            assert plan is not None
            scheduler.commit(plan, device.execute(plan))
        return min(times)

    assert seconds(3_000) < 10 * seconds(0)
