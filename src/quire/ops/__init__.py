"""Operations: each a signature with a plain PyTorch meaning and faster implementations behind `dispatch.Op`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from quire.ops.dispatch import Choice

BUILT_IN = ("activation", "attention", "cache", "heads", "linear", "norm", "sampling")


def report(device: torch.device, dtype: torch.dtype) -> list[Choice]:
    """For each built-in op and each op of a plugin: what would be chosen on `device` for `dtype`, and the candidates
    with their reasons; shapes unknown."""
    from quire.ops.dispatch import REGISTRY, Binder

    for module in BUILT_IN:
        import_module(f"quire.ops.{module}")
    binder = Binder(device, dtype)
    for name in REGISTRY.names():
        binder.bind(REGISTRY[name])
    return binder.report()
