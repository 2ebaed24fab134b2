"""What a model's forward may read of a step: `Step`, its attention metadata and the KV tensors.

Owns: the fields that the runner fills and the layers read. Knows nothing of plans, requests or sampling. A step is an
argument of `forward`, never ambient.

Shape legend: T tokens of the ragged batch, R rows, P pages of a row, A position axes, N blocks, B tokens of a block,
K KV heads, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class GroupMeta:
    """One KV group of the step.

    `block_tables_RP` int32: page ids of each row, column p holds the tokens p*B .. p*B+B-1 (columns beyond a row's
    length may hold anything that is a valid page id; pages that a sliding group has freed likewise).
    `slots_T` int64: page * B + offset where each token's KV is written; -1: not written.
    """

    block_tables_RP: Tensor
    slots_T: Tensor


@dataclass(slots=True)
class AttentionMeta:
    """The ragged batch as attention sees it.

    `cu_q` int32 (R+1,): starts of rows in the batch. `lengths_R` int32: tokens of each row in the cache after this
    step's writes (0 for a padding row); the truth about what may be read.
    `q_lens`, `kv_lens`: host copies of the counts and upper bounds of `lengths_R`; None under a captured graph, where
    every row is a decode. `max_q`, `max_len`: host upper bounds (max_len: a multiple of B, bounds the columns to read).
    `num_decodes`: the first so many rows have exactly one token (rows are sorted so).
    """

    cu_q: Tensor
    lengths_R: Tensor
    q_lens: Sequence[int] | None
    max_q: int
    max_len: int
    num_decodes: int
    groups: tuple[GroupMeta, ...]
    kv_lens: Sequence[int] | None = None


@dataclass(slots=True)
class Step:
    """`positions_T` int64 (T,) or (A, T). `kv[layer]`: (group id, KV tensor (2, N, B, K, E): keys, values)."""

    positions_T: Tensor
    attn: AttentionMeta
    kv: list[tuple[int, Tensor]]
