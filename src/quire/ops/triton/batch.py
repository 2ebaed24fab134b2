"""`decode_batch` in Triton: a program for each row of the step. Owns the kernel."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from quire.ops.batch import ON_DEVICE, PADDING, DecodeBuffers, Rows
from quire.ops.triton.launch import Kernel, release, wait

_ON_DEVICE, _PADDING = tl.constexpr(ON_DEVICE), tl.constexpr(PADDING)


@Kernel
def _decode_batch(
    inputs, new, last, length, offset, pages,
    rows_out, tokens_out, positions_out, lengths_out, slots_out, tables_out,
    COUNT, WIDTH, block_size: tl.constexpr, first: tl.constexpr, final: tl.constexpr, COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One KV group: `new` points to its two lines of the inputs. `first` fills what all groups share, `final` counts
    the rows' tokens; a row is one program's own, so nobody reads its length after that."""
    wait(PDL)
    release(PDL)
    i = tl.program_id(0)
    row = tl.load(inputs + i).to(tl.int64)
    start = tl.load(inputs + COUNT + i)
    index = tl.load(new + i)
    page = tl.load(new + COUNT + i)
    live = start != _PADDING
    so_far = tl.load(length + row)
    at = tl.where(start == _ON_DEVICE, so_far, start.to(tl.int64))
    at = tl.where(live, at, -1)
    if first:
        tl.store(rows_out + i, row)
        tl.store(tokens_out + i, tl.load(last + row))
        tl.store(positions_out + i, tl.maximum(at + tl.load(offset + row), 0))
        tl.store(lengths_out + i, (at + 1).to(tl.int32))
    column = tl.maximum(at, 0) // block_size
    own = pages + row * WIDTH
    here = tl.where(index == column, page, tl.load(own + column))
    slot = tl.where(live & (here >= 0), here.to(tl.int64) * block_size + at % block_size, -1)
    tl.store(slots_out + i, slot)
    for begin in range(0, tl.where(live, column + 1, 0), COLUMNS):
        at_C = begin + tl.arange(0, COLUMNS)
        inside = at_C <= column
        pages_C = tl.load(own + at_C, mask=inside, other=0)
        pages_C = tl.where(at_C == index, page, pages_C)
        tl.store(tables_out + i.to(tl.int64) * WIDTH + at_C, pages_C, mask=inside)
    if index >= 0:
        tl.store(own + index, page)
    if final & live:
        tl.store(length + row, at + 1)


def decode_batch(inputs: Tensor, rows: Rows, out: DecodeBuffers) -> None:
    count, groups = inputs.shape[1], len(rows.pages_XP)
    for g, (pages_XP, slots_B, tables_BP) in enumerate(zip(rows.pages_XP, out.slots_B, out.tables_BP, strict=True)):
        tensors = (
            inputs, inputs[2 + 2 * g], rows.last_X, rows.length_X, rows.offset_X, pages_XP,
            out.rows_B, out.tokens_B, out.positions_B, out.lengths_B, slots_B, tables_BP,
        )  # fmt: skip
        constants = (rows.block_size, g == 0, g == groups - 1, 256)
        _decode_batch((count, 1, 1), tensors, (count, pages_XP.shape[1]), constants, warps=1)
