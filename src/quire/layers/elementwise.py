"""Sums and soft caps as modules. Owns: nothing but the choice of their implementation."""

from __future__ import annotations

from torch import Tensor, nn

from quire.ops.dispatch import Binder
from quire.ops.elementwise import ADD, SOFTCAP


class Add(nn.Module):
    """a + b."""

    def __init__(self) -> None:
        super().__init__()
        self.op = ADD.reference

    def bind(self, ops: Binder) -> None:
        self.op = ops.bind(ADD)

    def forward(self, a_TD: Tensor, b_TD: Tensor) -> Tensor:
        return self.op(a_TD, b_TD)


class SoftCap(nn.Module):
    """cap * tanh(x / cap) of logits in float32."""

    def __init__(self, cap: float) -> None:
        super().__init__()
        self.cap = cap
        self.op = SOFTCAP.reference

    def bind(self, ops: Binder) -> None:
        self.op = ops.bind(SOFTCAP)

    def forward(self, logits_SV: Tensor) -> Tensor:
        return self.op(logits_SV, self.cap)
