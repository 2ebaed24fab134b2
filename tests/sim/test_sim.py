"""Random workloads on the core: conservation after each step, and the same visible output however it is scheduled."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.core import state as state_module
from quire.core.blocks import BlockPool
from quire.core.kvcache import KVCacheManager
from quire.core.moves import Moves
from quire.types.kv import KVGroup
from quire.types.params import SamplingParams
from quire.types.plan import ints
from quire.types.request import FinishReason, Request

from .device import EOS, nothing
from .workload import MIXES, Engine, Job, Run, check_counters, check_output, sample_of

PREFIXES = [[1 + (i * 7 + j * j) % 9 for j in range(30)] for i in range(2)]

prompts = st.builds(
    lambda which, shared, tail: tuple(PREFIXES[which][:shared] + tail),
    st.integers(0, 1), st.integers(0, 24), st.lists(st.integers(1, 10), min_size=1, max_size=12),
)  # fmt: skip
optional_steps = st.none() | st.integers(0, 12)
jobs = st.lists(
    st.builds(
        Job,
        prompt=prompts, max_tokens=st.integers(1, 20), seed=st.integers(0, 2**59), n=st.sampled_from([1, 1, 1, 2, 5]),
        beams=st.sampled_from([0, 0, 0, 0, 1, 3]), penalty=st.sampled_from([0.0, 1.0, 2.0]), stream=st.booleans(),
        logprobs=st.sampled_from([None, None, 2]), priority=st.integers(-1, 1), arrive=st.integers(0, 10),
        abort=st.sampled_from([None, None, None, 0, 1, 3, 7]), cut=st.sampled_from([None, None, 1, 4, 9]),
        late=st.integers(0, 3), eos=st.sampled_from([(EOS,), (EOS,), (EOS, 1), ()]),
        stops=st.sampled_from([(), (), (), (), (3,), (1, 2, 3, 4, 6)]),
        ignore_eos=st.booleans(), min_tokens=st.sampled_from([0, 0, 3]),
        prompt_logprobs=st.sampled_from([None, None, None, None, 0, 2]),
        skip=st.sampled_from([False] * 5 + [True]), history=st.booleans(),
        fail=st.sampled_from([None] * 12 + [0, 1, 6]),
    ),
    min_size=1, max_size=9,
)  # fmt: skip
engines = st.builds(
    Engine,
    groups=st.sampled_from(MIXES), block_size=st.sampled_from([1, 2, 4, 16]),
    spare_blocks=st.sampled_from([0, 1, 5, 200]),
    host_blocks=st.sampled_from([0, 0, 3, 60]), max_num_seqs=st.sampled_from([1, 2, 5, 16]),
    budget=st.sampled_from([1, 3, 16, 200]), depth=st.sampled_from([1, 2, 4]), lead=st.integers(0, 1),
    prefix_caching=st.booleans(), chunked=st.booleans(), policy=st.sampled_from(["fcfs", "priority"]),
    faults=st.sampled_from([frozenset(), frozenset(), frozenset({3, 4, 9}), frozenset({6, 17})]),
    resets=st.sampled_from([frozenset(), frozenset({2, 5, 6, 11})]), histories=st.booleans(),
)  # fmt: skip


@settings(suppress_health_check=list(HealthCheck), report_multiple_bugs=False)
@given(jobs, engines)
def test_output_is_the_oracles_however_scheduled(jobs: list[Job], engine: Engine) -> None:
    jobs = [replace(job, seed=16 * job.seed + i, cut=None if job.beams else job.cut) for i, job in enumerate(jobs)]
    run = Run(engine, jobs)
    check_output(run)
    check_counters(run)


LONG = [Job((1 + i, *range(1, 10)), 30, seed=i, arrive=i // 2) for i in range(6)]


@pytest.mark.parametrize(("depth", "lead"), [(1, 0), (2, 0), (2, 1), (4, 0), (4, 1)])
@pytest.mark.parametrize("groups", MIXES, ids=lambda groups: "+".join(group.kind for group in groups))
def test_depths_preempt_and_agree(groups: tuple[KVGroup, ...], depth: int, lead: int) -> None:
    """Six long requests in a pool that holds little more than one: all of them preempted, none of them changed."""
    for host_blocks in (0, 40):
        run = Run(Engine(groups, spare_blocks=1, host_blocks=host_blocks, depth=depth, lead=lead), LONG)
        check_output(run)
        if groups in (MIXES[0], MIXES[-1]):  # others give back what is behind a window
            assert run.scheduler.stats().preemptions > 0


def test_a_lost_block_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks can fail: a fork that forgets to hold what it shares is caught by conservation."""
    monkeypatch.setattr(BlockPool, "hold", lambda self, block: None)
    with pytest.raises((AssertionError, KeyError)):
        Run(Engine(), [Job((1, 2, 3, 4, 5), 12, seed=1, n=3)])


def test_a_wrong_block_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a copy-on-write that does not copy, by the content of the cells."""
    monkeypatch.setattr(Moves, "pairs", lambda self, kind: ints((), (0, 2)))
    with pytest.raises((AssertionError, KeyError)):
        check_output(Run(Engine(), [Job((1, 2, 3, 4, 5), 12, seed=1, n=3)]))


def test_a_page_written_under_a_swap_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a fence that is forgotten: the device swaps out as late as it may."""
    swap_out = KVCacheManager.swap_out

    def forgetful(self: KVCacheManager, *args: object) -> bool:
        done = swap_out(self, *args)  # type: ignore[arg-type]
        self._swapped.clear()
        return done

    monkeypatch.setattr(KVCacheManager, "swap_out", forgetful)
    with pytest.raises(AssertionError, match="still being swapped out"):
        Run(Engine(spare_blocks=1, host_blocks=40, prefix_caching=False), LONG)


@pytest.mark.parametrize(("depth", "lead"), [(1, 0), (2, 1), (4, 0)])
@pytest.mark.parametrize("host_blocks", [0, 40])
def test_prompt_logprobs_survive_preemption(depth: int, lead: int, host_blocks: int) -> None:
    """Prompts longer than a step, so that some are preempted in the middle of theirs, with results in flight."""
    jobs = [
        Job(
            (*range(1, 10), *range(1, 10), 1 + i % 9, 2),
            24,
            i,
            n=1 + i % 2,
            prompt_logprobs=i % 3,
            arrive=i,
            priority=-i,
        )
        for i in range(7)
    ]
    run = Run(
        Engine(spare_blocks=2, host_blocks=host_blocks, depth=depth, lead=lead, budget=4, policy="priority"), jobs
    )
    check_output(run)
    check_counters(run)
    assert run.scheduler.stats().preemptions > 0
    assert run.prompts == [len(job.prompt) for job in jobs]


@pytest.mark.parametrize("ends", [(1,), (1, 2), (1, 2, 3, 4), (1, 2, 3, 4, 5), (1, 2, 3, 4, 5, 6, 7)])
def test_any_of_several_end_tokens_ends(ends: tuple[int, ...]) -> None:
    """A row holds four of them; who has more is looked up."""
    for eos, stops in ((ends, ()), ((), ends), (ends[:1], ends[1:])):
        jobs = [Job((1, 2, 3 + i), 30, seed=i, eos=eos, stops=stops, min_tokens=i % 3) for i in range(12)]
        run = Run(Engine(max_num_seqs=12, spare_blocks=200, lead=1, depth=2), jobs)
        check_output(run)
        stopped = {shown[0][-1] for shown, done in zip(run.shown, run.finished, strict=True) if done[0] == "stop"}
        assert len(stopped) > len(ends) // 2, "the last of them counts too"


def plain(name: str, prompt: list[int], **params: object) -> Request:
    return Request(name, prompt, SamplingParams(**params), 1, (EOS,))  # type: ignore[arg-type]


def test_late_ends_count_until_the_stop_string_only() -> None:
    """Whether the sequence goes on or has come to its own end before the output side speaks up."""
    job = Job((1, 2, 3), 12, seed=5, ignore_eos=True)
    for late in range(16):
        for cut in (1, 4, 11, 12):
            run = Run(Engine(block_size=2), [Job(job.prompt, 12, 5, ignore_eos=True, cut=cut, late=late)])
            check_output(run)
            assert run.scheduler.stats().generation_tokens == cut


def test_what_a_late_end_took_back_is_not_found() -> None:
    job = Job((1, 2, 3), 12, seed=5, ignore_eos=True)
    run = Run(Engine(block_size=2), [Job(job.prompt, 12, 5, ignore_eos=True, cut=3, late=40)])
    tokens = [*job.prompt, *sample_of(job, 0)]
    run.scheduler.add(plain("again", tokens))
    plan = run.scheduler.schedule()
    assert plan is not None and plan.starts.tolist() == [6], "the prompt and the three tokens before the stop string"


# -- a request that fails --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "lead"), [(1, 0), (2, 0), (2, 1), (4, 0)])
@pytest.mark.parametrize("groups", MIXES, ids=lambda groups: "+".join(group.kind for group in groups))
def test_failures_touch_nobody_else(groups: tuple[KVGroup, ...], depth: int, lead: int) -> None:
    jobs = [
        Job((1, 2, 3, 4, 5, 6, 7, 8, 9 - i), 16, seed=i, n=1 + i % 3, fail=(None, 0, None, 5)[i % 4], arrive=i // 3)
        for i in range(8)
    ]
    run = Run(Engine(groups, depth=depth, lead=lead, host_blocks=20), jobs)
    check_output(run)
    check_counters(run)
    ends = {reason for done in run.finished for reason in done.values()}
    assert FinishReason.ERROR in ends and FinishReason.LENGTH in ends


@pytest.mark.parametrize("host_blocks", [0, 200])
def test_what_a_failed_request_computed_is_not_found(host_blocks: int) -> None:
    """Neither its prompt nor its output; the prefix that it found in the cache itself is not to blame."""
    prefix, tail = [1, 2, 3, 4] * 2, [5, 6, 7, 8] * 2
    jobs = [
        Job((*prefix, 9), 1, seed=0),
        Job((*prefix, *tail, 9), 8, seed=1, arrive=4, fail=4, ignore_eos=True),
        Job((*prefix, *tail, 9, *sample_of(Job((*prefix, *tail, 9), 4, seed=1, ignore_eos=True), 0)), 4, 2, arrive=16),
        Job((*prefix, *tail, 9), 4, seed=3, arrive=24),
    ]
    run = Run(Engine(host_blocks=host_blocks, spare_blocks=200), jobs)
    check_output(run)
    assert run.finished[1][0] is FinishReason.ERROR
    assert run.cached == {0: 0, 1: 8, 2: 8, 3: 16}


# -- the prefix cache, from outside ----------------------------------------------------------------------------------


def test_a_reset_prefix_cache_gives_nothing() -> None:
    prompt = tuple([1, 2, 3, 4] * 4)
    jobs = [Job(prompt, 2, seed=i, arrive=10 * i) for i in range(3)]
    run = Run(Engine(spare_blocks=200, host_blocks=10, resets=frozenset({8})), jobs)
    check_output(run)
    check_counters(run)
    assert run.cached == {0: 0, 1: 0, 2: 12}
    run = Run(Engine(spare_blocks=200, host_blocks=10), jobs)
    assert run.cached == {0: 0, 1: 12, 2: 12}


def test_queries_count_only_where_the_cache_is_read() -> None:
    prompt = tuple([1, 2, 3, 4] * 4)
    jobs = [Job(prompt, 2, seed=i, arrive=5 * i, skip=i == 1, prompt_logprobs=0 if i == 2 else None) for i in range(4)]
    for caching, queries, hits in ((True, 32, 12), (False, 0, 0)):
        run = Run(Engine(spare_blocks=200, prefix_caching=caching), jobs)
        check_counters(run)
        stats = run.scheduler.stats()
        assert (stats.prefix_queries, stats.prefix_hits) == (queries, hits)


def test_the_cache_may_not_be_read_by_who_wants_prompt_logprobs() -> None:
    """Even where a request says otherwise: a cached position has no hidden state left to take them from."""
    run = Run(Engine(spare_blocks=200), [Job(tuple([1, 2, 3, 4] * 4), 2, seed=0)])
    request = plain("again", [1, 2, 3, 4] * 4, prompt_logprobs=0, skip_reading_prefix_cache=False)
    run.device.on_new = nothing
    run.device.fails = nothing
    run.scheduler.add(request)
    plan = run.scheduler.schedule()
    assert plan is not None
    (delta,) = run.scheduler.commit(plan, run.device.execute(plan))
    assert delta.prompt_logprobs is not None and sum(len(p.logprobs.ranks) for p in delta.prompt_logprobs) == 15


def test_rows_that_skip_the_cache_are_swapped_all_the_same() -> None:
    """Only prompt logprobs that are still owed make a prompt be computed again."""
    jobs = [Job((1 + i, *range(1, 10)), 30, seed=i, skip=True, ignore_eos=True) for i in range(6)]
    run = Run(Engine(spare_blocks=1, host_blocks=200), jobs)
    check_output(run)
    assert run.scheduler.stats().preemptions > 0
    assert run.device.computed == sum(len(job.prompt) + 30 - 1 for job in jobs), "nothing is computed twice"


# -- corners that random workloads seldom reach ----------------------------------------------------------------------


def test_a_page_that_a_sibling_took_to_the_host_is_written_behind_a_fence() -> None:
    """Samples share their prompt's last page. There is room for one copy of it; so one of them is swapped out, and the
    last of them writes the page itself."""
    prompt = tuple(1 + i % 9 for i in range(45))
    for caching in (True, False):
        engine = Engine(spare_blocks=1, host_blocks=20, budget=64, prefix_caching=caching)
        run = Run(engine, [Job(prompt, 3, seed=1, n=3, ignore_eos=True)])
        check_output(run)
        assert run.scheduler.stats().preemptions > 0
        assert run.device.computed == 45 + 3 * 2, "it was swapped, not computed again"


def test_what_a_failed_request_left_on_the_host_is_not_found() -> None:
    """It was swapped out and came back before it failed: its pages are in both places."""
    prompt = (9, 8, 7, 6, 5, 4, 3, 2, 1, 9)
    jobs = [
        Job(tuple(range(1, 11)), 30, seed=0, ignore_eos=True),
        Job(prompt, 30, seed=1, ignore_eos=True, fail=28),
        Job(prompt, 2, seed=2, arrive=120),
    ]
    for fail, cached in ((28, 0), (None, 8)):
        run = Run(Engine(spare_blocks=1, host_blocks=60), [jobs[0], replace(jobs[1], fail=fail), jobs[2]])
        check_output(run)
        assert run.scheduler.stats().preemptions > 0
        assert run.cached[2] == cached


def test_a_reset_reaches_the_host() -> None:
    prompt = tuple([1, 2, 3, 4] * 4)
    jobs = [
        Job(prompt, 1, seed=0),
        Job(tuple(1 + i * i % 10 for i in range(40)), 8, seed=1, arrive=5, ignore_eos=True),
        Job(prompt, 1, seed=2, arrive=40),
    ]
    for resets, cached in ((frozenset[int](), 12), (frozenset({39}), 0)):
        run = Run(Engine(spare_blocks=0, host_blocks=60, resets=resets), jobs)
        check_output(run)
        assert run.cached[2] == cached


def test_a_reset_reaches_states_that_the_last_plan_completed() -> None:
    """They are published when the next plan is made."""
    jobs = [Job((1, 2, 3, 4, 5, 6, 7, 8, 9), 4, seed=i, arrive=i) for i in range(2)]
    for resets, cached in ((frozenset[int](), 8), (frozenset({1}), 0)):
        run = Run(Engine((KVGroup("state", (0,)),), spare_blocks=20, resets=resets), jobs)
        check_output(run)
        assert run.cached == {0: 0, 1: cached}


@pytest.mark.parametrize("seed", range(8))
def test_prompt_logprobs_wait_for_the_first_sample(seed: int) -> None:
    """Others may end before it, and speak first where nothing is streamed."""
    job = Job((1, 2, 3, 4, 5), 30, seed=seed, n=5, stream=False, prompt_logprobs=1)
    run = Run(Engine(spare_blocks=200), [job])
    check_output(run)
    assert run.prompts == [5]


def test_prompt_logprobs_of_a_rows_last_owner_are_dropped() -> None:
    """Its chunks are in flight when it is aborted, and another prompt enters the row."""
    jobs = [
        Job(tuple(range(1, 11)), 4, seed=0, prompt_logprobs=1, abort=1),
        Job(tuple(range(10, 0, -1)), 4, seed=1, prompt_logprobs=1),
    ]
    run = Run(Engine(max_num_seqs=1, depth=4, budget=3), jobs)
    check_output(run)
    assert run.prompts[1] == 10


def test_no_more_is_remembered_of_the_ended_than_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_module, "REMEMBERED", 3)
    run = Run(Engine(), [Job((1, 2, 3 + i), 4, seed=i, ignore_eos=True) for i in range(2)])
    state = run.scheduler._state
    assert not state.ended, "nobody had stop strings"
    for i in range(5):
        run.device.on_new, run.device.fails = nothing, nothing
        run.scheduler.add(plain(str(i), [1, 2], max_tokens=1, stop="x"))
        plan = run.scheduler.schedule()
        assert plan is not None
        run.scheduler.commit(plan, run.device.execute(plan))
    assert list(state.ended) == [("2", 0), ("3", 0), ("4", 0)]
    run.scheduler.end("3", 0, 1)
    assert ("3", 0) not in state.ended, "it has been asked for"
    run.scheduler.add(plain("5", [1, 2], max_tokens=9, stop="x", ignore_eos=True))
    plan = run.scheduler.schedule()
    assert plan is not None
    run.scheduler.commit(plan, run.device.execute(plan))
    run.scheduler.end("5", 0, 1)
    assert ("5", 0) not in state.ended and not run.scheduler.has_work
