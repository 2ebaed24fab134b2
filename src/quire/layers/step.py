"""What a model's forward may read of a step: `Step`, its attention metadata and the KV tensors.

Owns: the fields that the runner fills and the layers read. Knows nothing of plans, requests or sampling. A step is an
argument of `forward`, never ambient.

Shape legend: T tokens of the ragged batch, A position axes, N blocks, B tokens of a block, K KV heads, E head size.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from quire.ops.attention.meta import AttentionMeta, GroupMeta

__all__ = ["AttentionMeta", "GroupMeta", "Step"]


@dataclass(slots=True)
class Step:
    """`positions_T` int64 (T,) or (A, T). `kv[layer]`: (group id, KV tensor (2, N, B, K, E): keys, values)."""

    positions_T: Tensor
    attn: AttentionMeta
    kv: list[tuple[int, Tensor]]
