"""Residual add + norm as one operation. Owns: RMSNorm and LayerNorm. Knows no weights' names.

Shape legend: T tokens, D hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from quire.ops import native, triton
from quire.ops.dispatch import REGISTRY


def rms_norm(x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm(x + residual) * weight, x + residual); no residual counts as zero. Any leading shape.
    Statistics in float32 (arXiv:1910.07467). The norm is rounded to the type of x before it meets the weight; beside a
    weight in float32 only afterwards."""
    total_TD = x_TD if residual_TD is None else x_TD + residual_TD
    x = total_TD.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    if weight_D.dtype == x_TD.dtype:
        return weight_D * x.to(x_TD.dtype), total_TD
    return (weight_D * x).to(x_TD.dtype), total_TD


def layer_norm(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor | None, bias_D: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(layer norm of x + residual, x + residual); no residual counts as zero (arXiv:1607.06450)."""
    total_TD = x_TD if residual_TD is None else x_TD + residual_TD
    return F.layer_norm(total_TD, total_TD.shape[-1:], weight_D, bias_D, eps), total_TD


RMS_NORM = REGISTRY.op("rms_norm", rms_norm)
LAYER_NORM = REGISTRY.op("layer_norm", layer_norm)
native.register(RMS_NORM)
native.register(LAYER_NORM)
triton.register(RMS_NORM, "norm:rms_norm", "supports_norm")
triton.register(LAYER_NORM, "norm:layer_norm", "supports_norm")
