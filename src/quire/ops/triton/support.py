"""Why a case cannot be served by Triton. Owns the reasons; imports no Triton."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from quire.ops.dispatch import Case
from quire.utils.optional import available

# Features of a token that a norm holds in registers at most.
WIDEST = 16384

MOST_EXPERTS = 1024  # whose logits a token's program holds in registers
WIDEST_HEAD = 256  # numbers of a head in attention
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


def untyped(case: Case) -> str | None:
    """For ops that take the numbers of any model."""
    return refusal(replace(case, dtype=torch.float32))


def supports_linear(case: Case) -> str | None:
    """torch's own product is what a case in float32 needs."""
    return refusal(case) or ("is for bfloat16 and float16" if case.dtype == torch.float32 else None)


def supports_invariant(case: Case) -> str | None:
    """Like `linear`; the copy engine needs rows of whole 16 bytes."""
    inputs = case.shapes.get("inputs", 8)
    return supports_linear(case) or (None if inputs % 8 == 0 else f"needs inputs in eights, not {inputs}")


def supports_norm(case: Case) -> str | None:
    size = case.shapes.get("size", 0)
    return refusal(case) or (None if size <= WIDEST else f"norms {WIDEST} features at most, not {size}")


def supports_attention(case: Case) -> str | None:
    heads, kv_heads = case.shapes.get("num_heads", 1), case.shapes.get("num_kv_heads", 1)
    size = case.shapes.get("head_dim", 0)
    if heads % kv_heads:
        return f"{heads} heads are no multiple of {kv_heads} KV heads"
    return refusal(case) or (None if size <= WIDEST_HEAD else f"heads have {WIDEST_HEAD} numbers at most, not {size}")


def supports_moe(case: Case) -> str | None:
    bits, experts = case.shapes.get("bits"), case.shapes.get("experts", 1)
    if bits is not None:
        return f"has no kernel for experts in {bits} bits"
    return refusal(case) or (None if experts <= MOST_EXPERTS else f"chooses among {MOST_EXPERTS} experts at most")
