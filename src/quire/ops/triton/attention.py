"""The implementations of the op `attention`: which kernels a step needs, and their constants.

Owns: what a step makes once and its layers share (kept in `AttentionMeta.scratch`): lists of work, room for partial
results, the choice of kernels. "triton": rows of few tokens (decodes, drafts) are cut over their keys
(`attention_split.py`), the others go by tiles of queries (`attention_tiles.py`, or `attention_hopper.py` where it
serves the layer and the host knows the counts); where it does not (a captured graph of mixed rows), both run and the
device decides. "invariant": all rows go by tiles of one shape, so that the bits of a token do not depend on how its row
was cut into steps either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from quire.ops.attention import reference
from quire.ops.attention.meta import AttentionMeta, GroupMeta
from quire.ops.triton.attention_shared import LEAST, MEMBERS, find_leaders, form_packs
from quire.ops.triton.attention_split import split_attention
from quire.ops.triton.attention_tiles import tile_attention
from quire.ops.triton.attention_work import ITEM, split_items, tile_items
from quire.ops.triton.launch import INTERPRETED, power

_LOG2E = 1.4426950408889634
_PACKED_BYTES = 96 << 20  # for partial results of packed rows: so many rows may be packed
_PART = 4  # tiles of keys, at least, of a part of a tile of queries that is cut over its keys
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
    while the other's products are under way. That gives 487 TFLOP/s for a prompt of 8,192 tokens of 8B;
    `attention_hopper.py` 652, cuDNN 609 over gathered keys, with a plan of 0.05 s for each new length.
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


@cache
def _hopper(device: torch.device, size: int, block: int, group: int) -> bool:
    """Whether `attention_hopper.py` serves such layers: it is written for one version of an experimental language."""
    if INTERPRETED or device.type != "cuda" or not triton.__version__.startswith("3.6."):
        return False
    return torch.cuda.get_device_capability(device)[0] == 9 and size == 128 and block in (16, 32) and 64 % group == 0


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
        self.split = self.tiles = self.packs = self.hopper = None
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
            if invariant:
                shape, cut = invariant_shape(bytes_of_key, exact), False
            else:
                plain = window is None and softcap is None and not slopes and not exact and q_lens is not None
                hopper = plain and _hopper(kv.device, size, block, group)
                shape, cut = _tiling(meta, tokens, q_lens, few, heads, kv_heads, bytes_of_key, exact, hopper)
                if hopper and not cut:
                    self.hopper = (*strides, rule[0], heads, kv_heads, size, block, shape.keys, shape.stages)
            height = max(shape.rows, power(group))
            self._plan_tiles(meta, tokens, q_lens, few, kv_heads, height, shape, common, cut)

    def _plan_tiles(
        self, meta: AttentionMeta, tokens: int, q_lens: Sequence[int] | None, few: int, kv_heads: int, height: int,
        shape: TileShape, common: tuple[Any, ...], cut: bool,
    ) -> None:  # fmt: skip
        device = meta.lengths_R.device
        rows = len(meta.lengths_R)
        queries = height * kv_heads // common[4]
        every = _multiprocessors(device) * shape.programs
        tiles = _tiles(meta, tokens, q_lens, few, queries)
        work: tuple[Tensor | None, ...] = (None, None, None)
        if cut:
            tiles += every // kv_heads
            arrived = torch.empty(tiles * kv_heads, dtype=torch.int32, device=device)
            sums = torch.empty(tiles * kv_heads * height * common[7], dtype=torch.float32, device=device)
            tops = torch.empty(tiles * kv_heads * height * 2, dtype=torch.float32, device=device)
            work = (arrived, sums, tops)
        items = torch.empty((max(1, tiles), ITEM), dtype=torch.int32, device=device)
        head = torch.empty(1, dtype=torch.int32, device=device)
        tile_items(
            (rows, 1, 1),
            (meta.cu_q, meta.lengths_R, items, head, work[0]),
            (rows, self.window, every),
            (few, queries, kv_heads, power(kv_heads), shape.keys, _PART, self.windowed, cut),
        )
        alone = q_lens is not None and not cut and self.hopper is None  # a program for each item
        programs = tiles * kv_heads if alone else min(tiles * kv_heads, every)
        self.tiles = tile_attention
        self.tile_grid, self.tile_work, self.tile_shape = (max(1, programs), 1, 1), (items, head, *work), shape
        self.tile_constants = (*common, cut, height, shape.keys, shape.stages)

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
        if self.hopper is not None:
            from quire.ops.triton.attention_hopper import hopper_attention, pages_of

            hopper_attention(
                self.tile_grid, (q_THE, table_RP, out_THE, *self.tile_work[:2]),
                (table_RP.stride(0), kv.shape[1] * kv.shape[2]), self.hopper, self.tile_shape.warps,
                tiles=(pages_of(kv, kv.shape[2]),),
            )  # fmt: skip
        elif self.tiles is not None:
            shape = self.tile_shape
            self.tiles(
                self.tile_grid, (*tensors, *self.tile_work), sizes, self.tile_constants, shape.warps,
                registers=shape.registers,
            )  # fmt: skip


def _tiles(meta: AttentionMeta, tokens: int, q_lens: Sequence[int] | None, few: int, queries: int) -> int:
    """Tiles of so many queries that rows of more than `few` tokens fill, at most."""
    if q_lens is None:
        return min(tokens // (few + 1), len(meta.lengths_R)) + tokens // queries
    return sum(-(-count // queries) for count in q_lens if count > few)


def _tiling(
    meta: AttentionMeta, tokens: int, q_lens: Sequence[int] | None, few: int, heads: int, kv_heads: int,
    bytes_of_key: int, exact: bool, hopper: bool,
) -> tuple[TileShape, bool]:  # fmt: skip
    """The shape of tiles, and whether they may be cut over their keys: where they are few, and the rows may be long.
    `hopper`: whether that kernel may be taken; it is, unless its tiles leave too many multiprocessors idle."""
    group, multiprocessors = heads // kv_heads, _multiprocessors(meta.lengths_R.device)
    small = tile_shape(bytes_of_key, exact, 0)
    if meta.max_len >= 2 * _PART * small.keys and not (
        hopper and _tiles(meta, tokens, q_lens, few, 128 // group) * kv_heads * 3 >= multiprocessors * 2
    ):
        tiles = _tiles(meta, tokens, q_lens, few, max(1, small.rows // group))
        if tiles * kv_heads <= multiprocessors * small.programs:
            return small, True
    if hopper:
        return TileShape(128, 128, 4, 2, 1), False
    return tile_shape(bytes_of_key, exact, group * (meta.max_q if q_lens is None else max(q_lens))), False


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
    """See `quire.ops.attention.reference`. The bits of a row of few tokens depend on the row and on how many of its
    tokens the step computes, not on the other rows; where some tokens more stand behind many, the step's other rows
    decide in how many parts their keys are cut. `scale` must be positive; the numbers of a head lie side by side. Keys
    and values in int8 are left to the reference."""
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
