"""Feed-forward blocks, gated and plain. Owns: the order of projection and activation. Knows no names but its own."""

from __future__ import annotations

from torch import Tensor, nn

from quire.layers.linear import Linear, MergedLinear
from quire.ops.activation import ACTIVATION, ACTIVATIONS, GATED_ACTIVATION
from quire.ops.dispatch import Binder
from quire.ops.linear import GATED_LINEAR
from quire.types.errors import ClientError


def known_activation(kind: str) -> str:
    """`kind`, where it has a formula; else a `ClientError` that lists those that have."""
    if kind not in ACTIVATIONS:
        raise ClientError(f"activation {kind!r} is not supported; there are {', '.join(ACTIVATIONS)}", "model", kind)
    return kind


class Activation(nn.Module):
    """An activation by name, as an op."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = known_activation(kind)
        self.op = ACTIVATION.reference

    def bind(self, ops: Binder) -> None:
        self.op = ops.bind(ACTIVATION, kind=self.kind)

    def forward(self, x_TF: Tensor) -> Tensor:
        return self.op(x_TF, self.kind)


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)). Up to the gate it is one op, or two where the matrix is quantized. `packed`: gate and
    up are one tensor in the checkpoint."""

    def __init__(self, hidden: int, intermediate: int, kind: str, bias: bool = False, packed: bool = False) -> None:
        super().__init__()
        parts = {"gate_proj": intermediate, "up_proj": intermediate}
        self.gate_up_proj = MergedLinear(hidden, parts, bias, split="columns", packed=packed)
        self.down_proj = Linear(intermediate, hidden, bias, split="rows")
        self.kind = known_activation(kind)
        self.op = GATED_LINEAR.reference

    @property
    def dense(self) -> bool:
        """Whether the matrix is a plain tensor, also once it is loaded."""
        return isinstance(self.gate_up_proj.weight, Tensor) and self.gate_up_proj.scheme is None

    def bind(self, ops: Binder) -> None:
        if self.dense:
            outputs, inputs = self.gate_up_proj.weight.shape
            self.op = ops.bind(GATED_LINEAR, inputs=inputs, outputs=outputs, kind=self.kind)
        else:
            self.op = ops.bind(GATED_ACTIVATION, kind=self.kind)

    def forward(self, x_TD: Tensor) -> Tensor:
        both = self.gate_up_proj
        if self.dense:
            return self.down_proj(self.op(x_TD, both.weight, both.bias, self.kind))
        return self.down_proj(self.op(both.merged(x_TD), self.kind))
