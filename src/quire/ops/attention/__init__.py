"""Paged attention: the op `attention` (see `reference.py` for its meaning) and the metadata it reads.

Facts of its `Case`: num_heads, num_kv_heads, head_dim, window, softcap, alibi.
"""

from __future__ import annotations

from quire.ops.attention.meta import AttentionMeta, GroupMeta
from quire.ops.attention.reference import attention
from quire.ops.dispatch import REGISTRY
from quire.ops.native import register

ATTENTION = REGISTRY.op("attention", attention)
register(ATTENTION, "supports_attention")

__all__ = ["ATTENTION", "AttentionMeta", "GroupMeta", "attention"]
