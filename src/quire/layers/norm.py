"""Norms that thread the residual, so that add + norm is one operation.

Owns: the weights. `forward(x, residual)` gives (norm(x + residual), x + residual).
Shape legend: T tokens, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quire.layers.slots import NORM, NORMAL, Part, SlotModule
from quire.ops.dispatch import Binder
from quire.ops.norm import LAYER_NORM, RMS_NORM


class RMSNorm(SlotModule):
    """Root mean square norm; `source`: the weight's checkpoint name where it is not the module's own."""

    weight: Tensor

    def __init__(self, size: int, eps: float, source: str = "weight") -> None:
        super().__init__()
        self.eps = eps
        self.op = RMS_NORM.reference
        self.add_slot("weight", (size,), [Part(source, (size,))], NORM)

    def bind(self, ops: Binder) -> None:
        self.op = ops.bind(RMS_NORM, size=self.weight.shape[0])

    def forward(self, x_TD: Tensor, residual_TD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.op(x_TD, residual_TD, self.weight, self.eps)


class OffsetRMSNorm(RMSNorm):
    """The checkpoint holds what is to be added to 1. The sum is kept in float32, by which the norm is multiplied before
    it is rounded (`ops.norm`), as Gemma's is."""

    def __init__(self, size: int, eps: float, source: str = "weight") -> None:
        super().__init__(size, eps, source)
        self.slots["weight"].init = NORMAL

    def build(self, length: int, device: torch.device) -> None:
        self.weight = nn.Parameter(1.0 + self.weight.float(), requires_grad=False)
        self.slots["weight"].mapped = False


class LayerNorm(SlotModule):
    """Layer norm; `affine=False`: without weights; `bias=False`: with a weight alone. `name`: what the checkpoint calls
    this module, where it is another name."""

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, size: int, eps: float, affine: bool = True, bias: bool = True, name: str | None = None) -> None:
        super().__init__()
        self.size, self.eps = size, eps
        self.op = LAYER_NORM.reference
        prefix = "" if name is None else f"../{name}."
        for kind, init, there in (("weight", NORM, affine), ("bias", NORMAL, affine and bias)):
            if there:
                self.add_slot(kind, (size,), [Part(prefix + kind, (size,))], init)
            else:
                self.no_slot(kind)

    def bind(self, ops: Binder) -> None:
        self.op = ops.bind(LAYER_NORM, size=self.size)

    def forward(self, x_TD: Tensor, residual_TD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.op(x_TD, residual_TD, self.weight, self.bias, self.eps)
