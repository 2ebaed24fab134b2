# pyright: reportPossiblyUnboundVariable=false
"""Products with a weight for few tokens, which read it once, near the speed of the memory.

Owns: `linear` and `gated_linear`, the choice among kernels, and two of them. `rows`, for one or two tokens: a program
loads a few whole rows of the weight before it waits for x, and multiplies without tensor cores. `tiles`: tensor cores;
where there are few outputs the inputs are parted among programs, and a second kernel sums the parts in their order.
More tokens are left to torch. A token's result does not depend on the others of the call.

Shape legend: M tokens, K inputs, N outputs (of a gated product: half the rows of the weight).
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.ops import linear as reference
from quire.ops.triton.activation import FORMULAS, activate, gated_activation
from quire.ops.triton.launch import Kernel, ceil, power, release, wait

# Measured on an H200 with the matrices of Qwen3-0.6B, Llama-3.2-1B and Llama-3.1-8B, layer after layer of distinct
# weights in one graph (benchmarks/gpu/linear.py).
# Outputs and warps of a program of `rows` for one and for two tokens, by inputs rounded up to a power of two.
ROWS = {
    1: {1024: (4, 2), 2048: (4, 4), 4096: (1, 4), 8192: (2, 4), 16384: (2, 8)},
    2: {1024: (4, 2), 2048: (4, 4), 4096: (2, 8), 8192: (1, 8)},
}
# Programs that keep the memory busy: with fewer tiles of outputs, inputs are parted, but not into less than so many.
PROGRAMS, LEAST = 128, 256
# Most tokens of a product here.
MOST = 64


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    outputs, inputs = weight_NK.shape
    x_MK = x if x.dim() == 2 else x.reshape(-1, inputs)
    plan = choose(x_MK.shape[0], outputs, inputs, False)
    if plan is None:
        return reference.linear(x, weight_NK, bias_N, dtype)
    return product(x_MK, weight_NK, bias_N, "", dtype or x.dtype, plan).view(*x.shape[:-1], outputs)


def gated_linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None, kind: str) -> Tensor:
    outputs, inputs = weight_NK.shape[0] // 2, weight_NK.shape[1]
    x_MK = x if x.dim() == 2 else x.reshape(-1, inputs)
    plan = choose(x_MK.shape[0], outputs, inputs, True)
    if plan is None:
        return gated_activation(reference.linear(x, weight_NK, bias_N), kind)
    return product(x_MK, weight_NK, bias_N, FORMULAS[kind], x.dtype, plan).view(*x.shape[:-1], outputs)


Plan = tuple[int, ...]


@lru_cache(4096)
def choose(tokens: int, outputs: int, inputs: int, gated: bool) -> Plan | None:
    """(height, warps) of `rows`, (tokens, outputs, inputs, parts, swapped, warps, stages) of `tiles`, None for torch's
    product."""
    if tokens == 0 or tokens > MOST:
        return None
    if (plan := ROWS.get(tokens, {}).get(power(max(inputs, 1024)))) is not None:
        return (max(1, plan[0] // 2), plan[1]) if gated else plan
    block = max(16, power(tokens))
    parts = 1
    while not gated and ceil(outputs, 64) * parts < PROGRAMS and inputs >= 2 * parts * LEAST:
        parts *= 2
    if block > 16 and not gated and inputs < outputs < 64 * PROGRAMS:
        return None  # torch's is as fast here
    if block == 64 and outputs >= 128 * PROGRAMS:
        return 64, 128, 64, 1, False, 4, 4
    return block, 64, 128, parts, True, 4, 4


def product(x_MK: Tensor, weight: Tensor, bias: Tensor | None, formula: str, dtype: torch.dtype, plan: Plan) -> Tensor:
    """(M, N), or with a formula the gated activation of both halves."""
    tokens, inputs = x_MK.shape
    x_MK = x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()
    outputs = weight.shape[0] // 2 if formula else weight.shape[0]
    out = torch.empty((tokens, outputs), dtype=dtype, device=x_MK.device)
    stride = inputs if tokens == 1 else x_MK.stride(0)
    if len(plan) == 2:
        height, warps = plan
        constants = (tokens, stride, outputs, inputs, height, power(max(inputs, 64)), formula)
        _rows_kernel((ceil(outputs, height), 1, 1), (x_MK, weight, bias, out), constants=constants, warps=warps)
        return out
    block_m, block_n, block_k, parts, swap, warps, stages = plan
    partial = None
    if parts > 1:
        partial = torch.empty((parts, tokens, outputs), dtype=torch.float32, device=x_MK.device)
    _tiles_kernel(
        (ceil(outputs, block_n) * parts, ceil(tokens, block_m), 1),
        (x_MK, weight, bias, out, partial),
        (tokens,),
        (stride, outputs, inputs, block_m, block_n, block_k, parts, swap, formula, stages),
        warps,
        stages,
    )
    if partial is not None:
        add_parts(partial, bias, out, x_MK.dtype == torch.bfloat16)
    return out


def add_parts(partial: Tensor, bias: Tensor | None, out: Tensor, brain: bool) -> None:
    """out = the sum of `partial` (parts, M, N) in that order, with the bias, rounded to bfloat16 (`brain`) or float16
    before it becomes out's type."""
    parts, tokens, outputs = partial.shape
    block = min(256, power(outputs))
    grid = (ceil(outputs, block), tokens, 1)
    _sum_kernel(grid, (partial, bias, out), (tokens,), (outputs, parts, block, brain), warps=max(1, block // 128))


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
    at = n[:, None]
    y = finished(_sums(a, x, k, M, x_M, K, HEIGHT, BLOCK), bias, at, N, x.dtype.element_ty)
    if KIND != "":
        up = finished(_sums(b, x, k, M, x_M, K, HEIGHT, BLOCK), bias, N + at, 2 * N, x.dtype.element_ty)
        y = rounded(activate(y, KIND), x.dtype.element_ty) * up
    m = tl.arange(0, M)[None, :]
    tl.store(out + m * N + at, y.to(x.dtype.element_ty).to(out.dtype.element_ty), at < N)


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
def _sums(a, x, k, M: tl.constexpr, x_M: tl.constexpr, K: tl.constexpr, HEIGHT: tl.constexpr, BLOCK: tl.constexpr):
    """(HEIGHT, M) products. Both tokens are loaded before the sums, of which each thread does its own part first."""
    first = _thread_sums(a, x, k, K, HEIGHT, BLOCK)
    if M == 1:
        return tl.sum(first, 1)[:, None]
    else:
        tl.static_assert(M == 2, "rows are for one or two tokens")
        return tl.sum(tl.join(first, _thread_sums(a, x + x_M, k, K, HEIGHT, BLOCK)), 1)


@triton.jit
def _thread_sums(a, x, k, K: tl.constexpr, HEIGHT: tl.constexpr, BLOCK: tl.constexpr):
    x_K = tl.load(x + k, k < K, other=0.0).to(tl.float32)
    return tl.sum(tl.reshape(a.to(tl.float32) * x_K[None, :], (HEIGHT, BLOCK // 8, 8)), 2)


@triton.jit
def finished(y, bias, n, N: tl.constexpr, dtype: tl.constexpr):
    """Sums of outputs `n` as the plain product has them: with the bias, rounded."""
    if bias is not None:
        # What is chosen stands between: a sum right behind a product would become the product's first number.
        y = tl.where(n < N, y, 0.0) + tl.load(bias + n, n < N, other=0.0).to(tl.float32)
    return rounded(y, dtype)


@triton.jit
def rounded(y, dtype: tl.constexpr):
    return y.to(dtype).to(tl.float32)


@Kernel
def _tiles_kernel(
    x, w, bias, out, partial, M,
    x_M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr, SWAP: tl.constexpr,
    KIND: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if BLOCK_M == 64:
        release(PDL)
    part = tl.program_id(0) % PARTS
    n = (tl.program_id(0) // PARTS).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    PART: tl.constexpr = part_size(K, PARTS)
    x_at = x + m[:, None] * x_M + k[None, :]
    w_at = w + n[:, None] * K + k[None, :]
    a = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    b = a
    wait(PDL)
    for at in tl.range(part * PART, tl.minimum(part * PART + PART, K), BLOCK_K, num_stages=STAGES):
        if K % BLOCK_K == 0:
            x_MK = tl.load(x_at + at, (m < M)[:, None], other=0.0)
        else:
            x_MK = tl.load(x_at + at, (m < M)[:, None] & (k < K - at)[None, :], other=0.0)
        a = _times(a, x_MK, w_at + at, n, k, at, N, K, BLOCK_N, BLOCK_K, SWAP)
        if KIND != "":
            b = _times(b, x_MK, w_at + N * K + at, n, k, at, N, K, BLOCK_N, BLOCK_K, SWAP)
    if BLOCK_M < 64:  # programs of the next kernel would take the room of those that should run beside this one
        release(PDL)
    if SWAP:
        a, b = tl.trans(a), tl.trans(b)
    at = m[:, None] * N + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    if PARTS > 1:
        tl.store(partial + part.to(tl.int64) * M * N + at, a, inside)
    else:
        dtype = x.dtype.element_ty
        y = finished(a, bias, n[None, :], N, dtype)
        if KIND != "":
            y = rounded(activate(y, KIND), dtype) * finished(b, bias, N + n[None, :], 2 * N, dtype)
        tl.store(out + at, y.to(dtype).to(out.dtype.element_ty), inside)


@triton.constexpr_function
def part_size(inputs, parts):
    """Inputs of a part: the same whichever blocks it is cut into."""
    return (inputs + 128 * parts - 1) // (128 * parts) * 128


@triton.jit
def _times(
    acc, x_MK, w_at, n, k, at, N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr,
):  # fmt: skip
    if N % BLOCK_N == 0 and K % BLOCK_K == 0:
        w_NK = tl.load(w_at, eviction_policy="evict_first")
    else:
        w_NK = tl.load(w_at, (n < N)[:, None] & (k < K - at)[None, :], other=0.0, eviction_policy="evict_first")
    return tl.dot(w_NK, tl.trans(x_MK), acc) if SWAP else tl.dot(x_MK, tl.trans(w_NK), acc)


@Kernel
def _sum_kernel(
    partial, bias, out, M,
    N: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, BRAIN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = tl.program_id(1).to(tl.int64)
    inside = n < N
    wait(PDL)
    y = tl.load(partial + m * N + n, inside, other=0.0)
    for part in tl.static_range(1, PARTS):
        y += tl.load(partial + (part * M + m) * N + n, inside, other=0.0)
    y = finished(y, bias, n, N, tl.bfloat16 if BRAIN else tl.float16)
    tl.store(out + m * N + n, y.to(out.dtype.element_ty), inside)
