"""Rows of a table. Owns: the kernel of `embedding`.

Shape legend: T tokens, V rows of the table, D features.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from quire.ops.triton.launch import Kernel, ceil, power, release, wait

BLOCK = 2048


def embedding(ids_T: Tensor, table_VD: Tensor, offset: int, add_TD: Tensor | None = None, scale: float = 1.0) -> Tensor:
    size = table_VD.shape[1]
    dtype = table_VD.dtype if add_TD is None else torch.promote_types(table_VD.dtype, add_TD.dtype)
    out = torch.empty((*ids_T.shape, size), dtype=dtype, device=ids_T.device)
    if out.numel() == 0:
        return out
    block = min(BLOCK, power(size))
    _embedding_kernel(
        (ids_T.numel() * ceil(size, block), 1, 1),
        (ids_T.contiguous(), table_VD, None if add_TD is None else add_TD.contiguous(), out),
        constants=(table_VD.stride(0), offset, scale, size, block),
        warps=max(1, block // 256),
    )
    return out


@Kernel
def _embedding_kernel(
    ids, table, add, out,
    table_V: tl.constexpr, offset: tl.constexpr, scale: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    BLOCKS: tl.constexpr = (D + BLOCK - 1) // BLOCK
    t = (tl.program_id(0) // BLOCKS).to(tl.int64)
    d = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    inside = d < D
    wait(PDL)
    row = tl.load(ids + t).to(tl.int64) + offset
    y = tl.load(table + row * table_V + d, inside, other=0.0)
    if scale != 1.0:
        y = (y.to(tl.float32) * scale).to(table.dtype.element_ty)
    if add is not None:
        y = y.to(tl.float32) + tl.load(add + t * D + d, inside, other=0.0).to(tl.float32)
    tl.store(out + t * D + d, y.to(out.dtype.element_ty), inside)
