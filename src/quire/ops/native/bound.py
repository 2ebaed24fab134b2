"""The implementations named "native" by name: methods of one `kernels.Kernels` with the process's pool.

Owns: that pool. As torch's own threads, it stands for the process's cores: eager ops have no engine to carry one. They
are bound methods, so that who records a forward can tell native ops and whose they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from quire.ops.native.kernels import ANY, FEW_BESIDE_AMX, Kernels
from quire.ops.native.library import Pool
from quire.utils.devices import has_matrix_unit, physical_cores


def kernels() -> Kernels:
    """A thread for each physical core, but no more than torch was told to use."""
    return _kernels(max(1, min(physical_cores(), torch.get_num_threads())))


@cache
def _kernels(threads: int) -> Kernels:
    return Kernels(Pool(threads), FEW_BESIDE_AMX if has_matrix_unit() else ANY)


def kernels_of(model: nn.Module) -> Kernels | None:
    """Those that the ops of a model are bound to, if any are native."""
    owners = (getattr(getattr(module, "op", None), "__self__", None) for module in model.modules())
    return next((owner for owner in owners if isinstance(owner, Kernels)), None)


def most_tokens(model: nn.Module) -> int:
    """Tokens up to which all native ops of a model run in the library: linear layers in bf16 may be torch's from some
    number on."""
    linear = (getattr(module, "op", None) for module in model.modules() if _in_bf16(module))
    owners = (getattr(op, "__self__", None) for op in linear if getattr(op, "__name__", "") == "linear")
    return min((owner.few for owner in owners if isinstance(owner, Kernels)), default=ANY)


def _in_bf16(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dtype == torch.bfloat16


def __getattr__(name: str) -> Callable[..., Any]:
    """The method of that name; the pool is made when the first one is bound."""
    if name.startswith("_"):
        raise AttributeError(name)
    return getattr(kernels(), name)
