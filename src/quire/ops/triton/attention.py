"""The implementations of the op `attention`: which kernels a step needs, and their constants.

Owns: what a step makes once and its layers share (kept in `AttentionMeta.scratch`): lists of work, room for partial
results, the choice of kernels. "triton": rows of few tokens (decodes, drafts) are cut over their keys
(`attention_split.py`), the others go by tiles of queries (`attention_tiles.py`); where the host does not know the
counts (a captured graph of mixed rows), both run and the device decides. "invariant": all rows go by tiles of one
shape, so that the bits of a token do not depend on how its row was cut into steps either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from quire.ops.attention import reference
from quire.ops.attention.meta import AttentionMeta, GroupMeta
from quire.ops.triton.attention_shared import LEAST, MEMBERS, find_leaders, form_packs
from quire.ops.triton.attention_split import split_attention
from quire.ops.triton.attention_tiles import tile_attention
from quire.ops.triton.attention_work import ITEM, split_items, tile_items
from quire.ops.triton.launch import power

_LOG2E = 1.4426950408889634
_PACKED_BYTES = 96 << 20  # for partial results of packed rows: so many rows may be packed
_SHARING = 256  # rows of few tokens of a step where some are packed, at most: the kernel for more has no memory left


@dataclass(frozen=True, slots=True)
class SplitShape:
    """Constants of `split_attention`. `tile`: keys of a tile; `segment`: tiles of a segment of a short row (a power of
    two); `most`: segments of a long one. These decide the bits of a result, so they depend on nothing but the layer's
    shape. `programs`: for each multiprocessor."""

    tile: int
    segment: int = 1
    most: int = 32
    warps: int = 4
    stages: int = 3
    programs: int = 3
    registers: int | None = None


@dataclass(frozen=True, slots=True)
class TileShape:
    """Constants of `tile_attention`: rows (tokens x heads) and keys of a tile. `programs`: for each multiprocessor,
    where the host does not know how many tiles there are."""

    rows: int
    keys: int
    warps: int
    stages: int
    programs: int = 2
    registers: int | None = None


def split_shape(bytes_of_key: int, rows: int) -> SplitShape:
    """By the bytes of a key of one head, as it lies in shared memory, and the number of rows; the latter may decide
    about programs, stages and registers only. Measured on an H200, 2026-11-20."""
    if bytes_of_key > 256:
        return SplitShape(tile=32) if bytes_of_key <= 512 else SplitShape(tile=16, segment=4, stages=2)
    if bytes_of_key <= 128:
        few = rows <= 16
        return SplitShape(tile=64, programs=3 if few else 4, registers=168 if few else 128)
    if rows <= 16:
        return SplitShape(tile=64, programs=2)
    if rows <= 256:
        return SplitShape(tile=64, programs=4, stages=2, registers=128)
    return SplitShape(tile=64, programs=3, registers=168)


def tile_shape(bytes_of_key: int, exact: bool, rows: int) -> TileShape:
    """`rows`: tokens x heads of the longest row.

    Measured on an H200, 2026-11-20: two programs of 128 registers a thread share a multiprocessor; one computes weights
    while the other's products are under way. One program with a schedule of its own (in Gluon) reached 0.82 of that;
    cuDNN 1.09 over gathered keys, but it plans each new length for up to 0.9 s.
    """
    if exact:
        return _exact_shape(bytes_of_key)
    few = rows <= 64
    if bytes_of_key <= 128:
        return TileShape(64, 64, 4, 3) if few else TileShape(128, 64, 8, 3, registers=128)
    if bytes_of_key <= 256:
        return TileShape(64, 64, 4, 3) if few else TileShape(128, 64, 8, 2, registers=128)
    return TileShape(64, 32, 4, 2) if few else TileShape(128, 32, 8, 2)


def invariant_shape(bytes_of_key: int, exact: bool) -> TileShape:
    """One for all rows of a layer."""
    if exact:
        return _exact_shape(bytes_of_key)
    return TileShape(64, 64, 4, 3) if bytes_of_key <= 256 else TileShape(64, 32, 4, 2)


def _exact_shape(bytes_of_key: int) -> TileShape:
    return TileShape(rows=32, keys=32 if bytes_of_key <= 512 else 16, warps=4, stages=2)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


class Step:
    """What the layers of one kind share in a step. Shape legend: R rows, K KV heads, G query heads of a KV head."""

    def __init__(
        self, q_THE: Tensor, kv: Tensor, meta: AttentionMeta, scale: float, window: int | None,
        softcap: float | None, slopes: bool, invariant: bool, table_RP: Tensor,
    ) -> None:  # fmt: skip
        tokens, heads, size = q_THE.shape
        pages, block, kv_heads = kv.shape[1:4]
        group = heads // kv_heads
        exact = torch.float32 in (q_THE.dtype, kv.dtype) or q_THE.dtype != kv.dtype
        padded = max(16, power(size))
        bytes_of_key = padded * (4 if exact else kv.element_size())
        wide = pages * block * kv_heads * size >= 1 << 31
        # Tokens of a short row: they fill no more than a tile of 16 rows.
        few = 0 if invariant else max(1, 16 // group)
        assert kv.is_contiguous()
        strides = (q_THE.stride(0), q_THE.stride(1))
        rule = (scale * _LOG2E, 0.0) if softcap is None else (scale / softcap, softcap * _LOG2E)
        common = (
            *strides, *rule, heads, kv_heads, size, padded, block, exact, wide, window is not None,
            softcap is not None, slopes,
        )  # fmt: skip
        self.window, self.windowed = window or 0, window is not None
        self.split = self.tiles = self.packs = None
        q_lens = [1] * len(meta.lengths_R) if meta.q_lens is None and meta.max_q == 1 else meta.q_lens
        short = len(meta.lengths_R) if q_lens is None else sum(count <= few for count in q_lens)
        if short and few:
            queries = 1 if q_lens is not None and all(count <= 1 or count > few for count in q_lens) else few
            plain = window is None and not slopes
            self._plan_split(
                meta, short, few, queries, heads, kv_heads, padded, split_shape(bytes_of_key, short), common,
                table_RP if plain else None,
            )  # fmt: skip
        if q_lens is None or short < len(q_lens):
            longest = group * (meta.max_q if q_lens is None else max(q_lens))
            shape = invariant_shape(bytes_of_key, exact) if invariant else tile_shape(bytes_of_key, exact, longest)
            self._plan_tiles(meta, tokens, q_lens, few, kv_heads, max(shape.rows, power(group)), shape, common)

    def _plan_tiles(
        self, meta: AttentionMeta, tokens: int, q_lens: Sequence[int] | None, few: int, kv_heads: int, height: int,
        shape: TileShape, common: tuple[Any, ...],
    ) -> None:  # fmt: skip
        device = meta.lengths_R.device
        rows = len(meta.lengths_R)
        queries = height * kv_heads // common[4]
        if q_lens is None:
            tiles = min(tokens // (few + 1), rows) + tokens // queries
            programs = min(tiles * kv_heads, _multiprocessors(device) * shape.programs)
        else:
            tiles = sum(-(-count // queries) for count in q_lens if count > few)
            programs = tiles * kv_heads
        items = torch.empty((max(1, tiles), ITEM), dtype=torch.int32, device=device)
        head = torch.empty(1, dtype=torch.int32, device=device)
        tile_items((rows, 1, 1), (meta.cu_q, meta.lengths_R, items, head), (rows,), (few, queries))
        self.tiles = tile_attention
        self.tile_grid, self.tile_work, self.tile_shape = (max(1, programs), 1, 1), (items, head), shape
        self.tile_constants = (*common, height, shape.keys, shape.stages)

    def _plan_split(
        self, meta: AttentionMeta, short: int, few: int, queries: int, heads: int, kv_heads: int, padded: int,
        shape: SplitShape, common: tuple[Any, ...], table_RP: Tensor | None,
    ) -> None:  # fmt: skip
        """`table_RP`: the pages, where rows that share some may be packed."""
        device = meta.lengths_R.device
        rows, group, block = len(meta.lengths_R), heads // kv_heads, common[8]
        own = queries * group
        height = max(16, power(own))
        # Ranges of work, fewer where not even the longest rows could fill them.
        longest = -(-meta.max_len // shape.tile) + 1
        most = min(shape.most, longest)
        programs = _multiprocessors(device) * shape.programs
        ranges = max(1, min(programs // kv_heads, short * longest))
        slots = min(short, ranges) * (most + 1) * queries
        size = height // group  # rows of a pack
        able = min(rows, _PACKED_BYTES // (4 * shape.most * heads * padded))
        sharing = table_RP is not None and min(size, able, short) > 1 and short <= _SHARING
        sharing = sharing and meta.max_len > LEAST * shape.tile
        parts = 2 * rows if sharing else rows
        packs: tuple[Tensor | None, ...] = (None, None, None, None, None)
        if sharing:
            assert table_RP is not None and shape.warps == 4 and size <= MEMBERS
            packs = self.packs = self._plan_packs(meta, table_RP, able, size, block, shape)
        items = torch.empty((2 * ranges + (2 if sharing else 1) * short + 1, ITEM), dtype=torch.int32, device=device)
        arrived = torch.empty(rows * kv_heads, dtype=torch.int32, device=device)
        every = (slots + (able * shape.most if sharing else 0)) * heads
        sums = torch.empty(every * padded, dtype=torch.float32, device=device)
        tops = torch.empty(every * 2, dtype=torch.float32, device=device)
        split_items(
            (parts, 1, 1),
            (meta.cu_q, meta.lengths_R, items, arrived, *packs),
            (parts, self.window, ranges, slots),
            (
                few, kv_heads, power(kv_heads), shape.tile, shape.segment, shape.most, queries, self.windowed, sharing
            ),
        )  # fmt: skip
        self.split = split_attention
        self.ranges, self.split_grid, self.split_shape = (ranges, slots), (ranges * kv_heads, 1, 1), shape
        self.split_work = (items, arrived, packs[-1], sums, tops)
        self.split_constants = (
            *common, sharing, queries, height, power(own), shape.tile, shape.most, shape.stages
        )  # fmt: skip

    def _plan_packs(
        self, meta: AttentionMeta, table_RP: Tensor, able: int, size: int, block: int, shape: SplitShape
    ) -> tuple[Tensor, ...]:
        """What `form_packs` leaves, and room for what `split_items` adds to it."""
        rows = len(meta.lengths_R)
        leaders, common, shared, counts, owners = torch.empty((5, rows), dtype=torch.int32, device=table_RP.device)
        members = torch.empty((rows, MEMBERS), dtype=torch.int32, device=table_RP.device)
        slots = torch.empty((rows, 4), dtype=torch.int32, device=table_RP.device)
        find_leaders(
            (rows, 1, 1), (meta.cu_q, meta.lengths_R, table_RP, leaders, common), (able, table_RP.stride(0)),
            (block, shape.tile, shape.segment, shape.most),
        )  # fmt: skip
        form_packs((rows, 1, 1), (leaders, common, shared, counts, owners, members), (able,), (size,))
        return shared, counts, owners, members, slots

    def run(self, q_THE: Tensor, kv: Tensor, table_RP: Tensor, slopes_H: Tensor | None, out_THE: Tensor) -> None:
        tensors = (q_THE, kv, table_RP, slopes_H, out_THE)
        sizes = (table_RP.stride(0), self.window, kv.shape[1])
        if self.split is not None:
            shape = self.split_shape
            self.split(
                self.split_grid, (*tensors, *self.split_work), (*sizes, *self.ranges), self.split_constants,
                shape.warps, registers=shape.registers,
            )  # fmt: skip
        if self.tiles is not None:
            shape = self.tile_shape
            self.tiles(
                self.tile_grid, (*tensors, *self.tile_work), sizes, self.tile_constants, shape.warps,
                registers=shape.registers,
            )  # fmt: skip


def attention(
    q_THE: Tensor,
    kv: Tensor,
    group: GroupMeta,
    meta: AttentionMeta,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    slopes_H: Tensor | None = None,
) -> Tensor:
    """See `quire.ops.attention.reference`. The bits of a row depend on the row and on how many of its tokens the step
    computes, not on the other rows. `scale` must be positive; the numbers of a head lie side by side. Keys and
    values in int8 are left to the reference."""
    return _attend(q_THE, kv, group, meta, scale, window, softcap, slopes_H, False)


def invariant_attention(
    q_THE: Tensor,
    kv: Tensor,
    group: GroupMeta,
    meta: AttentionMeta,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    slopes_H: Tensor | None = None,
) -> Tensor:
    """As `attention`, but the bits of a token depend on its row's keys and its place alone. Rows are not cut over their
    keys: few and long ones are slow."""
    return _attend(q_THE, kv, group, meta, scale, window, softcap, slopes_H, True)


def _attend(
    q_THE: Tensor, kv: Tensor, group: GroupMeta, meta: AttentionMeta, scale: float, window: int | None,
    softcap: float | None, slopes_H: Tensor | None, invariant: bool,
) -> Tensor:  # fmt: skip
    if kv.dtype == torch.int8:
        return reference.attention(q_THE, kv, group, meta, scale, window, softcap, slopes_H)
    table_RP = group.block_tables_RP
    key = (
        Step, invariant, q_THE.shape, q_THE.stride(), kv.shape, scale, window, softcap, slopes_H is None,
        table_RP.data_ptr(),
    )  # fmt: skip
    step = meta.scratch.get(key)
    if step is None:
        step = Step(q_THE, kv, meta, scale, window, softcap, slopes_H is not None, invariant, table_RP)
        meta.scratch[key] = step
    out_THE = torch.empty(q_THE.shape, dtype=q_THE.dtype, device=q_THE.device)
    step.run(q_THE, kv, table_RP, slopes_H, out_THE)
    return out_THE
