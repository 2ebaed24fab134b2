"""Triton's kernels on a GPU where there is one, else through Triton's interpreter on the CPU."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    import triton.language as tl
    from triton.runtime import interpreter

    plain: Any = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        """A loop's end that was loaded is an array of one number here, which NumPy no longer takes for an integer."""
        plain(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched

    dot: Any = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *args: Any) -> Any:
        """bfloat16 is kept as integers, which the interpreter would multiply."""
        return dot(
            self, *(self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)), *args
        )

    interpreter.InterpreterBuilder.create_dot = create_dot


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
