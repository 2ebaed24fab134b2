"""Writing, reading and moving KV pages. Owns: the layout (2, N, B, K, E) of a layer's KV tensor, and that of a cache in
int8. Knows no block accounting; the write is part of the op `heads`, the copy of pages is the op `copy_pages`.

In int8 each key and value of a head is a row of its own scale: E whole numbers, filled up to fours, then the float32 by
which they are to be multiplied, four bytes more; so the tensor is (2, N, B, K, row_size) and moves like any other.
Shape legend: T tokens, N blocks, B tokens of a block, K KV heads, E head size, C copies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quire.ops import native, triton
from quire.ops.dispatch import REGISTRY


def row_size(head_dim: int, dtype: torch.dtype) -> int:
    """Elements of the cache for a key or value of one head."""
    return head_dim if dtype != torch.int8 else (head_dim + 3) // 4 * 4 + 4


def quantize_rows(x: Tensor) -> Tensor:
    """(..., E) as rows in int8: the largest magnitude becomes 127, halves go to even. A row with a number that is not
    finite has the scale NaN, and so reads as NaN."""
    x = x.float()
    top = x.abs().amax(-1, keepdim=True)
    finite = top.isfinite()
    scale = torch.where(finite, top.clamp(min=1e-12) / 127, torch.nan)
    q = torch.where(finite, x / scale, 0.0).round().to(torch.int8)
    rows = q.new_zeros(*x.shape[:-1], row_size(x.shape[-1], torch.int8))
    rows[..., : x.shape[-1]] = q
    rows[..., -4:] = scale.view(torch.int8)
    return rows


def read_rows(rows: Tensor, head_dim: int) -> Tensor:
    """float32 (..., E) of what lies in the cache."""
    if rows.dtype != torch.int8:
        return rows.float()
    return rows[..., :head_dim].float() * rows[..., -4:].contiguous().view(torch.float32)


def write_kv(k_TKE: Tensor, v_TKE: Tensor, kv: Tensor, slots_T: Tensor) -> None:
    """Stores each token's key and value, rounded to the cache's type, at its slot (int64, page * B + offset; -1:
    nowhere).

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
        if kv.dtype == torch.int8:
            new_TKE = quantize_rows(new_TKE)
        flat[target_T] = torch.where(any_written, new_TKE[source_T].to(flat.dtype), flat[:1])


def copy_pages(sources: Sequence[Tensor], targets: Sequence[Tensor], sources_C: Tensor, targets_C: Tensor) -> None:
    """Copies whole pages (int64 ids, on the host) of each of some KV tensors (2, N, B, K, E) to the same place in the
    list of others, or of the same ones, contiguous and of one type; every source is read before a target is written.
    Tensors on the host are pinned where the others are on a device."""
    for source, target in zip(sources, targets, strict=True):
        target[:, targets_C.to(target.device)] = source[:, sources_C.to(source.device)].to(target.device)


COPY_PAGES = REGISTRY.op("copy_pages", copy_pages)
native.register(COPY_PAGES, "supports_copies")
triton.register(COPY_PAGES, "cache:copy_pages", "untyped")
