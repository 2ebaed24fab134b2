"""Sums and soft caps: what models compute number by number beside norms and activations. Owns: their formulas.

Shape legend: T tokens, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quire.ops import native
from quire.ops.dispatch import REGISTRY


def add(a_TD: Tensor, b_TD: Tensor) -> Tensor:
    """a + b."""
    return a_TD + b_TD


def softcap(x_TD: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap): x where it is small, never beyond the cap (arXiv:2408.00118)."""
    return torch.tanh(x_TD / cap) * cap


ADD = REGISTRY.op("add", add)
SOFTCAP = REGISTRY.op("softcap", softcap)
native.register(ADD)
native.register(SOFTCAP, "supports_softcap")
