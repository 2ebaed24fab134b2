"""The inputs of a step in which every row decodes, from the device's rows: the op `decode_batch`.

Owns: its meaning and the buffers that it fills, which stay where they are so that a graph can read them.

Shape legend: X device rows and one for padding, B rows of the step, G KV groups, P pages of a row.
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


DECODE_BATCH = REGISTRY.op("decode_batch", decode_batch)
register(DECODE_BATCH, "batch:decode_batch", "integers")
