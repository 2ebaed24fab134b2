"""Paged attention: the op `attention` (see `reference.py` for its meaning) and the metadata it reads.

Facts of its `Case`: num_heads, num_kv_heads, head_dim, window, softcap, alibi.
"""

from __future__ import annotations

from quire.ops import native, triton
from quire.ops.attention.meta import AttentionMeta, GroupMeta
from quire.ops.attention.reference import attention
from quire.ops.dispatch import REGISTRY

ATTENTION = REGISTRY.op("attention", attention)
native.register(ATTENTION, "supports_attention")
triton.register(ATTENTION, "attention:attention", "supports_attention")
triton.register(ATTENTION, "attention:invariant_attention", "supports_attention", "invariant")

__all__ = ["ATTENTION", "AttentionMeta", "GroupMeta", "attention"]
