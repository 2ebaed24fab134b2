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
            depth=schedule.depth,
            lead=0 if processors else schedule.lead,
            histories=processors,
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
                return []
            plan, pending = self._inflight.popleft()
            result = pending.result()
        except EngineError:
            raise
        except Exception as error:
            return self._recover(error)
        except BaseException:  # Ctrl-C in the middle of a step: nobody knows how far it came
            self._inflight.clear()
            self._scheduler.discard()
            raise
        return self._scheduler.commit(plan, result)

    def _recover(self, error: Exception) -> list[Delta]:
        log.exception("a step failed; its requests end with an error, others start over", exc_info=error)
        for _, pending in self._inflight:
            try:
                pending.result()
            except Exception as later:
                log.debug("a plan behind the failed one: %s", later)
        self._inflight.clear()
        message = f"{type(error).__name__}: {error}"
        return [delta for name in self._scheduler.discard() for delta in self._scheduler.fail(name, message)]

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
