"""`decode_batch`, `ragged_batch` and `update_rows` in Triton. Owns the kernels: a program for each row, or for some
tokens, of the step."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from quire.ops.batch import ON_DEVICE, PADDING, DecodeBuffers, RaggedBuffers, RaggedInputs, Rows
from quire.ops.triton.launch import Kernel, ceil, release, wait

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


@Kernel
def _ragged_rows(
    rows, starts, cu_q, length, pages, starts_out, lengths_out, tables_out,
    WIDTH, block_size: tl.constexpr, first: tl.constexpr, final: tl.constexpr, COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A row's start, length and pages, for one KV group; `first` and `final` as for `_decode_batch`."""
    wait(PDL)
    release(PDL)
    i = tl.program_id(0)
    row = tl.load(rows + i).to(tl.int64)
    given = tl.load(starts + i)
    count = tl.load(cu_q + i + 1) - tl.load(cu_q + i)
    live = given != _PADDING
    so_far = tl.load(length + row).to(tl.int32) if first else tl.load(starts_out + i)
    start = tl.where(live, tl.where(given == _ON_DEVICE, so_far, given), 0)
    end = tl.where(live, start + count, 0)
    if first:
        tl.store(starts_out + i, start)
        tl.store(lengths_out + i, end)
    used = (end + block_size - 1) // block_size
    for begin in range(0, used, COLUMNS):
        at_C = begin + tl.arange(0, COLUMNS)
        pages_C = tl.load(pages + row * WIDTH + at_C, mask=at_C < used, other=0)
        tl.store(tables_out + i.to(tl.int64) * WIDTH + at_C, pages_C, mask=at_C < used)
    if final & live:
        tl.store(length + row, end.to(tl.int64))


@Kernel
def _ragged_tokens(
    rows, starts, cu_q, tokens, of, last, offset, pages, tokens_out, positions_out, slots_out,
    TOKENS, WIDTH, block_size: tl.constexpr, first: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Ids, positions and slots of some tokens, for one KV group."""
    wait(PDL)
    release(PDL)
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = t < TOKENS
    i = tl.load(of + t, mask=inside, other=-1)
    real = i >= 0
    i = tl.maximum(i, 0)
    row = tl.load(rows + i, mask=real, other=0).to(tl.int64)
    at = tl.load(starts + i, mask=real, other=0) + t - tl.load(cu_q + i, mask=real, other=0)
    if first:
        given = tl.load(tokens + t, mask=real, other=0).to(tl.int64)
        sampled = tl.load(last + row, mask=real & (given < 0), other=0)
        tl.store(tokens_out + t, tl.where(given < 0, sampled, given), mask=inside)
        position = at + tl.load(offset + row, mask=real, other=0)
        tl.store(positions_out + t, tl.where(real, tl.maximum(position, 0), 0), mask=inside)
    page = tl.load(pages + row * WIDTH + at // block_size, mask=real, other=-1)
    slot = tl.where(page >= 0, page.to(tl.int64) * block_size + at % block_size, -1)
    tl.store(slots_out + t, slot, mask=inside)


def ragged_batch(inputs: RaggedInputs, rows: Rows, out: RaggedBuffers) -> None:
    count, tokens, groups = inputs.rows_R.shape[0], inputs.of_T.shape[0], len(rows.pages_XP)
    for g, (pages_XP, tables_RP) in enumerate(zip(rows.pages_XP, out.tables_RP, strict=True)):
        tensors = (
            inputs.rows_R, inputs.starts_R, inputs.cu_q, rows.length_X, pages_XP, out.starts_R, out.lengths_R, tables_RP
        )  # fmt: skip
        constants = (rows.block_size, g == 0, g == groups - 1, 256)
        _ragged_rows((count, 1, 1), tensors, (pages_XP.shape[1],), constants, warps=1)
    for g, (pages_XP, slots_T) in enumerate(zip(rows.pages_XP, out.slots_T, strict=True)):
        tensors = (
            inputs.rows_R, out.starts_R, inputs.cu_q, inputs.tokens_T, inputs.of_T, rows.last_X, rows.offset_X,
            pages_XP, out.tokens_T, out.positions_T, slots_T,
        )  # fmt: skip
        constants = (rows.block_size, g == 0, 128)
        _ragged_tokens((ceil(tokens, 128), 1, 1), tensors, (tokens, pages_XP.shape[1]), constants, warps=1)


@Kernel
def _new_pages(entries, pages, E, WIDTH, group: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait(PDL)
    release(PDL)
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = e < E
    mine = inside & (tl.load(entries + 4 * e, mask=inside, other=-1) == group)
    row = tl.load(entries + 4 * e + 1, mask=mine, other=0).to(tl.int64)
    index = tl.load(entries + 4 * e + 2, mask=mine, other=0)
    tl.store(pages + row * WIDTH + index, tl.load(entries + 4 * e + 3, mask=mine, other=0), mask=mine)


@Kernel
def _new_rows(entries, offset, N, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait(PDL)
    release(PDL)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(entries + 2 * n, mask=n < N, other=0)
    tl.store(offset + row, tl.load(entries + 2 * n + 1, mask=n < N, other=0).to(tl.int64), mask=n < N)


def update_rows(pages_E4: Tensor, new_N2: Tensor, rows: Rows) -> None:
    count, new = pages_E4.shape[0], new_N2.shape[0]
    for g, pages_XP in enumerate(rows.pages_XP):
        if count:
            _new_pages((ceil(count, 128), 1, 1), (pages_E4, pages_XP), (count, pages_XP.shape[1]), (g, 128), warps=1)
    if new:
        _new_rows((ceil(new, 128), 1, 1), (new_N2, rows.offset_X), (new,), (128,), warps=1)
