"""Rotary positions as a module: one table, shared by the layers that turn alike.

Owns: the table, made when the longest sequence is known. Holds no weights, and turns nothing itself (`ops.heads`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quire.config.arch import RopeParams
from quire.ops.rotary import rotary_table


class Rotary(nn.Module):
    """`table_2LF`: cosines and sines of each position, see `ops.rotary`."""

    table_2LF: Tensor

    def __init__(self, rope: RopeParams) -> None:
        super().__init__()
        self.rope = rope
        self.register_buffer("table_2LF", torch.empty(0, device="meta"), persistent=False)

    def build(self, length: int, device: torch.device) -> None:
        """Makes the table for positions below `length`."""
        self.table_2LF = rotary_table(self.rope, length, device)
