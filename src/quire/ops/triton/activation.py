"""Activations, plain and gated.

Owns: the kernels of `activation` and `gated_activation`, and their formulas as device functions. Rounds where the
references round: the activated number, then the product.
Shape legend: T tokens, F intermediate size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.ops.triton.launch import Kernel, ceil, power, release, wait

# The formula of each name in `ops.activation.ACTIVATIONS`.
FORMULAS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
    "relu6": "relu6",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "linear": "linear",
}

BLOCK = 2048


def activation(x_TF: Tensor, kind: str) -> Tensor:
    return _activation(x_TF, kind, x_TF.shape[-1], False)


def gated_activation(x_T2F: Tensor, kind: str) -> Tensor:
    return _activation(x_T2F, kind, x_T2F.shape[-1] // 2, True)


def _activation(x: Tensor, kind: str, size: int, gated: bool) -> Tensor:
    rows = x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, x.shape[-1])
    out = torch.empty((*x.shape[:-1], size), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    block = min(BLOCK, power(size))
    _activation_kernel(
        (rows.shape[0] * ceil(size, block), 1, 1),
        (rows, out),
        constants=(rows.stride(0), size, block, FORMULAS[kind], gated),
        warps=max(1, block // 256),
    )
    return out


@Kernel
def _activation_kernel(
    x, out, x_T: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    BLOCKS: tl.constexpr = (F + BLOCK - 1) // BLOCK
    t = (tl.program_id(0) // BLOCKS).to(tl.int64)
    f = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    inside = f < F
    dtype = out.dtype.element_ty
    wait(PDL)
    y = activate(tl.load(x + t * x_T + f, inside, other=0.0).to(tl.float32), KIND)
    if GATED:
        y = y.to(dtype).to(tl.float32) * tl.load(x + t * x_T + F + f, inside, other=0.0).to(tl.float32)
    tl.store(out + t * F + f, y.to(dtype), inside)


@triton.jit
def activate(x, KIND: tl.constexpr):
    """One of `FORMULAS` of float32 numbers."""
    if KIND == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif KIND == "gelu":
        x = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":  # (1 + tanh(u)) / 2 is the sigmoid of 2 u
        x = x / (1.0 + tl.exp(-1.5957691216057308 * x * (1.0 + 0.044715 * x * x)))
    elif KIND == "quick_gelu":
        x = x / (1.0 + tl.exp(-1.702 * x))
    elif KIND == "relu":  # what is no number stays none
        x = tl.where(x < 0.0, 0.0, x)
    elif KIND == "relu2":
        x = tl.where(x < 0.0, 0.0, x * x)
    elif KIND == "relu6":
        x = tl.where(x < 0.0, 0.0, tl.where(x > 6.0, 6.0, x))
    elif KIND == "tanh":  # a series where the difference would lose digits
        small = x * (1.0 - x * x * (1.0 / 3.0 - x * x * (2.0 / 15.0)))
        x = tl.where(tl.abs(x) < 0.1, small, 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x)))
    elif KIND == "sigmoid":
        x = 1.0 / (1.0 + tl.exp(-x))
    else:
        tl.static_assert(KIND == "linear", "no such formula")
    return x
