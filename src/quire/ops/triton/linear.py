# pyright: reportPossiblyUnboundVariable=false
"""Products with a weight for few tokens, which read it once at the speed of the memory.

Owns: two kernels. `rows`: a program holds a few whole rows of the weight in registers, before it waits for x, and
multiplies without tensor cores. `tiles`: tensor cores, a part of the inputs a program where there are few outputs.
Shape legend: M tokens, K inputs, N outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from quire.ops.triton.activation import FORMULAS, activate
from quire.ops.triton.launch import Kernel, ceil, dependent, power, release, wait


def rows(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, height: int, warps: int) -> Tensor:
    """(M, N), or with a `kind` the gated activation of both halves of it. `height`: outputs of a program."""
    tokens, inputs = x.shape
    outputs = weight.shape[0] // 2 if kind else weight.shape[0]
    out = torch.empty((tokens, outputs), dtype=x.dtype, device=x.device)
    _rows_kernel(
        (ceil(outputs, height), 1, 1),
        (x, weight, bias, out),
        constants=(tokens, x.stride(0), outputs, inputs, height, power(inputs), FORMULAS[kind] if kind else ""),
        warps=warps,
    )
    return out


@Kernel
def _rows_kernel(
    x, w, bias, out,
    M: tl.constexpr, x_M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    HEIGHT: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    n = tl.program_id(0).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT)
    k = tl.arange(0, BLOCK)
    a = _weights(w, n, k, N, K, HEIGHT, BLOCK)
    if KIND != "":
        b = _weights(w + N * K, n, k, N, K, HEIGHT, BLOCK)
    wait(PDL)
    for m in tl.static_range(M):
        if BLOCK == K:
            x_K = tl.load(x + m * x_M + k).to(tl.float32)
        else:
            x_K = tl.load(x + m * x_M + k, k < K, other=0.0).to(tl.float32)
        y = _finished(tl.sum(a.to(tl.float32) * x_K[None, :], 1), bias, n, N, out)
        if KIND != "":
            up = _finished(tl.sum(b.to(tl.float32) * x_K[None, :], 1), bias, N + n, 2 * N, out)
            y = _rounded(activate(y, KIND), out) * up
        tl.store(out + m * N + n, y.to(out.dtype.element_ty), n < N)


@triton.jit
def _weights(w, n, k, N: tl.constexpr, K: tl.constexpr, HEIGHT: tl.constexpr, BLOCK: tl.constexpr):
    at = w + n[:, None] * K + k[None, :]
    if N % HEIGHT == 0 and K == BLOCK:
        return tl.load(at, eviction_policy="evict_first")
    elif N % HEIGHT == 0:
        return tl.load(at, (k < K)[None, :], other=0.0, eviction_policy="evict_first")
    else:
        return tl.load(at, (n < N)[:, None] & (k < K)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def _finished(y, bias, n, N: tl.constexpr, out):
    """Outputs `n` as the plain product has them: with the bias, rounded."""
    if bias is not None:
        y += tl.load(bias + n, n < N, other=0.0).to(tl.float32)
    return _rounded(y, out)


@triton.jit
def _rounded(y, out):
    return y.to(out.dtype.element_ty).to(tl.float32)


def tiles(
    x: Tensor, weight: Tensor, bias: Tensor | None, kind: str,
    block_m: int, block_n: int, block_k: int, split: int, swap: bool, prefetch: int, warps: int, stages: int,
) -> Tensor:  # fmt: skip
    """As `rows`."""
    tokens, inputs = x.shape
    outputs = weight.shape[0] // 2 if kind else weight.shape[0]
    out = torch.empty((tokens, outputs), dtype=x.dtype, device=x.device)
    partial = None
    if split > 1:
        assert not kind
        partial = torch.empty((split, tokens, outputs), dtype=torch.float32, device=x.device)
    _tiles_kernel(
        (ceil(outputs, block_n) * split, ceil(tokens, block_m), 1),
        (x, weight, bias, out, partial),
        (tokens,),
        (
            x.stride(0), outputs, inputs, block_m, block_n, block_k, split, swap, prefetch,
            FORMULAS[kind] if kind else "", stages,
        ),
        warps,
        stages,
    )  # fmt: skip
    if partial is not None:
        block = 256
        _sum_kernel(
            (ceil(outputs, block), tokens, 1), (partial, bias, out), (tokens,), (outputs, split, block), warps=2
        )
    return out


@Kernel
def _tiles_kernel(
    x, w, bias, out, partial, M,
    x_M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, SWAP: tl.constexpr,
    PREFETCH: tl.constexpr, KIND: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    part = tl.program_id(0) % SPLIT
    first = (tl.program_id(0) // SPLIT).to(tl.int64) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    # Each part has as many blocks as the others, but the last.
    STEPS: tl.constexpr = (K + BLOCK_K * SPLIT - 1) // (BLOCK_K * SPLIT)
    start = part * (STEPS * BLOCK_K)
    stop = tl.minimum(start + STEPS * BLOCK_K, K)
    if PDL and PREFETCH:
        _prefetch(w, tl.minimum(n, N - 1), start, K, PREFETCH)
        if KIND != "":
            _prefetch(w + N * K, tl.minimum(n, N - 1), start, K, PREFETCH)
    wait(PDL)
    if SWAP:
        a = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        b = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        a = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        b = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    k = tl.arange(0, BLOCK_K)
    x_at = x + m[:, None] * x_M + k[None, :]
    w_at = w + n[:, None] * K + k[None, :]
    for at in tl.range(start, stop, BLOCK_K, num_stages=STAGES):
        if K % BLOCK_K == 0:
            x_MK = tl.load(x_at + at, (m < M)[:, None], other=0.0)
        else:
            x_MK = tl.load(x_at + at, (m < M)[:, None] & (k < K - at)[None, :], other=0.0)
        a = _product(a, x_MK, w_at + at, n, k, at, N, K, BLOCK_N, BLOCK_K, SWAP)
        if KIND != "":
            b = _product(b, x_MK, w_at + N * K + at, n, k, at, N, K, BLOCK_N, BLOCK_K, SWAP)
    if SWAP:
        a = tl.trans(a)
        b = tl.trans(b)
    at = m[:, None] * N + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    if SPLIT > 1:
        tl.store(partial + part.to(tl.int64) * M * N + at, a, inside)
    else:
        y = _finished(a, bias, n[None, :], N, out)
        if KIND != "":
            y = _rounded(activate(y, KIND), out) * _finished(b, bias, N + n[None, :], 2 * N, out)
        tl.store(out + at, y.to(out.dtype.element_ty), inside)


@triton.jit
def _product(
    acc, x_MK, w_at, n, k, at, N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr,
):  # fmt: skip
    if N % BLOCK_N == 0 and K % BLOCK_K == 0:
        w_NK = tl.load(w_at, eviction_policy="evict_first")
    else:
        w_NK = tl.load(w_at, (n < N)[:, None] & (k < K - at)[None, :], other=0.0, eviction_policy="evict_first")
    return tl.dot(w_NK, tl.trans(x_MK), acc) if SWAP else tl.dot(x_MK, tl.trans(w_NK), acc)


@triton.jit
def _prefetch(w, n, start, K: tl.constexpr, BYTES: tl.constexpr):
    """Asks for so many bytes of the rows `n` from column `start` on to be brought into the L2 cache."""
    # As many pieces as there are threads, or more: a thread that has none repeats another's.
    PIECES: tl.constexpr = 8 if n.shape[0] < 32 else 256 // n.shape[0]
    piece = tl.arange(0, PIECES) * (BYTES // PIECES)
    address = (w + n * K + start).to(tl.int64, bitcast=True)[:, None] + piece[None, :]
    tl.inline_asm_elementwise(
        "{ .reg .b64 a; cvta.to.global.u64 a, $1; cp.async.bulk.prefetch.L2.global [a], $2; mov.u32 $0, 0; }",
        "=r,l,r", [address, tl.full(address.shape, BYTES // PIECES, tl.int32)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@Kernel
def _sum_kernel(partial, bias, out, M, N: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    release(PDL)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = tl.program_id(1).to(tl.int64)
    inside = n < N
    wait(PDL)
    y = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(SPLIT):
        y += tl.load(partial + (part * M + m) * N + n, inside, other=0.0)
    if bias is not None:
        y += tl.load(bias + n, inside, other=0.0).to(tl.float32)
    tl.store(out + m * N + n, y.to(out.dtype.element_ty), inside)


def steady(
    x: Tensor, weight: Tensor, bias: Tensor | None,
    block_m: int, block_n: int, block_k: int, split: int, group: int, programs: int, warps: int, stages: int,
    special: bool = False,
) -> Tensor:  # fmt: skip
    """(M, N): as many programs as multiprocessors, each with a tile after another."""
    tokens, inputs = x.shape
    outputs = weight.shape[0]
    out = torch.empty((tokens, outputs), dtype=x.dtype, device=x.device)
    x_tiles = TensorDescriptor.from_tensor(x, [block_m, block_k])
    weight_tiles = TensorDescriptor.from_tensor(weight, [block_n, block_k])
    count = ceil(outputs, block_n) * ceil(tokens, block_m)
    _steady_kernel._jit[(min(count, programs),)](
        x_tiles, weight_tiles, bias, out, tokens,
        outputs, inputs, block_m, block_n, block_k, split, group, programs, stages, special, dependent(),
        num_warps=warps, num_stages=stages, launch_pdl=dependent(),
    )  # fmt: skip
    return out


@Kernel
def _steady_kernel(
    x, w, bias, out, M,
    N: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr, STAGES: tl.constexpr,
    SPECIAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    blocks_m = tl.cdiv(M, BLOCK_M)
    BLOCKS_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    STEPS: tl.constexpr = (K + BLOCK_K * SPLIT - 1) // (BLOCK_K * SPLIT)
    wait(PDL)
    for tile in tl.range(tl.program_id(0), blocks_m * BLOCKS_N, PROGRAMS, flatten=not SPECIAL, warp_specialize=SPECIAL):
        first_m = tile // (GROUP * BLOCKS_N) * GROUP
        height = tl.minimum(blocks_m - first_m, GROUP)
        m = (first_m + tile % (GROUP * BLOCKS_N) % height) * BLOCK_M
        n = tile % (GROUP * BLOCKS_N) // height * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if SPLIT == 1:
            for step in tl.range(STEPS):
                acc = tl.dot(x.load([m, step * BLOCK_K]), w.load([n, step * BLOCK_K]).T, acc)
        else:
            for part in tl.static_range(SPLIT):
                sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                for step in tl.range(part * STEPS, part * STEPS + STEPS):
                    sums = tl.dot(x.load([m, step * BLOCK_K]), w.load([n, step * BLOCK_K]).T, sums)
                acc += sums
        row = m + tl.arange(0, BLOCK_M)
        column = n + tl.arange(0, BLOCK_N)
        if bias is not None:
            acc += tl.load(bias + column, column < N, other=0.0).to(tl.float32)[None, :]
        at = out + row.to(tl.int64)[:, None] * N + column[None, :]
        tl.store(at, acc.to(out.dtype.element_ty), (row < M)[:, None] & (column < N)[None, :])
