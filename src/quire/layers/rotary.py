"""Rotary positions as a module: one table, shared by the layers that turn alike.

Owns: the table, made when the longest sequence is known. Holds no weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quire.config.arch import RopeParams
from quire.ops.dispatch import Binder
from quire.ops.rotary import ROTARY, rotary_table


class Rotary(nn.Module):
    """Turns queries and keys (T, heads, E) by their positions (T,); see `ops.rotary`."""

    table_2LF: Tensor

    def __init__(self, rope: RopeParams) -> None:
        super().__init__()
        self.rope = rope
        self.op = ROTARY.reference
        self.register_buffer("table_2LF", torch.empty(0, device="meta"), persistent=False)

    def build(self, length: int, device: torch.device) -> None:
        """Makes the table for positions below `length`."""
        self.table_2LF = rotary_table(self.rope, length, device)

    def bind(self, ops: Binder) -> None:
        self.op = ops.bind(ROTARY, rotary_dim=self.rope.rotary_dim)

    def forward(self, q_THE: Tensor, k_TKE: Tensor, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        return self.op(q_THE, k_TKE, self.table_2LF, positions_T)


class NoRotary(nn.Module):
    """For models whose positions are learned or come as a bias."""

    def forward(self, q_THE: Tensor, k_TKE: Tensor, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        return q_THE, k_TKE
