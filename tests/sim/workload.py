"""A workload, the engine that runs it, and what must be seen of it.

Owns: `Job` (a request and its user), `Engine` (how it is run), `Run` (the loop, with every check that holds at each
step) and the checks of the whole (`check_output`, `check_counters`).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from quire.core.kvcache import KVCacheManager
from quire.core.scheduler import Scheduler
from quire.types.kv import KVGroup
from quire.types.params import BeamSearchParams, SamplingParams
from quire.types.plan import NewRow, Plan, StepResult
from quire.types.request import Delta, FinishReason, Request

from .device import EOS, SimDevice, beam_oracle, logprobs_of, names_of, oracle

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
    resets: frozenset[int] = frozenset()  # steps before which the prefix cache is emptied
    histories: bool = False


@dataclass(frozen=True)
class Job:
    """A request and its user. Seeds tell jobs apart, on the device too."""

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
    eos: tuple[int, ...] = (EOS,)
    stops: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    prompt_logprobs: int | None = None
    skip: bool = False  # do not read the prefix cache
    history: bool = False  # drawing needs the tokens before
    fail: int | None = None  # drawing this output token of each sample goes wrong

    def request(self, i: int) -> Request:
        if self.beams:
            params = BeamSearchParams(
                beam_width=self.beams, max_tokens=self.max_tokens, length_penalty=self.penalty,
                ignore_eos=self.ignore_eos,
            )  # fmt: skip
        else:
            params = SamplingParams(
                n=self.n, max_tokens=self.max_tokens, logprobs=self.logprobs, stop_token_ids=list(self.stops),
                ignore_eos=self.ignore_eos, min_tokens=self.early, prompt_logprobs=self.prompt_logprobs,
                skip_reading_prefix_cache=self.skip or None, repetition_penalty=1.5 if self.history else 1.0,
                stop=None if self.cut is None else "what the output side looks for",
            )  # fmt: skip
        stream = self.stream or self.cut is not None
        return Request(str(i), list(self.prompt), params, self.seed, self.eos, self.priority, stream)

    @property
    def limit(self) -> int:
        return min(MAX_LENGTH, len(self.prompt) + self.max_tokens)

    @property
    def early(self) -> int:
        return min(self.min_tokens, self.max_tokens)

    @property
    def skips(self) -> bool:
        return not self.beams and (self.skip or self.prompt_logprobs is not None)


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
            histories=engine.histories,
        )  # fmt: skip
        self.device = SimDevice(engine.groups, engine.block_size, self._check_new, self._fails)
        self.engine, self.jobs = engine, jobs
        self.number = {job.seed: i for i, job in enumerate(jobs)}
        assert len(self.number) == len(jobs), "seeds tell jobs apart"
        self.shown: list[dict[int, list[int]]] = [{} for _ in jobs]
        self.finished: list[dict[int, FinishReason]] = [{} for _ in jobs]
        self.prompts: list[int] = [1 for _ in jobs]  # the next prompt position whose logprobs are due
        self.cached: dict[int, int] = {}  # how many tokens of its prompt a job did not compute
        self.cuts: list[tuple[int, str, int]] = []
        self.step = 0
        in_flight: deque[tuple[Plan, StepResult]] = deque()
        for self.step in range(4000):
            self._events()
            while len(in_flight) < engine.depth and (plan := self.scheduler.schedule()) is not None:
                self.scheduler.check()
                self._note_cached(plan)
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
            elif not self.scheduler.has_work and not self.cuts and self.step > max(job.arrive for job in jobs):
                break
        else:
            raise AssertionError("the workload never ends")
        stats = self.scheduler.stats()
        assert stats.blocks_used == 0 and stats.running == 0 and stats.waiting == 0

    def _events(self) -> None:
        if self.step in self.engine.resets:
            assert self.scheduler.reset_prefix_cache()
            assert self.scheduler.stats().blocks_cached == 0
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

    # -- what the device asks ----------------------------------------------------------------------------------------

    def _fails(self, new: NewRow, sample: int, outputs: int) -> str | None:
        fail = self.jobs[self.number[new.seed]].fail
        return f"output {outputs} of sample {sample}" if fail == outputs else None

    def _check_new(self, new: NewRow) -> None:
        """What enters a device row is what was asked and what is known."""
        i = self.number[new.seed]
        job, request = self.jobs[i], self.jobs[i].request(i)
        assert new.prompt_length == len(job.prompt) <= new.length < job.limit
        assert new.position_offset == 0
        if job.beams:
            assert new.eos_token_ids == () and new.params.num_logprobs == 2 * job.beams
        else:
            assert new.params == request.params
            assert new.eos_token_ids == (() if job.ignore_eos else job.eos)
            assert new.sample_index < job.n
        if not (self.engine.histories or (not job.beams and (job.history or job.prompt_logprobs is not None))):
            assert new.tokens.tolist() == []
            return
        tokens = new.tokens.tolist()
        assert len(tokens) == new.length and tokens[: len(job.prompt)] == list(job.prompt)
        if not job.beams:
            outputs = sample_of(job, new.sample_index)
            assert tokens[len(job.prompt) :] == outputs[: new.length - new.prompt_length]

    def _note_cached(self, plan: Plan) -> None:
        """The first plan of a job shows how much of its prompt is not computed."""
        for new in plan.new_rows:
            if (i := self.number[new.seed]) not in self.cached:
                (at,) = (plan.rows == new.row).nonzero()[0]
                self.cached[i] = start = int(plan.starts[at])
                assert start < new.prompt_length and start % self.engine.block_size == 0
                assert start == 0 or (self.engine.prefix_caching and not self.jobs[i].skips)

    # -- what the user sees ------------------------------------------------------------------------------------------

    def _take(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            i, index = int(delta.request_id), delta.index
            job = self.jobs[i]
            first = index not in self.shown[i]
            shown, cut = self.shown[i].setdefault(index, []), job.cut
            if index in self.finished[i]:
                assert cut is not None and index == 0, "a delta after the end"
                continue
            whole = job.beams and delta.finish in (FinishReason.STOP, FinishReason.LENGTH)
            if whole or not job.beams:
                assert delta.cached_tokens == (self.cached.get(i) if first else None)
            self._take_prompt_logprobs(i, delta)
            shown += delta.tokens
            if delta.finish is not None:
                self.finished[i][index] = delta.finish
                stopped = delta.finish is FinishReason.STOP and not job.beams
                token = shown[-1] if stopped and (job.ignore_eos or shown[-1] not in job.eos) else None
                assert delta.stop_token == token
                assert (delta.error is not None) == (delta.finish is FinishReason.ERROR)
            if cut is not None and index == 0 and len(shown) >= cut:
                del shown[cut:]
                self.finished[i][index] = FinishReason.STOP
                if delta.finish is None:
                    self.cuts.append((self.step + job.late, str(i), cut))

    def _take_prompt_logprobs(self, i: int, delta: Delta) -> None:
        """Each position 1 .. P-1 once, in order, all of them with the first token at the latest."""
        job = self.jobs[i]
        assert not delta.prompt_logprobs or (delta.index == 0 and job.prompt_logprobs is not None)
        names = names_of(list(job.prompt))
        for item in delta.prompt_logprobs or ():
            at, lines = self.prompts[i], item.logprobs
            assert item.start == at, "prompt logprobs out of order"
            self.prompts[i] = end = at + len(lines.ranks)
            right = logprobs_of(names[at - 1 : end - 1], list(job.prompt[at:end]), job.prompt_logprobs or 0)
            assert lines.ids.tolist() == right.ids.tolist() and lines.values.tolist() == right.values.tolist()
            assert lines.ranks.tolist() == right.ranks.tolist()
        if delta.tokens and delta.index == 0 and job.prompt_logprobs is not None and not job.beams:
            assert self.prompts[i] == len(job.prompt), "prompt logprobs are missing"


def sample_of(job: Job, index: int) -> list[int]:
    ends = (*(() if job.ignore_eos else job.eos), *job.stops)
    return oracle(list(job.prompt), job.seed, index, job.limit, ends, job.early)


def expected(job: Job) -> list[tuple[list[int], FinishReason | None]]:
    """Of each sequence: its tokens, and how it ends (None: any way, for beams)."""
    eos = () if job.ignore_eos else job.eos
    if job.beams:
        return [(line, None) for line in beam_oracle(list(job.prompt), job.beams, job.limit, eos, job.penalty)]
    outputs: list[tuple[list[int], FinishReason | None]] = []
    for i in range(job.n):
        tokens = sample_of(job, i)
        finish = FinishReason.STOP if tokens[-1] in (*eos, *job.stops) else FinishReason.LENGTH
        if job.fail is not None and job.fail < len(tokens):
            tokens, finish = tokens[: job.fail], FinishReason.ERROR
        if i == 0 and job.cut is not None and job.cut <= len(tokens):
            tokens, finish = tokens[: job.cut], FinishReason.STOP
        outputs.append((tokens, finish))
    return outputs


def check_output(run: Run) -> None:
    for job, shown, finished in zip(run.jobs, run.shown, run.finished, strict=True):
        for index, (tokens, finish) in enumerate(expected(job)):
            cut_short = finished.get(index) is FinishReason.ABORT or (job.abort is not None and index not in finished)
            if job.beams and finished.get(index, FinishReason.ERROR) is FinishReason.ERROR:
                assert cut_short or job.fail is not None
            elif cut_short:
                assert job.beams or shown.get(index, []) == tokens[: len(shown.get(index, []))]
            else:
                assert shown[index] == tokens, f"sample {index} of {job}"
                assert finish in (None, finished[index]), f"sample {index} of {job}"


def check_counters(run: Run) -> None:
    stats = run.scheduler.stats()
    if not any(job.beams and (job.abort is not None or job.fail is not None) for job in run.jobs):
        seen = sum(len(tokens) for shown in run.shown for tokens in shown.values())
        assert stats.generation_tokens == seen, "tokens are counted that nobody saw, or the other way round"
    asking = [i for i in run.cached if run.engine.prefix_caching and not run.jobs[i].skips]
    assert stats.prefix_queries == sum(len(run.jobs[i].prompt) for i in asking)
    assert stats.prefix_hits == sum(run.cached[i] for i in asking)
    assert stats.prompt_tokens == sum(len(job.prompt) for job in run.jobs)
