"""The ragged batch as attention sees it: `AttentionMeta` and its `GroupMeta`s.

Owns: the fields that the runner fills and the attention ops read (`layers/step.py` hands them on). Knows nothing of
plans or requests. Shape legend: T tokens of the ragged batch, R rows, P pages of a row, B tokens of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(slots=True)
class GroupMeta:
    """One KV group of the step.

    `block_tables_RP` int32: page ids of each row, column p holds the tokens p*B .. p*B+B-1. What is not read (columns
    beyond a row's length, pages behind the window of a sliding group) may hold any number below the count of blocks.
    `slots_T` int64: page * B + offset where each token's KV is written; -1: not written.
    """

    block_tables_RP: Tensor
    slots_T: Tensor


@dataclass(slots=True)
class AttentionMeta:
    """`cu_q` int32 (R+1,): starts of rows in the batch. `lengths_R` int32: tokens of each row in the cache after this
    step's writes (0 for a padding row); the truth about what may be read.

    `q_lens`, `kv_lens`: host copies of the counts and upper bounds of `lengths_R` (None: `max_len` bounds them); both
    None under a captured graph. `max_q`, `max_len`: host upper bounds (max_len: a multiple
    of B, bounds the columns to read).
    `num_decodes`: the first so many rows have exactly one token (rows are sorted so).
    `scratch`: what an implementation makes once for this step and shares among the layers, by its own keys.
    """

    cu_q: Tensor
    lengths_R: Tensor
    q_lens: Sequence[int] | None
    max_q: int
    max_len: int
    num_decodes: int
    groups: tuple[GroupMeta, ...]
    kv_lens: Sequence[int] | None = None
    scratch: dict[Any, Any] = field(default_factory=dict[Any, Any])
