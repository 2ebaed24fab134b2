"""Triton's kernels on a GPU where there is one, else through Triton's interpreter on the CPU."""

from __future__ import annotations

import importlib
import os
import pkgutil
from typing import Any

import numpy as np
import pytest
import torch

from quire.ops import triton as kernels

INTERPRETED = not torch.cuda.is_available()
if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is made; see tests/conftest.py
    import triton.language as tl
    from triton.runtime import interpreter

    plain: Any = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        """A loop's end that was loaded is an array of one number here, which NumPy no longer takes for an integer."""
        plain(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched

    def create_dot(self: Any, a: Any, b: Any, d: Any, *args: Any) -> Any:
        """bfloat16 is kept as integers, which the interpreter would multiply; and a row's sums must round alike
        wherever it is in a tile, as on a GPU, which BLAS does not promise."""
        x, y = ((self.cast_impl(z, tl.float32) if z.dtype.scalar == tl.bfloat16 else z).data for z in (a, b))
        rows = np.einsum("ik,kj->ij", x.astype(d.data.dtype), np.ascontiguousarray(y.astype(d.data.dtype)))
        return interpreter.TensorHandle(rows + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot
    for module in pkgutil.iter_modules(kernels.__path__):
        importlib.import_module(f"{kernels.__name__}.{module.name}")
    del os.environ["TRITON_INTERPRET"]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests alone may choose interpreted kernels."""
    if INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
