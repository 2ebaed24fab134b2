"""Steps on a GPU over buffers that stay where they are: small ones as graphs, captured once for each size.

Owns: those buffers, what goes into them for a plan, and the sizes that there are graphs for. Two kinds of step: every
row decodes (one graph for each number of rows; it brings the rows' new pages along), or any other (tokens and rows are
rounded up; beyond `MOST_TOKENS` it is run from Python, which then keeps ahead of the device). A step of a size that has
no graph yet is captured when it comes, the common ones at start. Graphs share their memory: what one leaves behind is
read before the next one runs.

Shape legend: B rows of a step that decodes, T tokens and R rows of any other, S sampled rows, V vocabulary.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.layers.step import AttentionMeta, GroupMeta, Step
from quire.models.base import CausalLM
from quire.ops.batch import (
    DECODE_BATCH,
    ON_DEVICE,
    PADDING,
    RAGGED_BATCH,
    UPDATE_ROWS,
    DecodeBuffers,
    RaggedBuffers,
    RaggedInputs,
    Rows,
)
from quire.ops.dispatch import Binder
from quire.ops.sampling import DRAW_STEP, Kind, Out
from quire.runner.kv_store import KVStore
from quire.runner.record import Captured, CudaRecorder, Recorder
from quire.runner.replayed import Replayed
from quire.runner.table import RequestTable
from quire.runner.upload import Pinned
from quire.types.plan import Plan

log = logging.getLogger(__name__)

DECODES_AT_START = (1, 2, 4, 8, 16, 32, 64, 128, 256)
DECODES_FORESEEN = (1, 2, 16, 32, 64, 256)  # and the largest
TOKENS_AT_START, ROWS_AT_START = (64, 128, 192, 256, 320, 384, 448, 512), 64
MOST_TOKENS = 2048
Ints = NDArray[np.int32]


def decode_sizes(most: int) -> list[int]:
    """Rows that there may be a graph for, rising, up to `most`: padding is at most a fifth of a step."""
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 512, 32), *range(512, most + 128, 128)]
    return [*(size for size in steps if size < most), most]


def token_sizes(most: int) -> list[int]:
    """Tokens of other steps that there may be a graph for, rising, up to `most`."""
    steps = [16, 32, *range(64, 512, 64), *range(512, 1024, 128), *range(1024, MOST_TOKENS + 1, 256)]
    return [size for size in steps if size <= most]


def row_sizes(most: int) -> list[int]:
    """Rows of such steps."""
    return [*(size for size in (16, 64, 256) if size < most), most]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the integers of a step of T tokens and R rows lie, each part on a border of 16 bytes."""

    tokens: int
    rows: int

    def views(self, buffer: Tensor) -> list[Tensor]:
        """rows, starts, cu_q, last, index, sample rows (R each, cu_q one more), tokens, of (T each)."""
        return [buffer[at : at + size] for at, size in self._parts()]

    def arrays(self, buffer: Ints) -> list[Ints]:
        return [buffer[at : at + size] for at, size in self._parts()]

    @property
    def size(self) -> int:
        return self._parts()[-1][0] + self.tokens

    def _parts(self) -> list[tuple[int, int]]:
        parts, at = [], 0
        for size in (self.rows, self.rows, self.rows + 1, *[self.rows] * 3, self.tokens, self.tokens):
            parts.append((at, size))
            at += (size + 3) // 4 * 4
        return parts


class Graphs:
    """See the module. `most`: tokens of the largest step; `most_captured`: of the largest that may be a graph though
    not every row decodes, 0 where attention must be told the rows by the host."""

    def __init__(
        self,
        model: CausalLM,
        table: RequestTable,
        store: KVStore,
        ops: Binder,
        device: torch.device,
        most: int,
        depth: int,
        most_captured: int = MOST_TOKENS,
        recorder: Recorder | None = None,
    ) -> None:
        self._model, self._table, self._store, self._device, self._depth = model, table, store, device, depth
        self._record = recorder or CudaRecorder()
        self._decode_batch, self._ragged_batch = ops.bind(DECODE_BATCH), ops.bind(RAGGED_BATCH)
        self._update_rows, self._draw_step = ops.bind(UPDATE_ROWS), ops.bind(DRAW_STEP)
        self._rows = Rows(table.last_R, table.length_R, table.offset_R, table.pages_RP, table.block_size)
        pages = [each.shape[1] for each in table.pages_RP]
        rows = min(most, table.padding_row)
        self._decodes, self._tokens, self._row_sizes = (
            decode_sizes(rows),
            token_sizes(min(most, most_captured)),
            row_sizes(rows),
        )
        self._lines = 2 + 2 * len(pages)
        longest = max(self._lines * rows, Layout(most, rows).size)
        self._inputs = torch.zeros(longest, dtype=torch.int32, device=device)
        self._pinned = Pinned(longest, depth + 1, device)
        self._changes = Pinned(0, depth + 1, device)
        self._decode_out = DecodeBuffers.empty(rows, pages, device)
        self._ragged_out = RaggedBuffers.empty(most, rows, pages, device)
        self._cu_q = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self._place = np.zeros(table.padding_row + 1, np.int64)
        self._forwards: dict[tuple[str, int, int], tuple[Captured, Tensor]] = {}
        self._too_large = set[tuple[str, int, int]]()
        ragged = [("ragged", tokens, rows) for rows in self._row_sizes for tokens in self._tokens if rows <= tokens]
        self._rest = [*(("decode", size, size) for size in self._decodes), *ragged][::-1]
        self._logits: Tensor | None = None  # of steps that are not decodes, whatever their size
        packed_B2 = torch.zeros((rows, 2), dtype=torch.int32, device=device)
        self._out = Out.new(rows, device)._replace(packed_S2=packed_B2, last_X=table.last_R, length_X=table.length_R)
        self._part = rows, self._out  # of the number of rows that was asked for last
        self._draws: dict[tuple[int, Kind], Captured] = {}
        self._ran = (0, 0)  # the size of the decode graph that ran last, and rows of the step

    carries = True

    # -- the seam ----------------------------------------------------------------------------------------------------

    def takes(self, plan: Plan) -> bool:
        return len(plan.rows) > 0 and plan.positions is None

    def run(self, plan: Plan) -> Replayed:
        if _decodes(plan):
            return self._run_decodes(plan)
        self._change(plan)
        return self._run_ragged(plan)

    def prepare(self) -> tuple[int, float]:
        """Captures the common sizes, the largest first; how many, and the seconds that it took."""
        begin = time.monotonic()
        for size in sorted(
            {_above(self._decodes, n) for n in DECODES_AT_START if n <= self._decodes[-1]}, reverse=True
        ):
            self._capture_decodes(size)
            self._capture_draws(size)
        rows = _above(self._row_sizes, min(ROWS_AT_START, self._row_sizes[-1]))
        for tokens in reversed([n for n in TOKENS_AT_START if n in self._tokens]):
            self._capture_ragged(tokens, rows)
        return len(self._forwards), time.monotonic() - begin

    def prepare_next(self) -> bool:
        """Captures one of the sizes that are not common either: small steps first, those with prompts last."""
        while self._rest:
            key = self._rest.pop()
            if key in self._forwards:
                continue
            try:
                if self._captured(key) and key[0] == "decode":
                    self._capture_draws(key[1])
                return True
            except Exception:  # nobody has asked for it
                log.exception("a graph of %d tokens cannot be captured", key[1])
                self._rest.clear()
        return False

    @torch.inference_mode()
    def foresee(self) -> None:
        """Calls all kernels of steps and draws, those that `prepare` needs first at first: for `ops.triton.ahead`,
        where none of them runs. Sizes in between have no kernels of their own."""
        most = self._decodes[-1]
        sizes = sorted({most, *(_above(self._decodes, n) for n in DECODES_FORESEEN if n <= most)})
        logits = {size: self._forward_decodes(size) for size in reversed(sizes)}
        for tokens in (*self._tokens[-1:], *self._tokens[:1]):
            for rows in self._row_sizes:
                self._forward_ragged(Layout(tokens, rows), None)
        self._update_rows(self._inputs[:0].view(-1, 4), self._inputs[:0].view(-1, 2), self._rows)
        for kind in Kind:
            self._draw_from(logits[sizes[-1]], sizes[-1], self._first(sizes[-1]), kind)

    # -- steps in which every row decodes ----------------------------------------------------------------------------

    def _run_decodes(self, plan: Plan) -> Replayed:
        count = len(plan.rows)
        size = _above(self._decodes, count)
        self._send_decodes(plan, size)
        out = self._decode_out
        if not self._captured(("decode", size, size)):
            return Replayed(self._forward_decodes(size)[:count], out.rows_B[:count], out.lengths_B[:count])
        forward, logits_BV = self._forwards["decode", size, size]
        forward.replay()
        self._ran = size, count
        return Replayed(logits_BV[:count], out.rows_B[:count], out.lengths_B[:count], draw=self.draw)

    def _send_decodes(self, plan: Plan, size: int) -> None:
        count, total = len(plan.rows), self._lines * size
        inline = self._places(plan)
        if not inline:
            self._change(plan)
        host = self._pinned.next()
        lines = host[:total].reshape(self._lines, size)
        lines[0, :count] = plan.rows
        lines[0, count:] = self._table.padding_row
        lines[1, :count] = np.where(plan.upper, ON_DEVICE, plan.starts)
        lines[1, count:] = PADDING
        lines[2:] = -1
        if inline:
            for g, delta in enumerate(plan.tables):
                at = self._place[delta.rows]
                lines[2 + 2 * g, at], lines[3 + 2 * g, at] = delta.index, delta.blocks
        self._pinned.send(self._inputs[:total])

    def _places(self, plan: Plan) -> bool:
        """Whether the plan changes no more than one page of a group for each of its rows; notes where they are."""
        if plan.new_rows or len(plan.forks):
            return False
        place = self._place
        place[:] = -1
        place[plan.rows] = np.arange(len(plan.rows))
        for delta in plan.tables:
            at = place[delta.rows].tolist()
            if at and (min(at) < 0 or len(set(at)) != len(at)):
                return False
        return True

    @torch.inference_mode()
    def _capture_decodes(self, size: int) -> None:
        """What the inputs on the device hold is kept; while recording they are padding, so that no row changes."""
        inputs = self._inputs[: self._lines * size].view(self._lines, size)
        kept = inputs.clone()
        inputs[0], inputs[1:] = self._table.padding_row, PADDING
        try:
            self._forwards["decode", size, size] = self._record(lambda: self._forward_decodes(size))
        finally:
            inputs.copy_(kept)

    def _forward_decodes(self, size: int) -> Tensor:
        out = self._decode_out.first(size)
        inputs = self._inputs[: self._lines * size].view(self._lines, size)
        self._decode_batch(inputs, self._rows, out)
        meta = AttentionMeta(
            cu_q=self._cu_q[: size + 1],
            lengths_R=out.lengths_B,
            q_lens=None,
            max_q=1,
            max_len=self._longest(),
            num_decodes=size,
            groups=_groups(out.tables_BP, out.slots_B),
        )
        hidden_BD = self._model(out.tokens_B, out.positions_B, Step(out.positions_B, meta, self._store.layers))
        return self._model.compute_logits(hidden_BD, None)

    def draw(self, kind: Kind) -> Out:
        """The tokens of the decode step that ran last."""
        size, count = self._ran
        if (size, kind) not in self._draws:
            self._capture_draw(size, kind)
        self._draws[size, kind].replay()
        return self._first(count)

    def _capture_draws(self, size: int) -> None:
        """The common ones."""
        for kind in (Kind.GREEDY, Kind.NOISE):
            self._capture_draw(size, kind)

    @torch.inference_mode()
    def _capture_draw(self, size: int, kind: Kind) -> None:
        """Records a draw from the logits of a decode step of `size` rows, the one that ran last: to draw twice is to
        draw the same."""
        logits_BV, out = self._forwards["decode", size, size][1], self._first(size)
        self._draws[size, kind] = self._record(lambda: self._draw_from(logits_BV, size, out, kind))[0]

    def _draw_from(self, logits_BV: Tensor, size: int, out: Out, kind: Kind) -> Tensor:
        state, buffers = self._table.sampling, self._decode_out.first(size)
        self._draw_step(logits_BV, buffers.rows_B, buffers.lengths_B, state.reals_RC, state.wholes_RC, out, kind)
        return out.tokens_S

    def _first(self, count: int) -> Out:
        known, out = self._part
        if known != count:
            packed_S2 = self._out.packed_S2
            assert packed_S2 is not None
            tokens_S, top_S = self._out.tokens_S[:count], self._out.top_S[:count]
            out = self._out._replace(tokens_S=tokens_S, top_S=top_S, packed_S2=packed_S2[:count])
            self._part = count, out
        return out

    # -- other steps -------------------------------------------------------------------------------------------------

    def _run_ragged(self, plan: Plan) -> Replayed:
        tokens, rows, samples = int(plan.counts.sum()), len(plan.rows), len(plan.sample_rows)
        graph = bool(self._tokens) and tokens <= self._tokens[-1]
        rows = max(rows, samples)
        layout = Layout(_above(self._tokens, tokens), _above(self._row_sizes, rows)) if graph else Layout(tokens, rows)
        self._send_ragged(plan, layout)
        key = ("ragged", layout.tokens, layout.rows)
        if graph and self._captured(key):
            forward, logits_SV = self._forwards[key]
            forward.replay()
        else:
            logits_SV = self._forward_ragged(layout, plan)
        index_S, sample_rows_S = layout.views(self._inputs)[4:6]
        lengths_S = self._ragged_out.lengths_R[: layout.rows][index_S[:samples]]
        return Replayed(logits_SV[:samples], sample_rows_S[:samples].long(), lengths_S)

    def _send_ragged(self, plan: Plan, layout: Layout) -> None:
        host = self._pinned.next()
        rows, starts, cu_q, last, index, sample_rows, tokens, of = layout.arrays(host)
        counts, count, samples = plan.counts, len(plan.rows), len(plan.sample_rows)
        rows[:count], rows[count:] = plan.rows, self._table.padding_row
        starts[:count], starts[count:] = np.where(plan.upper, ON_DEVICE, plan.starts), PADDING
        cu_q[0] = 0
        np.cumsum(counts, out=cu_q[1 : count + 1])
        total = int(cu_q[count])
        cu_q[count + 1 :] = total
        row_of = np.repeat(np.arange(count, dtype=np.int32), counts)
        of[:total], of[total:] = row_of, -1
        tokens[:] = -1
        known = np.diff(plan.token_offsets)
        first = (cu_q[1 : count + 1] - known)[row_of]  # where the known tokens of each token's row begin
        tokens[:total][np.arange(total) >= first] = plan.tokens
        last[:samples], last[samples:] = cu_q[1:][plan.sample_index] - 1, 0
        index[:samples], index[samples:] = plan.sample_index, 0
        sample_rows[:samples], sample_rows[samples:] = plan.sample_rows, self._table.padding_row
        self._pinned.send(self._inputs[: layout.size])

    @torch.inference_mode()
    def _capture_ragged(self, tokens: int, rows: int) -> None:
        layout = Layout(tokens, rows)
        kept = self._inputs[: layout.size].clone()
        views = layout.views(self._inputs)
        for view, value in zip(views, (self._table.padding_row, PADDING, 0, 0, 0, 0, -1, -1), strict=True):
            view.fill_(value)
        if self._logits is None:
            vocab = self._model.compute_logits(self._ragged_hidden(layout, None), None)
            self._logits = vocab.new_empty((self._row_sizes[-1], vocab.shape[1]))
        logits_RV = self._logits[:rows]
        try:
            self._forwards["ragged", tokens, rows] = self._record(
                lambda: logits_RV.copy_(self._forward_ragged(layout, None))
            )
        finally:
            self._inputs[: layout.size].copy_(kept)

    def _forward_ragged(self, layout: Layout, plan: Plan | None) -> Tensor:
        """Logits of the sampled rows. `plan`: where the host knows the rows; a graph does not."""
        hidden_SD = self._ragged_hidden(layout, plan)
        return self._model.compute_logits(hidden_SD, None) if len(hidden_SD) else hidden_SD

    def _ragged_hidden(self, layout: Layout, plan: Plan | None) -> Tensor:
        rows_R, starts_R, cu_q, last_R, _, _, tokens_T, of_T = layout.views(self._inputs)
        out = self._ragged_out.first(layout.tokens, layout.rows)
        self._ragged_batch(RaggedInputs(rows_R, starts_R, cu_q, tokens_T, of_T), self._rows, out)
        meta = AttentionMeta(
            cu_q=cu_q,
            lengths_R=out.lengths_R,
            q_lens=None,
            max_q=layout.tokens,
            max_len=self._longest(),
            num_decodes=0,
            groups=_groups(out.tables_RP, out.slots_T),
        )
        if plan is not None:
            counts, ends = plan.counts, plan.starts + plan.counts
            size, count = self._table.block_size, len(counts)
            meta.cu_q, meta.lengths_R = cu_q[: count + 1], out.lengths_R[:count]
            meta.groups = _groups([tables_RP[:count] for tables_RP in out.tables_RP], out.slots_T)
            meta.q_lens, meta.kv_lens, meta.max_q = counts.tolist(), ends.tolist(), int(counts.max())
            meta.max_len = -(-int(ends.max()) // size) * size
            meta.num_decodes = int(np.argmax(counts != 1)) if (counts != 1).any() else len(counts)
            last_R = last_R[: len(plan.sample_rows)]
        hidden_TD = self._model(out.tokens_T, out.positions_T, Step(out.positions_T, meta, self._store.layers))
        return hidden_TD.index_select(0, last_R)

    # -- both --------------------------------------------------------------------------------------------------------

    def _change(self, plan: Plan) -> None:
        """The plan's new rows, forks and new pages, by a copy and kernels of their own."""
        pages = sum(len(delta.rows) for delta in plan.tables)
        new = len(plan.new_rows)
        if not pages and not new:
            if len(plan.forks):
                self._table.fork(plan.forks)
            return
        host = self._changes.next(4 * pages + 2 * new)
        entries, at = host[: 4 * pages].reshape(-1, 4), 0
        for g, delta in enumerate(plan.tables):
            part = entries[at : at + len(delta.rows)]
            part[:, 0], part[:, 1], part[:, 2], part[:, 3] = g, delta.rows, delta.index, delta.blocks
            at += len(delta.rows)
        if new:
            host[4 * pages : 4 * pages + 2 * new].reshape(-1, 2)[:] = [
                (row.row, row.position_offset) for row in plan.new_rows
            ]
        sent = torch.empty(4 * pages + 2 * new, dtype=torch.int32, device=self._device)
        self._changes.send(sent)
        pages_E4, new_N2 = sent[: 4 * pages].view(-1, 4), sent[4 * pages :].view(-1, 2)
        if len(plan.forks):
            self._update_rows(pages_E4[:0], new_N2, self._rows)
            self._table.fork(plan.forks)
            new_N2 = new_N2[:0]
        self._update_rows(pages_E4, new_N2, self._rows)

    def _captured(self, key: tuple[str, int, int]) -> bool:
        """Whether there is a graph, now at the latest. Where memory does not suffice for one, there will be none."""
        if key not in self._forwards and key not in self._too_large:
            try:
                if key[0] == "decode":
                    self._capture_decodes(key[1])
                else:
                    self._capture_ragged(*key[1:])
            except torch.OutOfMemoryError as error:
                self._too_large.add(key)
                log.warning("no memory for a graph of %d tokens, which run from Python: %s", key[1], error)
        return key in self._forwards

    def _longest(self) -> int:
        return min(each.shape[1] for each in self._table.pages_RP) * self._table.block_size


def _decodes(plan: Plan) -> bool:
    """Whether every row computes one token that it sampled itself, and is sampled again."""
    rows = plan.rows
    return (
        not len(plan.tokens)
        and len(plan.sample_rows) == len(rows)
        and int(plan.counts.max()) == 1
        and bool((plan.sample_rows == rows).all())
    )


def _above(sizes: Sequence[int], count: int) -> int:
    """The smallest of the rising `sizes` that is enough."""
    return sizes[bisect_left(sizes, count)]


def _groups(tables: Sequence[Tensor], slots: Sequence[Tensor]) -> tuple[GroupMeta, ...]:
    return tuple(GroupMeta(*pair) for pair in zip(tables, slots, strict=True))
