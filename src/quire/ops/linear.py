"""Linear layers as operations, with plain and with quantized weights. Owns: what they mean, and `QuantizedWeight`.

Knows no names, no checkpoints, and no packing: an implementation that wants another layout of the weight has an
attribute `pack(weight) -> weight`, which is called once after loading.
Shape legend: T tokens, D inputs, N outputs, G groups of a row's inputs, S = D / G inputs of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quire.ops import native, triton
from quire.ops.activation import gated_activation
from quire.ops.dispatch import REGISTRY
from quire.utils.pages import untouched


def linear(x_TD: Tensor, weight_ND: Tensor, bias_N: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """(T, N) in `dtype`, by default that of x. Any leading shape."""
    y_TN = F.linear(x_TD, weight_ND, bias_N)
    return y_TN if dtype is None else y_TN.to(dtype)


def gated_linear(x_TD: Tensor, weight_ND: Tensor, bias_N: Tensor | None, kind: str) -> Tensor:
    """(T, N / 2): `kind`(first half of the outputs) * second half, each as `linear` rounds it."""
    return gated_activation(linear(x_TD, weight_ND, bias_N), kind)


def embedding(ids_T: Tensor, table_VD: Tensor, offset: int, add_TD: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """(T, D): rows of the table at ids + offset, times `scale`, plus `add`, each of them rounded."""
    rows_TD = F.embedding(ids_T + offset if offset else ids_T, table_VD)
    if scale != 1.0:
        rows_TD = rows_TD * scale
    return rows_TD if add_TD is None else rows_TD + add_TD


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight (N, D) in `bits` bits: w[n, d] = q[n, d] * scale[n, d // S], symmetric.

    `q`: int8 (N, D) for 8 bits; uint8 (N, D / 2) for 4 bits, the even input in the low half, each half q + 8.
    `scale`: float32 (N, G). `dynamic`: activations are rounded to int8 as well, a scale for each token. `packed`: what
    an implementation made of it, `q` then being empty.
    """

    q: Tensor
    scale_NG: Tensor
    bits: int
    dynamic: bool
    inputs: int
    packed: object = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.scale_NG.shape[0], self.inputs

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.inputs // self.scale_NG.shape[1]

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """These outputs alone."""
        return QuantizedWeight(self.q[start:stop], self.scale_NG[start:stop], self.bits, self.dynamic, self.inputs)

    def integers(self, rows: Tensor | None = None) -> Tensor:
        """q as int8 (N, D), or only these rows of it."""
        q = self.q if rows is None else self.q[rows]
        if self.bits == 8:
            return q
        low, high = (q & 15).to(torch.int8) - 8, (q >> 4).to(torch.int8) - 8
        return torch.stack((low, high), -1).flatten(-2)

    def dense(self, rows: Tensor | None = None) -> Tensor:
        """The weight in float32, or only these rows of it."""
        q, scale = self.integers(rows), self.scale_NG if rows is None else self.scale_NG[rows]
        return (q.unflatten(-1, (scale.shape[-1], -1)).float() * scale.unsqueeze(-1)).flatten(-2)


# Numbers quantized at a time: what is made of them on the way stays in the caches, and takes no memory of its own.
CHUNK = 1 << 17


def quantize_weight(weight_ND: Tensor, bits: int, group: int, dynamic: bool) -> QuantizedWeight:
    """Round to nearest, symmetric, each group of `group` inputs (0: the whole row) scaled by its largest magnitude."""
    outputs, inputs = weight_ND.shape
    group = group or inputs
    q = _empty((outputs, inputs * bits // 8), torch.int8 if bits == 8 else torch.uint8, weight_ND.device)
    scale = _empty((outputs, inputs // group), torch.float32, weight_ND.device)
    largest = (1 << (bits - 1)) - 1
    rows = max(1, CHUNK // max(1, inputs))
    for part, q_part, scale_part in zip(weight_ND.split(rows), q.split(rows), scale.split(rows), strict=True):
        w = part.to(torch.float32, copy=True).unflatten(-1, (-1, group))
        torch.div(w.abs().amax(-1).clamp_(min=1e-12), largest, out=scale_part)
        rounded = w.div_(scale_part.unsqueeze(-1)).round_().clamp_(-largest, largest).flatten(-2)
        if bits == 4:
            halves = rounded.add_(8).to(torch.uint8)
            rounded = halves[:, 0::2] | (halves[:, 1::2] << 4)
        q_part.copy_(rounded)
    return QuantizedWeight(q, scale, bits, dynamic, inputs)


def _empty(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On a CPU in huge pages where they can be had: one token reads all weights, which takes less time then."""
    if device.type != "cpu" or 0 in shape:
        return torch.empty(shape, dtype=dtype, device=device)
    memory = torch.from_numpy(untouched(shape[0] * shape[1] * dtype.itemsize, huge=True))
    return memory.view(dtype).view(shape)


def quantize_tokens(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """x as int8 (T, D) and a float32 scale for each token: the largest magnitude becomes 127, halves go to even."""
    x = x_TD.float()
    scale_T1 = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return (x / scale_T1).round().to(torch.int8), scale_T1


def quantized_linear(
    x_TD: Tensor, weight: QuantizedWeight, bias_N: Tensor | None, dtype: torch.dtype | None = None
) -> Tensor:
    """(T, N) in `dtype`, by default that of x. Dynamic: integer products summed exactly in each group, then scaled in
    float32."""
    dtype = dtype or x_TD.dtype
    if not weight.dynamic:
        return F.linear(x_TD, weight.dense().to(x_TD.dtype), bias_N).to(dtype)
    xq, scale_T1 = quantize_tokens(x_TD.flatten(0, -2))
    size = weight.group
    y_TN = torch.zeros(xq.shape[0], weight.shape[0], device=x_TD.device)
    wq = weight.integers()
    for g in range(weight.scale_NG.shape[1]):  # products of 8-bit numbers: float64 sums them exactly
        part = slice(g * size, (g + 1) * size)
        y_TN += (xq[:, part].double() @ wq[:, part].double().t()).float() * weight.scale_NG[:, g]
    y_TN = y_TN * scale_T1
    if bias_N is not None:
        y_TN = y_TN + bias_N.float()
    return y_TN.to(dtype).unflatten(0, x_TD.shape[:-1])


def quantized_embedding(
    ids_T: Tensor,
    table: QuantizedWeight,
    offset: int,
    dtype: torch.dtype,
    add_TD: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """(T, D) in `dtype`: rows of the table at ids + offset, times `scale`, plus `add`, each of them rounded."""
    rows_TD = table.dense(ids_T + offset).to(dtype)
    if scale != 1.0:
        rows_TD = rows_TD * scale
    return rows_TD if add_TD is None else rows_TD + add_TD


LINEAR = REGISTRY.op("linear", linear)
GATED_LINEAR = REGISTRY.op("gated_linear", gated_linear)
EMBEDDING = REGISTRY.op("embedding", embedding)
QUANTIZED_EMBEDDING = REGISTRY.op("quantized_embedding", quantized_embedding)
QUANTIZED_LINEAR = REGISTRY.op("quantized_linear", quantized_linear)
native.register(LINEAR, "supports_linear")
native.register(GATED_LINEAR, "supports_gated_linear")
native.register(EMBEDDING)
native.register(QUANTIZED_LINEAR)
native.register(QUANTIZED_EMBEDDING)
triton.register(EMBEDDING, "embedding:embedding")
triton.register(LINEAR, "linear:linear", "supports_linear")
triton.register(GATED_LINEAR, "linear:gated_linear", "supports_linear")
triton.register(LINEAR, "invariant:linear", "supports_invariant", "invariant")
triton.register(GATED_LINEAR, "invariant:gated_linear", "supports_invariant", "invariant")
