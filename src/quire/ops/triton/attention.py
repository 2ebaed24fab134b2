"""The implementation named "triton" of the op `attention`: which kernels a step needs, and their constants.

Owns: what a step makes once and its layers share (kept in `AttentionMeta.scratch`): lists of work, partial results, the
choice of kernels. Rows of few tokens (decodes, drafts) are cut over their keys (`attention_split.py`), the others go by
tiles of queries (`attention_tiles.py`). Where the host does not know the counts (a captured graph of mixed rows), both
run and the device decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from quire.ops.attention.meta import AttentionMeta, GroupMeta
from quire.ops.triton.attention_split import split_attention
from quire.ops.triton.attention_tiles import tile_attention
from quire.ops.triton.attention_work import ITEM, split_items, tile_items

_LOG2E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class SplitShape:
    """Constants of `split_attention`. `tile`: keys of a tile; `segment`, `most`: tiles of a segment of a short row,
    segments of a long one. These decide the bits of a result, so they depend on nothing but the layer's shape.
    `programs`: for each multiprocessor."""

    tile: int
    segment: int = 1
    most: int = 32
    warps: int = 4
    stages: int = 3
    programs: int = 3
    registers: int | None = None


@dataclass(frozen=True, slots=True)
class TileShape:
    """Constants of `tile_attention`: rows (tokens x heads) and keys of a tile."""

    rows: int
    keys: int
    warps: int
    stages: int
    programs: int = 2
    registers: int | None = None


def split_shape(bytes_of_key: int) -> SplitShape:
    """By the bytes of a key of one head, as it lies in shared memory."""
    if bytes_of_key <= 256:
        return SplitShape(tile=64, registers=168)
    return SplitShape(tile=32) if bytes_of_key <= 512 else SplitShape(tile=16, segment=4, stages=2)


def tile_shape(bytes_of_key: int, exact: bool, rows: int) -> TileShape:
    """`rows`: tokens x heads of the longest row."""
    if exact:
        return TileShape(rows=32, keys=32 if bytes_of_key <= 512 else 16, warps=4, stages=2)
    few = rows <= 64
    if bytes_of_key <= 128:
        return TileShape(64, 64, 4, 2) if few else TileShape(128, 64, 8, 3, registers=128)
    if bytes_of_key <= 256:
        return TileShape(64, 64, 4, 3) if few else TileShape(128, 64, 8, 2, registers=128)
    return TileShape(64, 32, 4, 2) if few else TileShape(128, 32, 8, 2)


def hopper_shape(size: int, rows: int) -> TileShape | None:
    """For `tile_attention_hopper`, where it serves heads of this size and is the faster."""
    if size not in (64, 128):
        return None
    return TileShape(128, 128, 8, 0)


@cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


class Launch:
    """A kernel with what stays the same over the layers of a step: programs, fixed buffers and constants. The first
    call goes through Triton's front end, the others straight to what it compiled, in a fraction of the host's time."""

    def __init__(
        self, kernel: Any, programs: int, fixed: tuple[Tensor, ...], constants: dict[str, Any], **options: Any
    ) -> None:
        self._kernel, self._programs, self._fixed = kernel, programs, fixed
        self._constants, self._options = constants, options
        self._compiled: Any = None

    def __call__(self, tensors: tuple[Tensor, ...], numbers: tuple[float, ...]) -> None:
        """`tensors` differ from layer to layer, but not in shape; the order is they, the fixed ones, numbers."""
        if self._compiled is None:
            self._compiled = self._kernel[(self._programs,)](
                *tensors, *self._fixed, *numbers, **self._constants, **self._options
            )
            self._addresses = tuple(tensor.data_ptr() for tensor in self._fixed)
            self._device = tensors[0].device.index
            return
        kernel = self._compiled
        addresses = [tensor.data_ptr() for tensor in tensors]
        if any(address % 16 for address in addresses):  # was compiled for aligned ones
            self._compiled = None
            return self(tensors, numbers)
        kernel.run(
            self._programs, 1, 1, torch._C._cuda_getCurrentRawStream(self._device), kernel.function,
            kernel.packed_metadata, None, None, None, *addresses, *self._addresses, *numbers, *self._constants.values(),
        )  # fmt: skip


class Step:
    """What the layers of one kind share in a step. Shape legend: R rows, K KV heads, G query heads of a KV head."""

    def __init__(
        self, q_THE: Tensor, kv: Tensor, meta: AttentionMeta, window: int | None, rule: dict[str, bool]
    ) -> None:
        self.tokens, heads, size = q_THE.shape
        pages, block, kv_heads = kv.shape[1:4]
        group = heads // kv_heads
        self.rows = meta.lengths_R.shape[0]
        exact = torch.float32 in (q_THE.dtype, kv.dtype) or q_THE.dtype != kv.dtype
        padded = max(16, triton.next_power_of_2(size))
        bytes_of_key = padded * (4 if exact else kv.element_size())
        units = _multiprocessors(q_THE.device)
        self.window = window or 0
        common = {
            "H": heads, "K": kv_heads, "E": size, "EP": padded, "B": block, "EXACT": exact,
            "WIDE": pages * block * kv_heads * size >= 1 << 31, "WINDOWED": window is not None, **rule,
        }  # fmt: skip
        new = {"device": q_THE.device}

        # Rows of up to `few` tokens fill no more than one tile of 16 rows.
        few = max(1, 16 // group)
        q_lens = [1] * self.rows if meta.q_lens is None and meta.max_q == 1 else meta.q_lens
        short = self.rows if q_lens is None else sum(count <= few for count in q_lens)
        self.split = self.tiles = None
        if short:
            shape = split_shape(bytes_of_key)
            longest = few if q_lens is None else max(count for count in q_lens if count <= few)
            queries = 1 if longest == 1 else few
            own = queries * group
            # Ranges of work, fewer where not even the longest rows could fill them.
            longest = -(-meta.max_len // shape.tile) + 1
            self.ranges = max(1, min(units * shape.programs // kv_heads, short * longest))
            slots = min(short, self.ranges) * (min(shape.most, longest) + 1)
            self.items = torch.empty((2 * self.ranges + short + 1, ITEM), dtype=torch.int32, **new)
            self.arrived = torch.empty(slots * kv_heads, dtype=torch.int32, **new)
            self.parts = torch.empty(slots * heads * queries * padded, dtype=torch.float32, **new)
            self.tops = torch.empty(slots * heads * queries * 2, dtype=torch.float32, **new)
            split_items[(self.rows,)](
                meta.cu_q, meta.lengths_R, self.items, self.arrived, self.rows, self.window, few + 1, self.ranges,
                K=kv_heads, KP=triton.next_power_of_2(kv_heads), TILE=shape.tile, SEGMENT=shape.segment,
                MOST=shape.most, WINDOWED=window is not None, num_warps=4,
            )  # fmt: skip
            self.split = Launch(
                split_attention,
                self.ranges * kv_heads,
                (self.items, self.arrived, self.parts, self.tops),
                {
                    **common, "BQ": queries, "M": max(16, triton.next_power_of_2(own)),
                    "ROWS": triton.next_power_of_2(own), "TILE": shape.tile, "STAGES": shape.stages,
                },
                num_warps=shape.warps, maxnreg=shape.registers,
            )  # fmt: skip
        if q_lens is None or short < self.rows:
            rows = group * (meta.max_q if q_lens is None else max(q_lens))
            shape = None
            if not (exact or any(rule.values())) and _is_hopper(q_THE.device) and group <= 64:
                shape = hopper_shape(size, rows)
            by_hand = shape is not None
            shape = shape or tile_shape(bytes_of_key, exact, rows)
            height = max(shape.rows, triton.next_power_of_2(group))
            queries = height // group
            if q_lens is None:
                tiles = min(self.tokens // (few + 1), self.rows) + self.tokens // queries
                programs = min(tiles * kv_heads, units * shape.programs)
            else:
                tiles = sum(-(-count // queries) for count in q_lens if count > few)
                programs = tiles * kv_heads
            self.tile_items = torch.empty((max(1, tiles), ITEM), dtype=torch.int32, **new)
            self.tile_head = torch.empty(1, dtype=torch.int32, **new)
            tile_items[(self.rows,)](
                meta.cu_q, meta.lengths_R, self.tile_items, self.tile_head, self.rows, few + 1, BQ=queries, num_warps=4
            )
            fixed = (self.tile_items, self.tile_head)
            if by_hand:
                from quire.ops.triton.attention_hopper import tile_attention_hopper

                names = ("H", "K", "E", "B", "WIDE", "WINDOWED")
                constants = {name: common[name] for name in names}
                constants |= {"M": height, "N": shape.keys, "WARPS": shape.warps}
                self.tiles = Launch(tile_attention_hopper, programs, fixed, constants, num_warps=shape.warps)
            else:
                constants = {**common, "M": height, "N": shape.keys, "STAGES": shape.stages}
                options = {"num_warps": shape.warps, "maxnreg": shape.registers}
                self.tiles = Launch(tile_attention, programs, fixed, constants, **options)

    def run(
        self, q_THE: Tensor, kv: Tensor, group: GroupMeta, out_THE: Tensor, scale: float, softcap: float, slopes: Tensor
    ) -> None:
        tensors = (q_THE, kv, group.block_tables_RP, slopes, out_THE)
        numbers = (
            kv.stride(0), q_THE.stride(0), q_THE.stride(1), group.block_tables_RP.stride(0), scale, softcap, self.window
        )  # fmt: skip
        if self.split is not None:
            self.split(tensors, (*numbers, self.ranges))
        if self.tiles is not None:
            self.tiles(tensors, numbers)


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
    """See `quire.ops.attention.reference`. The bits of a row depend on the row alone, not on its batch. `scale` must be
    positive; q, keys and values lie with E contiguous."""
    key = (q_THE.shape, q_THE.dtype, kv.shape, kv.dtype, window, softcap is None, slopes_H is None)
    step = meta.scratch.get(key)
    if step is None:
        step = Step(q_THE, kv, meta, window, {"SOFTCAP": softcap is not None, "ALIBI": slopes_H is not None})
        meta.scratch[key] = step
    out_THE = torch.empty(q_THE.shape, dtype=q_THE.dtype, device=q_THE.device)
    if softcap is None:
        step.run(q_THE, kv, group, out_THE, scale * _LOG2E, 0.0, out_THE if slopes_H is None else slopes_H)
    else:
        step.run(
            q_THE, kv, group, out_THE, scale / softcap, softcap * _LOG2E, out_THE if slopes_H is None else slopes_H
        )
    return out_THE
