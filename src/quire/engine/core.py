"""The loop: schedule, submit, commit. Owns the plans in flight; the scheduler and the executor own the rest.

A step that fails is taken again from the tokens that are known; if it keeps failing, the request whose work it is ends
with the error, and no other (`engine/trial.py`). Where the device itself is broken, the engine is.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass

import msgspec

from quire.config.schema import Config
from quire.core.scheduler import Scheduler
from quire.engine.pace import Pace
from quire.engine.trial import Trial
from quire.executor.base import Executor, Result
from quire.metrics.ranges import make_ranges
from quire.runner.processors import has_processors
from quire.types.errors import ClientError, EngineError
from quire.types.params import SamplingParams
from quire.types.plan import Plan
from quire.types.request import Delta, FinishReason, Request
from quire.types.stats import BlockMap, EngineStats
from quire.utils.logging import fields

log = logging.getLogger(__name__)
_GRAMMAR_S = 0.005  # how long a step waits for grammars where there is nothing else to do
# The next plan may wait for requests until so much of the step on the device should be over, but for the seconds that
# the host takes to plan and to submit.
_SURE, _HOST_S = 0.85, 0.0015


@dataclass(slots=True)
class Times:
    """Of a request whose first delta is not out: when it was first planned, the plan that draws its first token, and
    when that came; in seconds of the monotonic clock."""

    planned: float
    plan: int = -1
    first: float | None = None


class EngineCore:
    """Not thread-safe: one thread calls it."""

    def __init__(self, config: Config, executor: Executor) -> None:
        cache, schedule = config.cache, config.scheduler
        # Code of the user's reads all tokens so far on the host, so none of them may be unknown there.
        processors = has_processors(config.model.logits_processors)
        self._scheduler = Scheduler(
            executor.kv_groups,
            executor.num_blocks,
            cache.block_size,
            schedule.max_num_seqs,
            schedule.max_num_batched_tokens,
            config.model.max_model_len,
            num_host_blocks=executor.num_host_blocks,
            prefix_caching=cache.enable_prefix_caching,
            chunked_prefill=schedule.enable_chunked_prefill,
            policy=schedule.scheduling_policy,
            stages=config.parallel.pipeline_parallel_size,
            lead=0 if processors else schedule.lead,
            histories=processors,
            # A CPU's pages cost nothing before they are used. Where nobody said how many there are to be, the memory
            # belongs to the machine's other programs as long as no sequence needs it.
            grows=config.device.device == "cpu"
            and not cache.num_gpu_blocks_override
            and not cache.kv_cache_memory_bytes,
        )
        self._executor = executor
        self._depth = schedule.depth
        self._range = make_ranges(config.observability.nvtx, config.device.device)
        self._inflight: deque[tuple[Plan, Result]] = deque()
        self._trial = Trial(self._scheduler.reached)
        self._times: dict[str, Times] = {}
        self._received = 0
        self._deferred: dict[str, tuple[Request, Future[None]]] = {}  # their grammars are being compiled
        paced = schedule.target_step_ms > 0 and schedule.enable_chunked_prefill
        self._pace = Pace(schedule.target_step_ms / 1e3) if paced else None
        self._begun = deque[float]()  # when the plans in flight were submitted
        self.step_tokens = 0
        self.progress = time.monotonic()  # when something was last computed

    def step(self) -> list[Delta]:
        """Keep the device busy, then take in the oldest result. Raises `EngineError` if the workers are gone.
        `step_tokens` is then how many tokens that step computed."""
        self.step_tokens = 0
        failed = self._admit() if self._deferred else []
        return [*failed, *self._step()]

    def _step(self) -> list[Delta]:
        try:
            depth = self._depth if self._trial.running is None else 1
            while len(self._inflight) < depth and (plan := self._plan()) is not None:
                self._begun.append(time.monotonic())
                with self._range("submit"):
                    self._inflight.append((plan, self._executor.submit(plan)))
            if not self._inflight:
                return self._nothing_planned()
            plan, pending = self._inflight[0]
            with self._range("wait"):
                result = pending.result()
            with self._range("commit"):
                deltas = self._scheduler.commit(plan, result)
            self._inflight.popleft()
            self.step_tokens = int(plan.counts.sum())
            self._measure(plan)
            if self._trial.passed():
                self._scheduler.only(self._trial.running)
            self._tell(deltas, plan.number)
            return deltas
        except EngineError:
            raise
        except Exception as error:
            return self._recover(error)
        except BaseException:  # Ctrl-C in the middle of a step: nobody knows how far it came
            self._restart()
            raise

    def idle(self) -> bool:
        """Where there is no work: prepares for work to come, a little. False: nothing is left to prepare."""
        return self._executor.idle()

    def spare(self) -> float:
        """Seconds for which `step` may come later without the device waiting: a plan that is made later has the
        requests in it that came meanwhile."""
        if self._pace is None or len(self._inflight) != self._depth - 1 or not self._inflight:
            return 0.0
        plan, pending = self._inflight[-1]
        if pending.done():
            return 0.0
        begun, prompt = max(self._begun[-1], self.progress), len(plan.tokens)
        seconds = self._pace.expected(prompt, int(plan.counts.sum()) - prompt)
        return begun + _SURE * seconds - _HOST_S - time.monotonic()

    def _plan(self) -> Plan | None:
        with self._range("schedule"):
            if (plan := self._scheduler.schedule()) is not None:
                self._stamp(plan)
        return plan

    def _measure(self, plan: Plan) -> None:
        """A step is done: it began when it was submitted, or when the one before it ended."""
        now = time.monotonic()
        begun = max(self._begun.popleft(), self.progress)
        self.progress = now
        if self._pace is not None:
            prompt = len(plan.tokens)
            self._pace.took(prompt, self.step_tokens - prompt, now - begun)
            self._scheduler.limit_prompts(self._pace.tokens())

    def _stamp(self, plan: Plan) -> None:
        entered, sampled = self._scheduler.firsts()
        if entered:
            now = time.monotonic()
            for name in entered:
                self._times[name] = Times(now)
        for name in sampled:
            if (times := self._times.get(name)) is not None:
                times.plan = plan.number

    def _tell(self, deltas: list[Delta], number: int) -> None:
        """The first delta of a request tells when it was planned and when its first token came."""
        if not self._times:
            return
        now = time.monotonic()
        for times in self._times.values():
            if times.plan == number:
                times.first = now
        for delta in deltas:
            if (times := self._times.get(delta.request_id)) is not None and times.first is not None:
                delta.planned, delta.first = times.planned, times.first
                del self._times[delta.request_id]

    def _nothing_planned(self) -> list[Delta]:
        if not self._scheduler.has_work:
            return []
        if self._trial.running is None:
            raise EngineError("nothing can be scheduled, though requests are waiting: this is a defect of quire")
        self._trial.passed()  # those on trial were aborted
        self._scheduler.only(self._trial.running)
        return []

    def _recover(self, error: Exception) -> list[Delta]:
        message = f"{type(error).__name__}: {error}"
        suspects = self._restart()
        if not suspects:
            raise EngineError(f"a step without requests failed: {message}") from error
        if type(error).__name__ == "AcceleratorError":  # the context of a GPU does not come back
            raise EngineError(f"the device failed: {message}") from error
        guilty = self._trial.failed(suspects, _is_memory(error))
        if guilty is None:
            log.warning("a step of %d requests failed and is taken again in halves: %s", len(suspects), message)
        else:
            about = fields(request_id=guilty)
            log.error("request %s makes steps fail and is ended", guilty, exc_info=error, extra=about)
        if self._trial.broken:
            raise EngineError(f"steps of different requests fail one after the other: {message}") from error
        deltas = [] if guilty is None else self._scheduler.fail(guilty, message)
        self._times.pop(guilty or "", None)
        self._scheduler.only(self._trial.running)
        return deltas

    def _restart(self) -> dict[str, int]:
        """Forget the plans in flight; who was in the oldest one, and how far it was to come."""
        for _, pending in self._inflight:
            try:
                pending.result()  # the device must not be at work any more on rows and blocks that are given away
            except Exception as later:
                log.debug("a plan in flight: %s", later)
        self._inflight.clear()
        self._begun.clear()
        return self._scheduler.discard()

    def add(self, request: Request) -> None:
        """Raises `ClientError` if the request can never run here. One with a grammar waits, if need be, until that is
        compiled, and no other waits with it."""
        self._received += 1
        params = request.params
        if isinstance(params, SamplingParams) and params.structured_outputs is not None:
            if request.id in self._deferred:
                raise ClientError(f"request id {request.id!r} is in use", "request_id", request.id)
            assert params.structured_outputs.grammar is not None
            ready = self._executor.prepare(params.structured_outputs.grammar, params.eos_token_ids)
            if not ready.done():
                self._deferred[request.id] = request, ready
                return
        self._enter(request)

    def _admit(self) -> list[Delta]:
        """The requests whose grammars are ready enter; answers those that cannot."""
        if not self._scheduler.has_work:
            wait([ready for _, ready in self._deferred.values()], _GRAMMAR_S, FIRST_COMPLETED)
        failed: list[Delta] = []
        for name, (request, ready) in list(self._deferred.items()):
            if not ready.done():
                continue
            del self._deferred[name]
            try:
                ready.result()
                self._enter(request)
            except Exception as error:
                log.warning("request %s cannot run: %s", name, error, extra=fields(request_id=name))
                failed.append(Delta(name, 0, [], FinishReason.ERROR, error=str(error)))
        return failed

    def _enter(self, request: Request) -> None:
        self._scheduler.add(request)
        if self._trial.running is not None:
            self._scheduler.only(self._trial.running)

    def abort(self, request_ids: list[str]) -> None:
        """End requests at once; their blocks are free for the next plan. Unknown ids are ignored."""
        for name in request_ids:
            self._times.pop(name, None)
            self._deferred.pop(name, None)
            self._scheduler.abort(name)

    def end(self, request_id: str, index: int, at: int) -> None:
        """A sequence ended with its output token number `at` (a stop string): what came after never was."""
        self._scheduler.end(request_id, index, at)

    def alive(self, request_id: str) -> bool:
        """Whether a request has not ended."""
        return request_id in self._deferred or self._scheduler.reached(request_id) is not None

    @property
    def has_work(self) -> bool:
        return bool(self._deferred) or self._scheduler.has_work

    def stats(self) -> EngineStats:
        s, late = self._scheduler.stats(), len(self._deferred)
        return msgspec.structs.replace(s, received=self._received, waiting=s.waiting + late, deferred=late)

    def queue(self) -> tuple[EngineStats, int]:
        """The statistics, and how many requests they do not know of: none, here."""
        return self.stats(), 0

    def reset_prefix_cache(self) -> bool:
        return self._scheduler.reset_prefix_cache()

    def block_map(self, first: int = 0, count: int = 0) -> BlockMap:
        """Who holds the blocks `first .. first+count-1`; a count of 0: all from `first` on."""
        begin = time.thread_time()  # what others do on the machine is not its cost
        found = self._scheduler.block_map(first, count)
        return msgspec.structs.replace(found, seconds=time.thread_time() - begin)

    def wake(self) -> None:
        """Have `step` return soon; here it never waits for anything but the device."""

    def check(self) -> None:
        """Assert the core's invariants (tests and debugging)."""
        self._scheduler.check()

    def shutdown(self) -> None:
        self._inflight.clear()
        self._executor.shutdown()


def _is_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
