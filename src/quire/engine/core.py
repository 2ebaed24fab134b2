"""The loop: schedule, submit, commit. Owns the plans in flight; the scheduler and the executor own the rest.

A step that fails harms the requests that it ran, and no others: they end with its error, everything else starts over
from its known tokens.
"""

from __future__ import annotations

import logging
from collections import deque

from quire.config.schema import Config
from quire.core.scheduler import Scheduler
from quire.executor.base import Executor, Result
from quire.runner.logits import has_processors
from quire.types.errors import EngineError
from quire.types.plan import Plan
from quire.types.request import Delta, Request
from quire.types.stats import EngineStats

log = logging.getLogger(__name__)


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
        self._inflight: deque[tuple[Plan, Result]] = deque()

    def step(self) -> list[Delta]:
        """Keep the device busy, then take in the oldest result. Raises `EngineError` if the workers are gone."""
        try:
            while len(self._inflight) < self._depth and (plan := self._scheduler.schedule()) is not None:
                self._inflight.append((plan, self._executor.submit(plan)))
            if not self._inflight:
                if self._scheduler.has_work:
                    raise EngineError(
                        "nothing can be scheduled, though requests are waiting: this is a defect of quire"
                    )
                return []
            plan, pending = self._inflight[0]
            deltas = self._scheduler.commit(plan, pending.result())
            self._inflight.popleft()
            return deltas
        except EngineError:
            raise
        except Exception as error:
            return self._recover(error)
        except BaseException:  # Ctrl-C in the middle of a step: nobody knows how far it came
            self._restart()
            raise

    def _recover(self, error: Exception) -> list[Delta]:
        log.error("a step failed; its requests end with an error, others start over", exc_info=error)
        message = f"{type(error).__name__}: {error}"
        suspects = self._restart()
        if not suspects:
            raise EngineError(f"a step without requests failed: {message}") from error
        return [delta for name in suspects for delta in self._scheduler.fail(name, message)]

    def _restart(self) -> list[str]:
        """Forget the plans in flight; who was in the oldest one."""
        for _, pending in self._inflight:
            try:
                pending.result()  # the device must not be at work any more on rows and blocks that are given away
            except Exception as later:
                log.debug("a plan in flight: %s", later)
        self._inflight.clear()
        return self._scheduler.discard()

    def add(self, request: Request) -> None:
        """Raises `ClientError` if the request can never run here."""
        self._scheduler.add(request)

    def abort(self, request_ids: list[str]) -> None:
        """End requests at once; their blocks are free for the next plan. Unknown ids are ignored."""
        for name in request_ids:
            self._scheduler.abort(name)

    def end(self, request_id: str, index: int, at: int) -> None:
        """A sequence ended with its output token number `at` (a stop string): what came after never was."""
        self._scheduler.end(request_id, index, at)

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    def stats(self) -> EngineStats:
        return self._scheduler.stats()

    def reset_prefix_cache(self) -> bool:
        return self._scheduler.reset_prefix_cache()

    def check(self) -> None:
        """Assert the core's invariants (tests and debugging)."""
        self._scheduler.check()

    def shutdown(self) -> None:
        self._inflight.clear()
        self._executor.shutdown()
