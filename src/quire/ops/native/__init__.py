"""The native CPU library: kernels in C++ (csrc/cpu) behind a plain C interface, loaded by ctypes.

`library.py` finds and describes it, `program.py` makes its operations from tensors, `kernels.py` and `bound.py` give
the implementations named "native" of the ops of `quire.ops`. Everything works without it, by the references.
"""

from __future__ import annotations

from importlib import import_module

from quire.ops.dispatch import Case, Op

PRIORITY = 10


def register(op: Op, supports: str = "refusal") -> None:
    """Registers the implementation of `op` in `bound.py`; `supports` names the function of `kernels.py` that says why
    not. Both are imported when they are asked for."""

    def ask(case: Case) -> str | None:
        return getattr(import_module("quire.ops.native.kernels"), supports)(case)

    op.register("native", f"quire.ops.native.bound:{op.name}", ask, PRIORITY)
