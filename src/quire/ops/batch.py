"""The inputs of a step from the device's rows: the ops `decode_batch` (every row decodes), `ragged_batch` (any step)
and `update_rows`.

Owns: their meaning and the buffers that they fill, which stay where they are so that a graph can read them.

Shape legend: X device rows and one for padding, B rows of the step that decode, T tokens and R rows of any step, G KV
groups, P pages of a row, E new pages, N new rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.ops.dispatch import REGISTRY
from quire.ops.triton import register

ON_DEVICE, PADDING = -1, -2  # instead of a start


@dataclass(frozen=True)
class Rows:
    """The device's rows. `last_X`, `length_X`, `offset_X` int64: last token, tokens so far, position - index;
    `pages_XP` int32 for each group."""

    last_X: Tensor
    length_X: Tensor
    offset_X: Tensor
    pages_XP: Sequence[Tensor]
    block_size: int


@dataclass(frozen=True)
class DecodeBuffers:
    """What the model and attention read. int64 `rows_B`, `tokens_B`, `positions_B` and for each group `slots_B`; int32
    `lengths_B` (0: padding) and for each group `tables_BP` (columns up to a row's length)."""

    rows_B: Tensor
    tokens_B: Tensor
    positions_B: Tensor
    lengths_B: Tensor
    slots_B: Sequence[Tensor]
    tables_BP: Sequence[Tensor]

    @classmethod
    def empty(cls, rows: int, pages: Sequence[int], device: torch.device) -> DecodeBuffers:
        """For up to `rows` rows; `pages`: P of each group."""
        rows_B, tokens_B, positions_B, *slots_B = (
            torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(3 + len(pages))
        )
        lengths_B = torch.zeros(rows, dtype=torch.int32, device=device)
        tables_BP = [torch.zeros((rows, each), dtype=torch.int32, device=device) for each in pages]
        return cls(rows_B, tokens_B, positions_B, lengths_B, slots_B, tables_BP)

    def first(self, rows: int) -> DecodeBuffers:
        """Those of the first `rows` rows."""
        return DecodeBuffers(
            self.rows_B[:rows],
            self.tokens_B[:rows],
            self.positions_B[:rows],
            self.lengths_B[:rows],
            [slots_B[:rows] for slots_B in self.slots_B],
            [tables_BP[:rows] for tables_BP in self.tables_BP],
        )


def decode_batch(inputs: Tensor, rows: Rows, out: DecodeBuffers) -> None:
    """Fills `out`, and brings the rows up to date: new pages, and one token more.

    `inputs` int32 (2 + 2G, B): rows; starts (`ON_DEVICE`: the row's length, `PADDING`: no row); then for each group the
    index and the id of a row's new page (index -1: none). Each row occurs once.
    """
    rows_B, starts_B = inputs[0].long(), inputs[1].long()
    live_B = starts_B != PADDING
    at_B = torch.where(starts_B == ON_DEVICE, rows.length_X[rows_B], starts_B)
    at_B = torch.where(live_B, at_B, -1)
    out.rows_B.copy_(rows_B)
    out.tokens_B.copy_(rows.last_X[rows_B])
    out.positions_B.copy_((at_B + rows.offset_X[rows_B]).clamp(min=0))
    out.lengths_B.copy_(at_B + 1)
    size = rows.block_size
    for g, pages_XP in enumerate(rows.pages_XP):
        index_B, page_B = inputs[2 + 2 * g].long(), inputs[3 + 2 * g]
        column_B = index_B.clamp(min=0)
        pages_XP[rows_B, column_B] = torch.where(index_B >= 0, page_B, pages_XP[rows_B, column_B])
        tables_BP = pages_XP[rows_B]
        out.tables_BP[g].copy_(tables_BP)
        page_B = tables_BP.gather(1, (at_B.clamp(min=0) // size).unsqueeze(1)).squeeze(1).long()
        out.slots_B[g].copy_(torch.where(live_B & (page_B >= 0), page_B * size + at_B % size, -1))
    rows.length_X[rows_B] = torch.where(live_B, at_B + 1, rows.length_X[rows_B])


@dataclass(frozen=True)
class RaggedInputs:
    """What the host says of a step, int32. `rows_R`; `starts_R`: as for `decode_batch`, padding rows have no tokens and
    come last; `cu_q`: (R + 1,) where the rows' tokens begin; `tokens_T`: token ids, -1 for a row's last token; `of_T`:
    which of the rows a token belongs to, -1 for padding."""

    rows_R: Tensor
    starts_R: Tensor
    cu_q: Tensor
    tokens_T: Tensor
    of_T: Tensor


@dataclass(frozen=True)
class RaggedBuffers:
    """What the model and attention read. int64 `tokens_T`, `positions_T` and for each group `slots_T`; int32
    `starts_R`, `lengths_R` (0: padding) and for each group `tables_RP` (columns up to a row's length)."""

    tokens_T: Tensor
    positions_T: Tensor
    starts_R: Tensor
    lengths_R: Tensor
    slots_T: Sequence[Tensor]
    tables_RP: Sequence[Tensor]

    @classmethod
    def empty(cls, tokens: int, rows: int, pages: Sequence[int], device: torch.device) -> RaggedBuffers:
        """For up to `tokens` tokens of `rows` rows; `pages`: P of each group."""
        tokens_T, positions_T, *slots_T = (
            torch.zeros(tokens, dtype=torch.int64, device=device) for _ in range(2 + len(pages))
        )
        starts_R, lengths_R = torch.zeros((2, rows), dtype=torch.int32, device=device)
        tables_RP = [torch.zeros((rows, each), dtype=torch.int32, device=device) for each in pages]
        return cls(tokens_T, positions_T, starts_R, lengths_R, slots_T, tables_RP)

    def first(self, tokens: int, rows: int) -> RaggedBuffers:
        """Those of the first tokens and rows."""
        return RaggedBuffers(
            self.tokens_T[:tokens],
            self.positions_T[:tokens],
            self.starts_R[:rows],
            self.lengths_R[:rows],
            [slots_T[:tokens] for slots_T in self.slots_T],
            [tables_RP[:rows] for tables_RP in self.tables_RP],
        )


def ragged_batch(inputs: RaggedInputs, rows: Rows, out: RaggedBuffers) -> None:
    """Fills `out`, and counts the rows' tokens. Each row occurs once."""
    rows_R = inputs.rows_R.long()
    live_R = inputs.starts_R != PADDING
    known_R = torch.where(inputs.starts_R == ON_DEVICE, rows.length_X[rows_R], inputs.starts_R.long())
    starts_R = torch.where(live_R, known_R, 0)
    out.starts_R.copy_(starts_R)
    lengths_R = torch.where(live_R, starts_R + inputs.cu_q.diff(), 0)
    out.lengths_R.copy_(lengths_R)
    real_T = inputs.of_T >= 0
    of_T = inputs.of_T.clamp(min=0).long()
    row_T = rows_R[of_T]
    within_T = torch.arange(len(of_T), device=of_T.device) - inputs.cu_q[of_T]
    at_T = torch.where(real_T, starts_R[of_T] + within_T, 0)
    given_T = inputs.tokens_T.long()
    out.tokens_T.copy_(torch.where(real_T, torch.where(given_T >= 0, given_T, rows.last_X[row_T]), 0))
    out.positions_T.copy_(torch.where(real_T, (at_T + rows.offset_X[row_T]).clamp(min=0), 0))
    size = rows.block_size
    for g, pages_XP in enumerate(rows.pages_XP):
        out.tables_RP[g].copy_(pages_XP[rows_R])
        page_T = pages_XP[row_T, at_T // size].long()
        out.slots_T[g].copy_(torch.where(real_T & (page_T >= 0), page_T * size + at_T % size, -1))
    rows.length_X[rows_R] = torch.where(live_R, lengths_R, rows.length_X[rows_R])


def update_rows(pages_E4: Tensor, new_N2: Tensor, rows: Rows) -> None:
    """New pages, int32 (E, 4): group, row, index, page id; and new rows, int32 (N, 2): row, position - index."""
    for g, pages_XP in enumerate(rows.pages_XP):
        mine_E = pages_E4[:, 0] == g
        _, row, index, page = pages_E4[mine_E].unbind(1)
        pages_XP[row.long(), index.long()] = page
    rows.offset_X[new_N2[:, 0].long()] = new_N2[:, 1].long()


DECODE_BATCH = REGISTRY.op("decode_batch", decode_batch)
RAGGED_BATCH = REGISTRY.op("ragged_batch", ragged_batch)
UPDATE_ROWS = REGISTRY.op("update_rows", update_rows)
register(DECODE_BATCH, "batch:decode_batch", "untyped")
register(RAGGED_BATCH, "batch:ragged_batch", "untyped")
register(UPDATE_ROWS, "batch:update_rows", "untyped")
