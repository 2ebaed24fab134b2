"""Decode steps on a GPU as graphs: the whole forward captured once for each size of batch, replayed by one call.

Owns: the buffers that graphs read, the sizes that there are graphs for, and which plans fit. A step of a size that has
no graph yet is captured when it comes, the common ones at start. Graphs share their memory: what one leaves behind is
read before the next one runs.

Shape legend: B rows of the step, V vocabulary, G KV groups, P pages of a row.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from quire.layers.step import AttentionMeta, GroupMeta, Step
from quire.models.base import CausalLM
from quire.ops.batch import DECODE_BATCH, ON_DEVICE, PADDING, DecodeBuffers, Rows
from quire.ops.dispatch import Binder
from quire.runner.kv_store import KVStore
from quire.runner.replayed import Replayed
from quire.runner.table import RequestTable
from quire.runner.upload import Pinned
from quire.types.plan import Plan

log = logging.getLogger(__name__)

AT_START = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def sizes(most: int) -> list[int]:
    """Rows that there may be a graph for, rising, up to `most`: padding is at most a fifth of a step."""
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 512, 32), *range(512, most + 64, 64)]
    return [*(size for size in steps if size < most), most]


class Captured(Protocol):
    def replay(self) -> None: ...


class Recorder(Protocol):
    """Runs a function once, then keeps what it does to the device, and what it gave."""

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Captured, Tensor]: ...


class CudaRecorder:
    """CUDA graphs that share one pool of memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Captured, Tensor]:
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):  # kernels are compiled, libraries make their workspaces
            function()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            out = function()
        return graph, out


class _Again:
    def __init__(self, function: Callable[[], Any]) -> None:
        self.replay = function


class PlainRecorder:
    """Records nothing: a replay runs the function again, and writes what it gives to where it was the first time. For
    tests without a GPU."""

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Captured, Tensor]:
        out = function()
        return _Again(lambda: out.copy_(function())), out


class Graphs:
    """See the module. `most`: rows of the largest step that a graph may serve."""

    def __init__(
        self,
        model: CausalLM,
        table: RequestTable,
        store: KVStore,
        ops: Binder,
        device: torch.device,
        most: int,
        depth: int,
        recorder: Recorder | None = None,
    ) -> None:
        self._model, self._table, self._store = model, table, store
        self._device = device
        self._recorder = recorder or CudaRecorder()
        self._decode_batch = ops.bind(DECODE_BATCH)
        self._rows = Rows(table.last_R, table.length_R, table.offset_R, table.pages_RP, table.block_size)
        pages = [each.shape[1] for each in table.pages_RP]
        self._sizes = np.array(sizes(min(most, table.padding_row)))
        largest = int(self._sizes[-1])
        self._lines = 2 + 2 * len(pages)
        self._inputs = torch.zeros(self._lines * largest, dtype=torch.int32, device=device)
        self._pinned = Pinned(self._lines * largest, depth + 1, device)
        self.buffers = DecodeBuffers.empty(largest, pages, device)
        self._cu_q = torch.arange(largest + 1, dtype=torch.int32, device=device)
        self._place = np.zeros(table.padding_row + 1, np.int64)
        self._forwards: dict[int, tuple[Captured, Tensor]] = {}

    def takes(self, plan: Plan) -> bool:
        """Every row decodes one token that it sampled itself, and is sampled again."""
        rows = plan.rows
        return (
            0 < len(rows) <= self._sizes[-1]
            and not len(plan.tokens)
            and len(plan.sample_rows) == len(rows)
            and int(plan.counts.max()) == 1
            and bool((plan.sample_rows == rows).all())
        )

    def carries(self, plan: Plan) -> bool:
        """At most one new page of a group for each row of the step, and nothing else."""
        if plan.new_rows or len(plan.forks):
            return False
        place = self._place
        place[:] = -1
        place[plan.rows] = np.arange(len(plan.rows))
        for delta in plan.tables:
            at = place[delta.rows]
            if (at < 0).any() or len(np.unique(at)) != len(at):
                return False
        return True

    def run(self, plan: Plan, carried: bool) -> Replayed:
        count = len(plan.rows)
        size = self.size(count)
        self._send(plan, size, carried)
        if size not in self._forwards:
            self.capture(size)
        forward, logits_BV = self._forwards[size]
        forward.replay()
        return Replayed(logits_BV[:count], self.buffers.rows_B[:count], self.buffers.lengths_B[:count].long())

    def size(self, count: int) -> int:
        """Rows of the graph that serves `count` rows."""
        return int(self._sizes[np.searchsorted(self._sizes, count)])

    def prepare(self, these: Iterable[int] = AT_START) -> tuple[int, float]:
        """Captures the graphs of these sizes, the largest first; how many, and the seconds that it took."""
        begin = time.monotonic()
        due = sorted({self.size(n) for n in these if n <= self._sizes[-1]}, reverse=True)
        for count in due:
            self.capture(count)
        return len(due), time.monotonic() - begin

    def _send(self, plan: Plan, size: int, tables: bool) -> None:
        count, total = len(plan.rows), self._lines * size
        host = self._pinned.next()
        lines = host[:total].reshape(self._lines, size)
        lines[0, :count] = plan.rows
        lines[0, count:] = self._table.padding_row
        lines[1, :count] = np.where(plan.upper, ON_DEVICE, plan.starts)
        lines[1, count:] = PADDING
        lines[2:] = -1
        if tables:
            for g, delta in enumerate(plan.tables):
                at = self._place[delta.rows]
                lines[2 + 2 * g, at], lines[3 + 2 * g, at] = delta.index, delta.blocks
        self._pinned.send(self._inputs[:total])

    @torch.inference_mode()
    def capture(self, size: int) -> None:
        """Records a step of `size` rows. What the inputs on the device hold is kept; while recording they are padding,
        so that no row changes."""
        begin = time.monotonic()
        inputs = self._inputs[: self._lines * size].view(self._lines, size)
        kept = inputs.clone()
        inputs[1:] = PADDING
        self._forwards[size] = self._recorder(lambda: self._forward(size))
        inputs.copy_(kept)
        log.debug("a graph of %d rows was captured in %.3f s", size, time.monotonic() - begin)

    def _forward(self, size: int) -> Tensor:
        out = self.buffers.first(size)
        inputs = self._inputs[: self._lines * size].view(self._lines, size)
        self._decode_batch(inputs, self._rows, out)
        meta = AttentionMeta(
            cu_q=self._cu_q[: size + 1],
            lengths_R=out.lengths_B,
            q_lens=None,
            max_q=1,
            max_len=min(each.shape[1] for each in out.tables_BP) * self._table.block_size,
            num_decodes=size,
            groups=tuple(GroupMeta(*pair) for pair in zip(out.tables_BP, out.slots_B, strict=True)),
        )
        step = Step(out.positions_B, meta, self._store.layers)
        hidden_BD = self._model(out.tokens_B, out.positions_B, step)
        return self._model.compute_logits(hidden_BD, None)
