"""Activations, plain and gated, by the names that checkpoints use. Owns: their formulas.

Shape legend: T tokens, F intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from quire.ops import native, triton
from quire.ops.dispatch import REGISTRY

_tanh_gelu = partial(F.gelu, approximate="tanh")

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "silu": F.silu,
        "swish": F.silu,
        "gelu": F.gelu,
        "gelu_python": F.gelu,
        "gelu_new": _tanh_gelu,
        "gelu_fast": _tanh_gelu,
        "gelu_accurate": _tanh_gelu,
        "gelu_pytorch_tanh": _tanh_gelu,
        "gelu_python_tanh": _tanh_gelu,
        "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
        "relu": F.relu,
        "relu2": lambda x: F.relu(x).square(),
        "relu6": F.relu6,
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        "linear": lambda x: x,
    }
)


def activation(x_TF: Tensor, kind: str) -> Tensor:
    """`kind` of each element."""
    return ACTIVATIONS[kind](x_TF)


def gated_activation(x_T2F: Tensor, kind: str) -> Tensor:
    """`kind`(first half) * second half, (T, F) (arXiv:2002.05202)."""
    gate_TF, up_TF = x_T2F.chunk(2, dim=-1)
    return ACTIVATIONS[kind](gate_TF) * up_TF


ACTIVATION = REGISTRY.op("activation", activation)
GATED_ACTIVATION = REGISTRY.op("gated_activation", gated_activation)
native.register(ACTIVATION, "supports_activation")
native.register(GATED_ACTIVATION, "supports_activation")
triton.register(ACTIVATION, "activation:activation")
triton.register(GATED_ACTIVATION, "activation:gated_activation")
