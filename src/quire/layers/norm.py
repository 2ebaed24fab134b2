"""Norms that thread the residual, so that add + norm is one operation.

Owns: the weights. `forward(x, residual)` gives (norm(x + residual), x + residual).
Shape legend: T tokens, D hidden.
"""

from __future__ import annotations

from torch import Tensor

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


class LayerNorm(SlotModule):
    """Layer norm; `affine=False`: without weights."""

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, size: int, eps: float, affine: bool = True) -> None:
        super().__init__()
        self.size, self.eps = size, eps
        self.op = LAYER_NORM.reference
        for name, init in (("weight", NORM), ("bias", NORMAL)):
            if affine:
                self.add_slot(name, (size,), init=init)
            else:
                self.no_slot(name)

    def bind(self, ops: Binder) -> None:
        self.op = ops.bind(LAYER_NORM, size=self.size)

    def forward(self, x_TD: Tensor, residual_TD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.op(x_TD, residual_TD, self.weight, self.bias, self.eps)
