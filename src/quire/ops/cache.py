"""Writing and moving KV pages. Owns: the layout (2, N, B, K, E) of a layer's KV tensor. Knows no block accounting; the
write is part of the op `attention`, which faster implementations fuse.

Shape legend: T tokens, N blocks, B tokens of a block, K KV heads, E head size, C copies.
"""

from __future__ import annotations

import torch
from torch import Tensor


def write_kv(k_TKE: Tensor, v_TKE: Tensor, kv: Tensor, slots_T: Tensor) -> None:
    """Stores each token's key and value at its slot (int64, page * B + offset; -1: nowhere).

    Static shapes and no host sync, so that a graph can capture it: a token without a slot repeats the write of the
    first token that has one (the same value twice is harmless), and where none has, slot 0 gets back what it holds.
    """
    written_T = slots_T >= 0
    first = torch.argmax(written_T.to(torch.uint8))
    source_T = torch.where(written_T, torch.arange(slots_T.shape[0], device=slots_T.device), first)
    target_T = slots_T[source_T].clamp(min=0)
    any_written = written_T.any()
    for pages, new_TKE in ((kv[0], k_TKE), (kv[1], v_TKE)):
        flat = pages.view(-1, *pages.shape[2:])
        flat[target_T] = torch.where(any_written, new_TKE[source_T].to(flat.dtype), flat[:1])


def copy_pages(kv: Tensor, sources_C: Tensor, targets_C: Tensor) -> None:
    """Copies whole pages (int64 ids) of one KV tensor (2, N, B, K, E); every source is read before a target is
    written."""
    kv[:, targets_C] = kv[:, sources_C]
