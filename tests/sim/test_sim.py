"""Random workloads on the core: conservation after each step, and the same visible output however it is scheduled."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.core.blocks import BlockPool
from quire.core.kvcache import KVCacheManager
from quire.core.moves import Moves
from quire.core.scheduler import Scheduler
from quire.types.kv import KVGroup
from quire.types.params import BeamSearchParams, SamplingParams
from quire.types.plan import Plan, StepResult, ints
from quire.types.request import Delta, FinishReason, Request

from .device import EOS, SimDevice, beam_oracle, oracle

FULL = KVGroup("full", (0, 1))
MIXES = (
    (FULL,),
    (KVGroup("sliding", (0, 1), 5),),
    (FULL, KVGroup("sliding", (2, 3), 7)),
    (FULL, KVGroup("sliding", (2, 3), 1), KVGroup("sliding", (4, 5), 6)),
    (FULL, KVGroup("state", (2, 3))),
    (KVGroup("state", (0,)),),
    (KVGroup("latent", (0, 1)),),
)


@dataclass(frozen=True)
class Engine:
    """How a workload is run: nothing here may be visible in its output."""

    groups: tuple[KVGroup, ...] = MIXES[0]
    block_size: int = 4
    spare_blocks: int = 8
    host_blocks: int = 0
    max_num_seqs: int = 8
    budget: int = 16
    depth: int = 1
    lead: int = 0
    prefix_caching: bool = True
    chunked: bool = True
    policy: str = "fcfs"
    faults: frozenset[int] = frozenset()  # steps whose results are lost: everything in flight starts over


@dataclass(frozen=True)
class Job:
    prompt: tuple[int, ...]
    max_tokens: int
    seed: int
    n: int = 1
    beams: int = 0
    penalty: float = 1.0
    stream: bool = True
    logprobs: int | None = None
    priority: int = 0
    arrive: int = 0  # step at which it comes
    abort: int | None = None  # step at which it is aborted
    cut: int | None = None  # a "stop string" ends sequence 0 with this output token; found `late` steps later
    late: int = 0

    def request(self, i: int) -> Request:
        if self.beams:
            params = BeamSearchParams(beam_width=self.beams, max_tokens=self.max_tokens, length_penalty=self.penalty)
        else:
            params = SamplingParams(n=self.n, max_tokens=self.max_tokens, logprobs=self.logprobs)
        stream = self.stream or self.cut is not None
        return Request(str(i), list(self.prompt), params, self.seed, (EOS,), self.priority, stream)


MAX_LENGTH = 48


class Run:
    """One workload on one engine, by the loop of the design; `shown[i][index]` is what the user sees."""

    def __init__(self, engine: Engine, jobs: list[Job]) -> None:
        kv = KVCacheManager(engine.groups, 1, engine.block_size)
        blocks = kv.worst_case(MAX_LENGTH, engine.budget) + engine.spare_blocks
        self.scheduler = Scheduler(
            engine.groups, blocks, engine.block_size, engine.max_num_seqs, engine.budget, MAX_LENGTH,
            num_host_blocks=engine.host_blocks, prefix_caching=engine.prefix_caching, chunked_prefill=engine.chunked,
            policy=engine.policy, stages=1 if engine.lead else engine.depth, lead=engine.lead,
        )  # fmt: skip
        self.device = SimDevice(engine.groups, engine.block_size)
        self.jobs = jobs
        self.shown: list[dict[int, list[int]]] = [{} for _ in jobs]
        self.finished: list[dict[int, FinishReason]] = [{} for _ in jobs]
        self.cuts: list[tuple[int, str, int]] = []
        self.step = 0
        in_flight: deque[tuple[Plan, StepResult]] = deque()
        for self.step in range(4000):
            self._events()
            while len(in_flight) < engine.depth and (plan := self.scheduler.schedule()) is not None:
                self.scheduler.check()
                in_flight.append((plan, self.device.execute(plan)))
            if in_flight and self.step in engine.faults:
                suspects = self.scheduler.discard()
                assert set(suspects) <= {str(i) for i in range(len(jobs))}
                self.device.forget()
                in_flight.clear()
                self.scheduler.check()
            elif in_flight:
                self._take(self.scheduler.commit(*in_flight.popleft()))
                self.scheduler.check()
            elif not self.scheduler.has_work and self.step > max(job.arrive for job in jobs):
                break
        else:
            raise AssertionError("the workload never ends")
        stats = self.scheduler.stats()
        assert stats.blocks_used == 0 and stats.running == 0 and stats.waiting == 0

    def _events(self) -> None:
        for i, job in enumerate(self.jobs):
            if job.arrive == self.step:
                self.scheduler.add(job.request(i))
            if job.abort is not None and job.arrive + job.abort == self.step:
                self._take(self.scheduler.abort(str(i)))
        due = [cut for cut in self.cuts if cut[0] <= self.step]
        self.cuts = [cut for cut in self.cuts if cut[0] > self.step]
        for _, name, at in due:
            self.scheduler.end(name, 0, at)
        self.scheduler.check()

    def _take(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            i, index = int(delta.request_id), delta.index
            shown, cut = self.shown[i].setdefault(index, []), self.jobs[i].cut
            if index in self.finished[i]:
                assert cut is not None and index == 0, "a delta after the end"
                continue
            shown += delta.tokens
            if delta.finish is not None:
                self.finished[i][index] = delta.finish
            if cut is not None and index == 0 and len(shown) >= cut:
                del shown[cut:]
                self.finished[i][index] = FinishReason.STOP
                if delta.finish is None:
                    self.cuts.append((self.step + self.jobs[i].late, str(i), cut))


def expected(job: Job) -> list[list[int]]:
    limit = min(MAX_LENGTH, len(job.prompt) + job.max_tokens)
    if job.beams:
        return beam_oracle(list(job.prompt), job.beams, limit, (EOS,), job.penalty)
    outputs = [oracle(list(job.prompt), job.seed, i, limit, (EOS,)) for i in range(job.n)]
    if job.cut is not None:
        outputs[0] = outputs[0][: job.cut]
    return outputs


def check_output(run: Run) -> None:
    for job, shown, finished in zip(run.jobs, run.shown, run.finished, strict=True):
        for index, tokens in enumerate(expected(job)):
            if finished.get(index) is FinishReason.ABORT or (job.abort is not None and index not in finished):
                assert job.beams or shown.get(index, []) == tokens[: len(shown.get(index, []))]
            else:
                assert shown[index] == tokens, f"sample {index} of {job}"


PREFIXES = [[1 + (i * 7 + j * j) % 9 for j in range(30)] for i in range(2)]

prompts = st.builds(
    lambda which, shared, tail: tuple(PREFIXES[which][:shared] + tail),
    st.integers(0, 1), st.integers(0, 24), st.lists(st.integers(1, 10), min_size=1, max_size=12),
)  # fmt: skip
optional_steps = st.none() | st.integers(0, 12)
jobs = st.lists(
    st.builds(
        Job,
        prompt=prompts, max_tokens=st.integers(1, 20), seed=st.integers(0, 2**63), n=st.sampled_from([1, 1, 1, 2, 5]),
        beams=st.sampled_from([0, 0, 0, 0, 1, 3]), penalty=st.sampled_from([0.0, 1.0, 2.0]), stream=st.booleans(),
        logprobs=st.sampled_from([None, None, 2]), priority=st.integers(-1, 1), arrive=st.integers(0, 10),
        abort=st.sampled_from([None, None, None, 0, 1, 3, 7]), cut=st.sampled_from([None, None, 1, 4, 9]),
        late=st.integers(0, 3),
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
)  # fmt: skip


@settings(suppress_health_check=list(HealthCheck), report_multiple_bugs=False)
@given(jobs, engines)
def test_output_is_the_oracles_however_scheduled(jobs: list[Job], engine: Engine) -> None:
    jobs = [replace(job, cut=None) if job.beams else job for job in jobs]
    check_output(Run(engine, jobs))


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
