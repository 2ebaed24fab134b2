# pyright: reportPossiblyUnboundVariable=false
"""Mixtures of experts: routing and two grouped products, none of which asks the host for anything.

Owns: the kernels of `moe`. A step of few tokens has a program for each expert and tile of outputs, which looks up whose
tokens those are and ends at once where there are none; a larger one sorts the choices by expert first, in blocks of one
expert each, of which there are at most so many that the grid is known beforehand. Every choice (slot) has an output of
its own, and a last kernel sums a token's, in order: no atomics, and a token does not depend on its neighbours.
Shape legend: T tokens, X experts of a token, N = T * X slots, E experts, D hidden, F intermediate size.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from quire.ops.triton.activation import FORMULAS, activate
from quire.ops.triton.launch import Kernel, ceil, power, release, wait

FEW = 64  # tokens up to which nothing is sorted


def moe(
    x_TD: Tensor, logits_TE: Tensor, gate_up: Tensor, down: Tensor, top_k: int, normalised: bool, kind: str
) -> Tensor:
    tokens, size = x_TD.shape
    experts, width = logits_TE.shape[1], down.shape[1]
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    out_TD = torch.empty((tokens, size), dtype=x_TD.dtype, device=x_TD.device)
    if tokens == 0:
        return out_TD
    slots = tokens * top_k
    weights_N = torch.empty(slots, dtype=torch.float32, device=x_TD.device)
    experts_N = torch.empty(slots, dtype=torch.int32, device=x_TD.device)
    _route_kernel(
        (tokens, 1, 1),
        (logits_TE.contiguous(), weights_N, experts_N),
        constants=(experts, power(experts), top_k, normalised),
        warps=1,
    )
    if tokens <= FEW:
        block, blocks = max(16, power(tokens)), experts
        order_N = ends_E = totals_E = None
    else:
        block = 16 if slots < 32 * experts else 64 if slots < 128 * experts else 128
        blocks = min(slots, slots // block + experts)
        order_N, ends_E, totals_E = _sorted(experts_N, experts, block)
    hidden_NF = torch.empty((slots, width), dtype=x_TD.dtype, device=x_TD.device)
    each_ND = torch.empty((slots, size), dtype=x_TD.dtype, device=x_TD.device)
    chosen = (experts_N, order_N, ends_E, totals_E)
    shape = (experts, power(experts), top_k)
    wide = 128 if block >= 64 else 64
    deep = 32 if x_TD.dtype == torch.float32 else 64
    tile = (block, wide, deep)
    warps = 8 if block == 128 else 4
    for x, w, y, outputs, inputs, stride, share, formula in (
        (x_TD, gate_up, hidden_NF, width, size, x_TD.stride(0), top_k, FORMULAS[kind]),
        (hidden_NF, down, each_ND, size, width, width, 1, ""),
    ):
        _product_kernel(
            (ceil(outputs, tile[1]), blocks, 1),
            (x, w, y, *chosen),
            (tokens,),
            (stride, outputs, inputs, share, *shape, *tile, formula),
            warps=warps,
            stages=3,
        )
    span = min(1024, power(size))
    _sum_kernel(
        (tokens, ceil(size, span), 1),
        (each_ND, weights_N, out_TD),
        constants=(size, top_k, span),
        warps=max(1, span // 256),
    )
    return out_TD


def _sorted(experts_N: Tensor, experts: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Slots by expert; of each expert the count of blocks, and of slots, up to its end. Nothing is looked up by an
    expert's number: where kernels are compiled and not launched (`ops.triton.ahead`), that may be anything."""
    sorted_N, order_N = experts_N.sort(stable=True)
    numbers_E = torch.arange(experts, dtype=torch.int32, device=experts_N.device)
    totals_E = torch.searchsorted(sorted_N, numbers_E, right=True)
    counts_E = totals_E.diff(prepend=totals_E.new_zeros(1))
    return order_N, ((counts_E + block - 1) // block).cumsum(0), totals_E


@Kernel
def _route_kernel(
    logits, weights, chosen,
    E: tl.constexpr, BLOCK: tl.constexpr, X: tl.constexpr, NORMALISED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    t = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK)
    wait(PDL)
    y = tl.load(logits + t * E + e, e < E, other=float("-inf")).to(tl.float32)
    p = tl.exp(y - tl.max(y))
    p = p / tl.sum(p)
    sound = tl.sum(tl.where(e < E, p, 0.0))  # 1, unless something is no number, which a maximum would pass over
    p = tl.where(e < E, p, -1.0)
    left = p
    total = 0.0
    for _ in tl.static_range(X):  # the sum first, by which the weights are divided
        best = tl.argmax(left, 0)
        total += tl.max(left)
        left = tl.where(e == best, -1.0, left)
    for j in tl.static_range(X):
        best = tl.minimum(tl.argmax(p, 0), E - 1)  # also where nothing is a number
        weight = tl.max(p)
        if NORMALISED:
            weight = weight / total
        tl.store(weights + t * X + j, tl.where(sound == sound, weight, sound))
        tl.store(chosen + t * X + j, best)
        p = tl.where(e == best, -1.0, p)


@Kernel
def _product_kernel(
    x, w, y, chosen, order, ends, totals, T,
    x_T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SHARE: tl.constexpr,
    E: tl.constexpr, EXPERTS: tl.constexpr, X: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, KIND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One expert's product with a block of its slots; slot s reads row s // SHARE of x."""
    release(PDL)
    wait(PDL)
    m = tl.arange(0, BLOCK_M)
    if order is None:
        expert = tl.program_id(1)
        slot = tl.full((BLOCK_M,), -1, tl.int32)
        for j in tl.static_range(X):
            mine = tl.load(chosen + m * X + j, m < T, other=-1) == expert
            slot = tl.where(mine, m * X + j, slot)
        inside = slot >= 0
        some = tl.max(slot) >= 0
    else:
        b = tl.program_id(1)
        e = tl.arange(0, EXPERTS)
        end = tl.load(ends + e, e < E, other=2147483647)
        expert = tl.sum((end <= b).to(tl.int32))
        some = expert < E
        known = tl.minimum(expert, E - 1)
        before = tl.load(ends + known - 1, known > 0, other=0)
        first = tl.load(totals + known - 1, known > 0, other=0)
        at = first + (b - before) * BLOCK_M + m
        inside = some & (at < tl.load(totals + known))
        slot = tl.load(order + at, inside, other=0)
    if some:
        dtype = x.dtype.element_ty
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        HALVES: tl.constexpr = 2 if KIND != "" else 1
        row = (slot // SHARE).to(tl.int64)
        x_at = x + row[:, None] * x_T + k[None, :]
        w_at = w + (expert.to(tl.int64) * (HALVES * N) + n)[None, :] * K + k[:, None]
        a = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = a
        for step in range(0, K, BLOCK_K):
            x_MK = tl.load(x_at + step, inside[:, None] & (k < K - step)[None, :], other=0.0)
            here = (n < N)[None, :] & (k < K - step)[:, None]
            a = tl.dot(x_MK, tl.load(w_at + step, here, other=0.0), a, input_precision="ieee")
            if KIND != "":
                up = tl.dot(x_MK, tl.load(w_at + N * K + step, here, other=0.0), up, input_precision="ieee")
        if KIND != "":
            a = activate(a.to(dtype).to(tl.float32), KIND).to(dtype).to(tl.float32) * up.to(dtype).to(tl.float32)
        to = y + slot.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(to, a.to(dtype), inside[:, None] & (n < N)[None, :])


@Kernel
def _sum_kernel(
    each, weights, out, D: tl.constexpr, X: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < D
    wait(PDL)
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(X):
        slot = t * X + j
        total += tl.load(each + slot * D + d, inside, other=0.0).to(tl.float32) * tl.load(weights + slot)
    tl.store(out + t * D + d, total.to(out.dtype.element_ty), inside)
