"""Steps on a CPU as one native call: the whole forward, recorded once, over buffers that stay where they are.

Owns: those buffers, what goes into them for a plan, and which plans fit. Python costs a few microseconds an operation,
which over thirty layers is more than a small model computes, and torch's temporaries are returned to the system after
each prefill only to be asked for again; a recorded step costs neither. The buffers have room for the largest step, but
memory is taken only as far as a step has reached.
Shape legend: T tokens, R rows of the step, S sampled rows, P pages of a row, V vocabulary.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.layers.step import AttentionMeta, GroupMeta, Step
from quire.models.base import CausalLM
from quire.ops.dispatch import REFERENCE, Binder
from quire.ops.native import program
from quire.ops.native.bound import kernels_of, most_tokens
from quire.ops.native.kernels import Kernels
from quire.ops.native.recorder import Recorder, Unrecordable, record
from quire.runner.graphs import MOST_TOKENS, Graphs
from quire.runner.kv_store import KVStore
from quire.runner.replayed import NoReplay, Replay, Replayed
from quire.runner.table import RequestTable
from quire.types.plan import Plan

log = logging.getLogger(__name__)

TOKENS, ROWS, DECODES, SAMPLES = range(4)  # entries of the program's dims


@dataclass(frozen=True, slots=True)
class _Host:
    """What a step reads of the table's rows, and what it writes for the program (`tokens_T` and on)."""

    last_R: NDArray[np.int64]
    length_R: NDArray[np.int64]
    offset_R: NDArray[np.int64]
    pages_RP: list[NDArray[np.int32]]
    tokens_T: NDArray[np.int64]
    positions_T: NDArray[np.int64]
    slots_T: list[NDArray[np.int64]]
    step_pages_RP: list[NDArray[np.int32]]
    step_lengths_R: NDArray[np.int32]
    cu_q: NDArray[np.int32]
    last_S: NDArray[np.int64]


class HostReplay:
    """Steps of up to `max_tokens` tokens, or as many as the kernels serve. Raises `Unrecordable` for models whose
    forward is not all native."""

    carries = False

    def __init__(self, model: CausalLM, table: RequestTable, store: KVStore, native: Kernels, max_tokens: int) -> None:
        pool = native.pool
        self._max_tokens = min(max_tokens, most_tokens(model))
        self._max_rows = min(table.padding_row, self._max_tokens)
        # Sizes are told apart by their numbers while recording, so no two are equal. A row is sampled once at most.
        samples = self._max_rows + 1
        rows = samples + 1
        tokens = max(self._max_tokens, rows + 1)
        decodes = tokens + 1
        sizes = {tokens: TOKENS, rows: ROWS, decodes: DECODES, samples: SAMPLES}
        self._table = table
        groups = len(table.pages_RP)
        pages = table.pages_RP[0].shape[1]
        self._tokens_T = torch.zeros(tokens, dtype=torch.int64)
        self._positions_T = torch.zeros(tokens, dtype=torch.int64)
        self._slots_T = [torch.zeros(tokens, dtype=torch.int64) for _ in range(groups)]
        self._pages_RP = [torch.zeros((rows, pages), dtype=torch.int32) for _ in range(groups)]
        self._lengths_R = torch.zeros(rows, dtype=torch.int32)
        self._cu_q = torch.zeros(rows + 1, dtype=torch.int32)
        self._last_S = torch.zeros(samples, dtype=torch.int64)
        self._index_S = torch.zeros(samples, dtype=torch.int64)
        self._top_S = torch.zeros(samples, dtype=torch.float32)
        meta = AttentionMeta(
            cu_q=self._cu_q,
            lengths_R=self._lengths_R,
            q_lens=[1] * rows,
            max_q=tokens,
            max_len=pages * table.block_size,
            num_decodes=decodes,
            groups=tuple(GroupMeta(*pair) for pair in zip(self._pages_RP, self._slots_T, strict=True)),
        )
        step = Step(self._positions_T, meta, store.layers)

        def forward(recorder: Recorder) -> Tensor:
            hidden_TD = model(self._tokens_T, self._positions_T, step)
            hidden_SD = recorder.empty((samples, hidden_TD.shape[1]), hidden_TD.dtype)
            recorder.pool.run(program.gather(self._last_S, hidden_TD, hidden_SD, program.dim(SAMPLES)))
            logits_SV = model.compute_logits(hidden_SD)
            recorder.pool.run(program.argmax(logits_SV, self._index_S, self._top_S, program.dim(SAMPLES)))
            return logits_SV

        self._recording = record(model, pool, sizes, forward)
        # The same memory for NumPy: making a view takes a microsecond, which a step would spend a dozen times.
        self._host = _Host(
            last_R=table.last_R.numpy(),
            length_R=table.length_R.numpy(),
            offset_R=table.offset_R.numpy(),
            pages_RP=[pages_RP.numpy() for pages_RP in table.pages_RP],
            tokens_T=self._tokens_T.numpy(),
            positions_T=self._positions_T.numpy(),
            slots_T=[slots_T.numpy() for slots_T in self._slots_T],
            step_pages_RP=[pages_RP.numpy() for pages_RP in self._pages_RP],
            step_lengths_R=self._lengths_R.numpy(),
            cu_q=self._cu_q.numpy(),
            last_S=self._last_S.numpy(),
        )

    def takes(self, plan: Plan) -> bool:
        return 0 < len(plan.rows) <= self._max_rows and int(plan.counts.sum()) <= self._max_tokens

    def prepare_next(self) -> bool:
        return False

    def run(self, plan: Plan) -> Replayed:
        num_rows, total = len(plan.rows), int(plan.counts.sum())
        host, size = self._host, self._table.block_size
        rows, counts = plan.rows, plan.counts
        lengths = host.length_R
        starts = np.where(plan.upper, lengths[rows], plan.starts) if plan.upper.any() else plan.starts
        ends = starts + counts
        decode_only = int(counts.max()) == 1 and total == num_rows
        if decode_only:
            rows_T, index_T, cu_q = rows, starts, np.arange(num_rows + 1)
        else:
            cu_q = np.zeros(num_rows + 1, np.int64)
            np.cumsum(counts, out=cu_q[1:])
            row_of = np.repeat(np.arange(num_rows), counts)
            rows_T, index_T = rows[row_of], starts[row_of] + np.arange(total) - cu_q[row_of]
        tokens = host.tokens_T[:total]
        np.take(host.last_R, rows_T, out=tokens)
        if len(plan.tokens):
            known = np.diff(plan.token_offsets)
            row_of = np.repeat(np.arange(num_rows), counts)
            within = np.arange(total) - cu_q[row_of]
            tokens[within >= (counts - known)[row_of]] = plan.tokens
        host.positions_T[:total] = index_T + host.offset_R[rows_T]
        block, offset = np.divmod(index_T, size)
        used = int(ends.max()) // size + 1
        for pages_RP, slots_T, mine_RP in zip(host.pages_RP, host.slots_T, host.step_pages_RP, strict=True):
            slots_T[:total] = pages_RP[rows_T, block].astype(np.int64) * size + offset
            mine_RP[:num_rows, :used] = pages_RP[rows, :used]
        host.step_lengths_R[:num_rows] = ends
        host.cu_q[: num_rows + 1] = cu_q
        samples = len(plan.sample_rows)
        host.last_S[:samples] = cu_q[plan.sample_index + 1] - 1
        dims = self._recording.dims
        dims[TOKENS], dims[ROWS], dims[SAMPLES] = total, num_rows, samples
        dims[DECODES] = num_rows if decode_only else int(np.argmax(counts != 1))
        self._recording.run()
        lengths[rows] = ends
        lengths_S = torch.from_numpy(ends[plan.sample_index].astype(np.int64))
        rows_S = torch.from_numpy(plan.sample_rows.astype(np.int64))
        greedy = self._index_S[:samples], self._top_S[:samples]
        return Replayed(self._recording.outputs[:samples], rows_S, lengths_S, greedy)


def make_replay(
    model: CausalLM,
    table: RequestTable,
    store: KVStore,
    ops: Binder,
    device: torch.device,
    max_tokens: int,
    depth: int,
    enforce_eager: bool,
) -> Replay:
    """On a GPU graphs; on a CPU with the native library recorded steps of up to `max_tokens`, for models that can be
    recorded."""
    native = kernels_of(model)
    if enforce_eager:
        return NoReplay()
    if device.type == "cuda":
        plain = any(choice.chosen == REFERENCE for choice in ops.report() if choice.op == "attention")
        return Graphs(model, table, store, ops, device, max_tokens, depth, MOST_TOKENS if not plain else 0)
    if native is None:
        return NoReplay()
    try:
        return HostReplay(model, table, store, native, max_tokens)
    except Unrecordable as reason:
        log.info("steps run operation by operation: %s", reason)
        return NoReplay()
