"""Linear layers as an operation. Owns: y = x W^T + b. Knows no names, no packing, no quantization.

Shape legend: T tokens, D inputs, N outputs.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from quire.ops.dispatch import REGISTRY


def linear(x_TD: Tensor, weight_ND: Tensor, bias_N: Tensor | None) -> Tensor:
    """(T, N) in the dtype of x. Any leading shape."""
    return F.linear(x_TD, weight_ND, bias_N)


LINEAR = REGISTRY.op("linear", linear)
