"""A product whose every number is summed in the same order, however many tokens there are: for runs that must give the
same bits in any batch.

Owns: the implementation "invariant" of `linear` and of `gated_linear`. Tensor cores add 16 inputs at a time, in order;
tiles may be cut as is fastest for the number of tokens, but inputs are parted by the shape of the weight alone, and
parts are added in their order. Shape legend as in `linear.py`.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from quire.ops.triton import linear as few
from quire.ops.triton.activation import gated_activation as gate
from quire.ops.triton.launch import Kernel, ceil, processors, release, wait

# Tiles of 64 outputs that keep the memory busy for few tokens; with fewer, the inputs are parted.
TILES = 96
# Tokens up to which the kernel for few is used, and those up to which parts are summed by a kernel of their own.
FEW, SOME = 64, 512


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    outputs, inputs = weight_NK.shape
    x_MK = x.reshape(-1, inputs)
    tokens, parts = x_MK.shape[0], parts_of(outputs, inputs)
    if tokens == 0:
        return x.new_empty((*x.shape[:-1], outputs), dtype=dtype)
    if tokens <= FEW:
        blocks = (64, 64, 128) if parts > 1 or outputs < 128 * TILES else (64, 128, 64)
        plan = (*blocks, parts, False, 4, 4)
        return few.product(x_MK, weight_NK, bias_N, "", dtype or x.dtype, plan).view(*x.shape[:-1], outputs)
    return _many(x_MK, weight_NK, bias_N, dtype or x.dtype, parts).view(*x.shape[:-1], outputs)


def gated_linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None, kind: str) -> Tensor:
    return gate(linear(x, weight_NK, bias_N), kind)


@lru_cache(1024)
def parts_of(outputs: int, inputs: int) -> int:
    """A fact of the weight: never of the tokens."""
    parts = 1
    while ceil(outputs, 64) * parts < TILES and inputs >= 2 * parts * few.LEAST and parts < 8:
        parts *= 2
    return parts


def _many(x_MK: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, parts: int) -> Tensor:
    tokens, inputs = x_MK.shape
    outputs = weight.shape[0]
    out = torch.empty((tokens, outputs), dtype=dtype, device=x_MK.device)
    x_MK = x_MK if x_MK.stride(1) == 1 and x_MK.stride(0) % 8 == 0 else x_MK.contiguous()
    wide = ceil(tokens, 128) * ceil(outputs, 256) >= 88
    block_n, stages = (256, 3) if wide else (128, 4)
    apart = parts > 1 and tokens <= SOME
    partial = torch.empty((parts, tokens, outputs), dtype=torch.float32, device=x_MK.device) if apart else None
    jobs = ceil(tokens, 128) * ceil(outputs, block_n) * (parts if apart else 1)
    _many_kernel(
        (min(jobs, processors(x_MK.device)), 1, 1),
        (bias, out, partial),
        (tokens,),
        (outputs, inputs, 128, block_n, 64, parts, apart, x_MK.dtype == torch.bfloat16),
        8,
        stages,
        (TensorDescriptor.from_tensor(x_MK, [128, 64]), TensorDescriptor.from_tensor(weight, [block_n, 64])),
    )
    if partial is not None:
        few.add_parts(partial, bias, out, x_MK.dtype == torch.bfloat16)
    return out


@Kernel
def _many_kernel(
    x, w, bias, out, partial, M,
    N: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr, APART: tl.constexpr, BRAIN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    blocks_m = tl.cdiv(M, BLOCK_M)
    BLOCKS_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    SHARES: tl.constexpr = PARTS if APART else 1
    STEPS: tl.constexpr = few.part_size(K, PARTS) // BLOCK_K
    GROUP: tl.constexpr = 8 * BLOCKS_N
    wait(PDL)
    for job in tl.range(
        tl.program_id(0), blocks_m * BLOCKS_N * SHARES, tl.num_programs(0), flatten=PARTS == 1 or APART
    ):
        # Eight tiles of tokens share the weight's tiles while these are in the cache.
        tile, part = job // SHARES, job % SHARES
        first = tile // GROUP * 8
        height = tl.minimum(blocks_m - first, 8)
        m = (first + tile % GROUP % height) * BLOCK_M
        n = tile % GROUP // height * BLOCK_N
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if PARTS == 1 or APART:
            for step in tl.range(STEPS):
                k = (part * STEPS + step) * BLOCK_K
                sums = tl.dot(x.load([m, k]), w.load([n, k]).T, sums)
        else:
            for inner in tl.range(PARTS):
                mine = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                for step in tl.range(STEPS):
                    k = (inner * STEPS + step) * BLOCK_K
                    mine = tl.dot(x.load([m, k]), w.load([n, k]).T, mine)
                sums += mine
        row, column = m + tl.arange(0, BLOCK_M)[:, None], n + tl.arange(0, BLOCK_N)[None, :]
        at = row.to(tl.int64) * N + column
        inside = (row < M) & (column < N)
        if APART:
            tl.store(partial + M.to(tl.int64) * N * part + at, sums, inside)
        else:
            y = few.finished(sums, bias, column, N, tl.bfloat16 if BRAIN else tl.float16)
            tl.store(out + at, y.to(out.dtype.element_ty), inside)
