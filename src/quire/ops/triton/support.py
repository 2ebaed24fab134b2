"""Why a case cannot be served by Triton. Owns the reasons; imports no Triton."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from quire.ops.dispatch import Case
from quire.utils.optional import available

# Features of a token that a norm holds in registers at most.
WIDEST = 16384

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def refusal(case: Case) -> str | None:
    """Why no kernel of this package can serve a case."""
    if case.device.type != "cuda" and not interpreted():
        return f"runs on a GPU, not on {case.device.type}"
    if case.dtype not in DTYPES:
        return f"has no kernels for {str(case.dtype).removeprefix('torch.')}"
    return None if available("triton") else "triton is not installed"


def integers(case: Case) -> str | None:
    """For ops on integers: the model's type does not matter."""
    return refusal(replace(case, dtype=torch.float32))


def supports_norm(case: Case) -> str | None:
    size = case.shapes.get("size", 0)
    return refusal(case) or (None if size <= WIDEST else f"norms {WIDEST} features at most, not {size}")
