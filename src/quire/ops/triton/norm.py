# pyright: reportPossiblyUnboundVariable=false
"""Residual add + norm, a program for each token.

Owns: the kernels of `rms_norm` and `layer_norm`. Rounds where the references round: the sum, then the normalised
number (but not beside a weight in float32), then the product with the weight.
Shape legend: T tokens, D hidden.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from quire.ops.triton.launch import Kernel, power, release, wait


def rms_norm(x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _norm(x_TD, residual_TD, weight_D, None, eps, False)


def layer_norm(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor | None, bias_D: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return _norm(x_TD, residual_TD, weight_D, bias_D, eps, True)


def _norm(
    x: Tensor, residual: Tensor | None, weight_D: Tensor | None, bias_D: Tensor | None, eps: float, center: bool
) -> tuple[Tensor, Tensor]:
    size = x.shape[-1]
    x_TD = x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, size)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out, total
    if residual is not None:
        residual = residual if residual.dim() == 2 and residual.stride(1) == 1 else residual.reshape(-1, size)
    block = power(size)
    strides = x_TD.stride(0), 0 if residual is None else residual.stride(0)
    _norm_kernel(
        (x_TD.shape[0], 1, 1),
        (x_TD, residual, weight_D, bias_D, out, total),
        constants=(*strides, eps, size, block, center),
        warps=min(16, max(1, block // 512)),
    )
    return out, total


@Kernel
def _norm_kernel(
    x, residual, weight, bias, out, total,
    x_T: tl.constexpr, residual_T: tl.constexpr, eps: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr, CENTER: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < D
    dtype = out.dtype.element_ty
    if weight is not None:
        w = tl.load(weight + d, inside, other=0.0).to(tl.float32)
    if bias is not None:
        b = tl.load(bias + d, inside, other=0.0).to(tl.float32)
    wait(PDL)
    sum_D = tl.load(x + t * x_T + d, inside, other=0.0).to(tl.float32)
    if residual is not None:
        sum_D += tl.load(residual + t * residual_T + d, inside, other=0.0).to(tl.float32)
        rounded = sum_D.to(dtype)
        tl.store(total + t * D + d, rounded, inside)
        sum_D = rounded.to(tl.float32)
    if CENTER:
        sum_D = tl.where(inside, sum_D - tl.sum(sum_D) / D, 0.0)
    y = sum_D * tl.rsqrt(tl.sum(sum_D * sum_D) / D + eps)
    if CENTER:
        if weight is not None:
            y *= w
        if bias is not None:
            y += b
    else:
        if weight.dtype.element_ty == dtype:
            y = y.to(dtype).to(tl.float32)
        y *= w
    tl.store(out + t * D + d, y.to(dtype), inside)
