"""Mixtures of experts in place of a feed-forward block. Owns: the experts' matrices, all in two, and their names.

Shape legend: T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quire.config.arch import ModelArch
from quire.layers.linear import Matrix
from quire.layers.mlp import MLP, known_activation
from quire.layers.slots import Part
from quire.ops.dispatch import Binder
from quire.ops.moe import MOE


class Router(Matrix):
    """Logits of a choice. Small, and what it decides is not gradual: no scheme quantizes it."""

    def __init__(self, inputs: int, outputs: int, source: str) -> None:
        super().__init__()
        self.add_slot("weight", (outputs, inputs), [Part(source, (outputs, inputs))])

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.op(x_TD, self.weight, None)


class ExpertMatrix(Matrix):
    """One matrix of every expert, one below the other; each consists of the tensors `names` of equal size.
    `source`: where the checkpoint keeps the experts, by number."""

    def __init__(self, count: int, inputs: int, size: int, names: Sequence[str], source: str) -> None:
        super().__init__("experts")
        del self.op  # the mixture has one, for both matrices
        all_names = [f"{source}.{expert}.{name}.weight" for expert in range(count) for name in names]
        parts = [Part(name, (size, inputs), i * size, size) for i, name in enumerate(all_names)]
        self.add_slot("weight", (len(parts) * size, inputs), parts)

    def bind(self, ops: Binder) -> None:
        pass


class MoE(nn.Module):
    """`path`: the block's name in the checkpoint; `names`: of an expert's gate, up and down matrices."""

    def __init__(
        self, arch: ModelArch, path: str = "mlp", names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    ) -> None:
        super().__init__()
        assert arch.experts is not None
        d, self.mixture, self.kind = arch.hidden_size, arch.experts, known_activation(arch.activation)
        count, size, shared = self.mixture.count, self.mixture.size, self.mixture.shared_size
        self.gate = Router(d, count, f"../../{path}.gate.weight")
        self.gate_up = ExpertMatrix(count, d, size, names[:2], f"../../{path}.experts")
        self.down = ExpertMatrix(count, size, d, names[2:], f"../../{path}.experts")
        self.shared_expert = MLP(d, shared, arch.activation) if shared else None
        self.shared_expert_gate = Router(d, 1, f"../../{path}.shared_expert_gate.weight") if shared else None
        self.op = MOE.reference

    def bind(self, ops: Binder) -> None:
        scheme, weight = self.gate_up.scheme, self.gate_up.weight
        self.op = ops.bind(
            MOE,
            experts=self.mixture.count,
            top_k=self.mixture.top_k,
            inputs=weight.shape[1],
            intermediate=self.mixture.size,
            kind=self.kind,
            bits=None if scheme is None else getattr(scheme, "bits", 0),
        )

    def forward(self, x_TD: Tensor) -> Tensor:
        top_k, normalised = self.mixture.top_k, self.mixture.normalised
        out_TD = self.op(x_TD, self.gate(x_TD), self.gate_up.weight, self.down.weight, top_k, normalised, self.kind)
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            out_TD = out_TD + torch.sigmoid(self.shared_expert_gate(x_TD)) * self.shared_expert(x_TD)
        return out_TD
