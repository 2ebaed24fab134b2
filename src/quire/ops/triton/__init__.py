"""Kernels for GPUs, in Triton: the implementations named "triton" of the ops of `quire.ops`.

One module a topic; `support.py` says what they cannot serve. Triton comes with torch on a GPU and is imported only when
an op is bound to one of these. Where Triton's interpreter is on (TRITON_INTERPRET=1, for tests) they serve a CPU too,
behind the native library unless they are asked for.
"""

from __future__ import annotations

from importlib import import_module

from quire.ops.dispatch import Case, Op

PRIORITY = 5
ASKED_FOR = -2  # behind the reference, which serves everything


def register(op: Op, target: str, supports: str = "refusal", name: str = "triton") -> None:
    """Registers "module:function" of this package for `op`; `supports` names the function of `support.py` that says why
    not. Both are imported when they are asked for. Under another name than "triton" it serves who asks for it alone."""

    def ask(case: Case) -> str | None:
        return getattr(import_module("quire.ops.triton.support"), supports)(case)

    op.register(name, f"quire.ops.triton.{target}", ask, PRIORITY if name == "triton" else ASKED_FOR)
