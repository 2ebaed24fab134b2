# pyright: reportPossiblyUnboundVariable=false
"""Head norms, rotation and the write of keys and values to their pages, in one launch.

Owns: the kernel of `heads`. A program turns a few heads of one token: of the queries, of the keys or of the values, all
three read in place (views into one matrix). Rounds where the references round: each norm twice, the turned number, and
then to the cache's type. Rows in int8 are left to the reference.
Shape legend: T tokens, L rows of the table, H query heads, K KV heads, E head size, F = rotary_dim / 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.ops import heads as reference
from quire.ops.triton.launch import Kernel, ceil, power, release, wait

# Numbers of a program's heads.
TILE = 1024


def heads(
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKE: Tensor,
    kv: Tensor,
    slots_T: Tensor,
    positions_T: Tensor | None = None,
    table_2LF: Tensor | None = None,
    q_norm_E: Tensor | None = None,
    k_norm_E: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    if kv.dtype == torch.int8:
        return reference.heads(q_THE, k_TKE, v_TKE, kv, slots_T, positions_T, table_2LF, q_norm_E, k_norm_E, eps)
    tokens, query_heads, size = q_THE.shape
    kv_heads = k_TKE.shape[1]
    q_THE, k_TKE, v_TKE = (x if x.stride(2) == 1 else x.contiguous() for x in (q_THE, k_TKE, v_TKE))
    out_THE = torch.empty((tokens, query_heads, size), dtype=q_THE.dtype, device=q_THE.device)
    if tokens == 0:
        return out_THE
    width = power(size)
    block = min(max(1, TILE // width), power(max(query_heads, kv_heads)))
    blocks = ceil(query_heads, block), ceil(kv_heads, block)
    angles, sines = (0, 0) if table_2LF is None else (table_2LF.shape[2], table_2LF.stride(0))
    strides = *q_THE.stride()[:2], *k_TKE.stride()[:2], *v_TKE.stride()[:2], kv.stride(0), sines
    _heads_kernel(
        (tokens * (blocks[0] + 2 * blocks[1]), 1, 1),
        (q_THE, k_TKE, v_TKE, out_THE, kv, slots_T, positions_T, table_2LF, q_norm_E, k_norm_E),
        constants=(*strides, eps, query_heads, kv_heads, size, angles, block, *blocks),
        warps=max(1, min(4, block * width // 256)),
    )
    return out_THE


@Kernel
def _heads_kernel(
    q, k, v, out, kv, slots, positions, table, q_norm, k_norm,
    q_T: tl.constexpr, q_H: tl.constexpr, k_T: tl.constexpr, k_K: tl.constexpr, v_T: tl.constexpr, v_K: tl.constexpr,
    values: tl.constexpr, sines: tl.constexpr, eps: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, F: tl.constexpr,
    BLOCK: tl.constexpr, Q_BLOCKS: tl.constexpr, K_BLOCKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    BLOCKS: tl.constexpr = Q_BLOCKS + 2 * K_BLOCKS
    t = (tl.program_id(0) // BLOCKS).to(tl.int64)
    part = tl.program_id(0) % BLOCKS
    wait(PDL)
    if part < Q_BLOCKS:
        h = part * BLOCK + tl.arange(0, BLOCK)
        _turn(q + t * q_T, q_H, out + t * H * E, h, H, True, t, positions, table, sines, q_norm, eps, E, F)
    else:
        slot = tl.load(slots + t)
        if part < Q_BLOCKS + K_BLOCKS:
            h = (part - Q_BLOCKS) * BLOCK + tl.arange(0, BLOCK)
            to = kv + slot * (K * E)
            _turn(k + t * k_T, k_K, to, h, K, slot >= 0, t, positions, table, sines, k_norm, eps, E, F)
        else:
            h = (part - Q_BLOCKS - K_BLOCKS) * BLOCK + tl.arange(0, BLOCK)
            to = kv + values + slot * (K * E)
            _turn(v + t * v_T, v_K, to, h, K, slot >= 0, t, None, None, 0, None, eps, E, 0)


@triton.jit
def _turn(
    x, x_H, to, h, H: tl.constexpr, kept, t, positions, table, sines, norm, eps, E: tl.constexpr, F: tl.constexpr
):
    """Heads `h` (BLOCK,) of the token at `x`, normalised and turned, side by side at `to`, where they are `kept`."""
    dtype = x.dtype.element_ty
    REST: tl.constexpr = E - 2 * F
    heads = (h < H)[:, None]
    row, target = x + h[:, None] * x_H, to + h[:, None] * E
    if F:
        f = tl.arange(0, triton.next_power_of_2(F))[None, :]
        inside = heads & (f < F)
        a = tl.load(row + f, inside, other=0.0).to(tl.float32)
        b = tl.load(row + F + f, inside, other=0.0).to(tl.float32)
    if REST:
        r = tl.arange(0, triton.next_power_of_2(REST))[None, :]
        rest_inside = heads & (r < REST)
        rest = tl.load(row + 2 * F + r, rest_inside, other=0.0).to(tl.float32)
    if norm is not None:
        squares = tl.zeros((h.shape[0],), tl.float32)
        if F:
            squares += tl.sum(a * a, 1) + tl.sum(b * b, 1)
        if REST:
            squares += tl.sum(rest * rest, 1)
        factor = tl.rsqrt(squares / E + eps)[:, None]
        if F:
            a = _weighted(a * factor, norm + f, f < F, dtype)
            b = _weighted(b * factor, norm + F + f, f < F, dtype)
        if REST:
            rest = _weighted(rest * factor, norm + 2 * F + r, r < REST, dtype)
    if F:
        angle = table + tl.load(positions + t) * F + f
        cos = tl.load(angle, f < F, other=0.0)
        sin = tl.load(angle + sines, f < F, other=0.0)
        tl.store(target + f, (a * cos - b * sin).to(dtype).to(to.dtype.element_ty), inside & kept)
        tl.store(target + F + f, (b * cos + a * sin).to(dtype).to(to.dtype.element_ty), inside & kept)
    if REST:
        tl.store(target + 2 * F + r, rest.to(dtype).to(to.dtype.element_ty), rest_inside & kept)


@triton.jit
def _weighted(x, norm, inside, dtype: tl.constexpr):
    weight = tl.load(norm, inside, other=0.0)
    if weight.dtype == dtype:
        x = x.to(dtype).to(tl.float32)
    return (x * weight.to(tl.float32)).to(dtype).to(tl.float32)
