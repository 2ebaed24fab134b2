"""Runs plans on a model that pools: rows, batch, forward, pool. Owns: the order of such a step on the device, for
decoders and for encoders.

The counterpart of `model_runner`, for engines that generate nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from quire.layers.step import Step
from quire.runner import batch as batches
from quire.runner.kv_store import KVStore
from quire.runner.pooler import Heads, PooledStep, Pooler, PoolingState
from quire.runner.table import RequestTable
from quire.runner.upload import make_upload
from quire.types.plan import Plan, StepResult, ints

NEVER = 1 << 62
Forward = Callable[[Tensor, Tensor, Step], Tensor]


@dataclass(frozen=True, slots=True)
class PendingPooled:
    """A step on its way. `result` waits for the device."""

    number: int
    pooled: PooledStep | None

    def done(self) -> bool:
        return self.pooled is None or self.pooled.done()

    def result(self) -> StepResult:
        done = () if self.pooled is None else self.pooled.finish()
        return StepResult(self.number, ints((), (0, 1)), ints(), pooled=done)


class PoolingRunner:
    """`depth`: how many plans may be in flight."""

    def __init__(
        self,
        model: Forward,
        store: KVStore,
        table: RequestTable[PoolingState],
        pooler: Pooler,
        device: torch.device,
        depth: int,
    ) -> None:
        self._model, self._store, self._table, self._pooler = model, store, table, pooler
        self._upload = make_upload(device, depth)

    @torch.inference_mode()
    def submit(self, plan: Plan) -> PendingPooled:
        """Start a step; returns before the device is done."""
        table, upload = self._table, self._upload
        table.stage(plan, upload)
        batches.stage(plan, upload)
        upload.send()
        table.apply(plan, upload)
        self._store.move(plan)
        if not len(plan.rows):
            return PendingPooled(plan.number, None)
        batch = batches.build(plan, upload, table, self._store.layers)
        hidden_TD = self._model(batch.tokens_T, batch.step.positions_T, batch.step)
        table.length_R[batch.rows_R] = batch.lengths_R
        return PendingPooled(plan.number, self._pooler(plan, hidden_TD, table.sampling))


class Encodes(Heads, Protocol):
    """A model in which every token of a text sees every other."""

    def encode(self, tokens_T: Tensor, positions_T: Tensor, lengths: Sequence[int], types_T: Tensor) -> Tensor: ...


class EncoderRunner:
    """Runs plans on an encoder: whole texts, end to end, with no pages at all."""

    def __init__(self, model: Encodes, pooler: Pooler, device: torch.device) -> None:
        self._model, self._pooler, self._device = model, pooler, device
        self._state = PoolingState()

    @torch.inference_mode()
    def submit(self, plan: Plan) -> PendingPooled:
        """Start a step; returns before the device is done."""
        state = self._state
        state.retire(plan.retired)
        for row in plan.new_rows:
            state.add(row)
        if not len(plan.rows):
            return PendingPooled(plan.number, None)
        counts = plan.counts
        assert len(plan.pool_index) == len(plan.rows) and not plan.starts.any(), "a text is computed at once"
        within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
        seconds = [state.rows[row].params.second_segment for row in plan.rows.tolist()]
        begins = np.array([NEVER if begin is None else begin for begin in seconds])
        types = within >= np.repeat(begins, counts)
        tokens_T, positions_T, types_T = (
            torch.from_numpy(values.astype(np.int64)).to(self._device) for values in (plan.tokens, within, types)
        )
        hidden_TD = self._model.encode(tokens_T, positions_T, counts.tolist(), types_T)
        return PendingPooled(plan.number, self._pooler(plan, hidden_TD, state))
