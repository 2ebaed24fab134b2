"""Schemes that need nothing but the weights: rounding to nearest in 8 or 4 bits, made from any checkpoint at load.

Owns: which layers a scheme changes and to what. Knows no kernels and no checkpoint formats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor, nn

from quire.layers.linear import Embedding, Linear, LMHead, MergedLinear
from quire.layers.moe import ExpertMatrix
from quire.ops.linear import QuantizedWeight, quantize_weight


@dataclass(frozen=True)
class Scheme:
    """`bits` a weight, one scale for `group` inputs (0: for the whole row). `dynamic`: activations are rounded to int8
    too, so that products are of integers."""

    bits: int
    group: int
    dynamic: bool

    def quantize(self, weight_ND: Tensor) -> QuantizedWeight:
        group = self.group if self.group and weight_ND.shape[1] % self.group == 0 else 0
        return quantize_weight(weight_ND, self.bits, group, self.dynamic)


INT8 = Scheme(8, 0, True)
SCHEMES: Mapping[str, Scheme] = MappingProxyType(
    {
        "int8": INT8,
        "int8_weight_only": Scheme(8, 0, False),
        "int4": Scheme(4, 32, True),
        "int4_weight_only": Scheme(4, 32, False),
    }
)


def mark_layers(model: nn.Module, scheme: Scheme) -> None:
    """Every linear layer and every expert gets `scheme`, a router none. The head keeps 8 bits (its errors go straight
    into the choice of a token), and so does a table that is tied to it; other embeddings stay as they are, since only
    single rows of them are read."""
    head = Scheme(8, 0, scheme.dynamic)
    tied: set[int] = set()
    for module in model.modules():
        if isinstance(module, Linear | MergedLinear | ExpertMatrix):
            even = scheme.bits == 8 or module.weight.shape[1] % 2 == 0
            module.scheme = scheme if even else head
        elif isinstance(module, LMHead):
            module.scheme = head
            tied |= {id(module.weight)} if module.tied else set()
    for module in model.modules():
        if isinstance(module, Embedding) and id(module.weight) in tied:
            module.scheme = head
