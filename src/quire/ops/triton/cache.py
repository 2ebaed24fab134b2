"""Copies of whole KV pages, all layers in one launch. Owns: the kernel of `copy_pages`.

Shape legend: L layers, C copies; a tensor is (2, N, B, K, E).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from quire.ops import cache as reference
from quire.ops.triton.launch import Kernel, ceil, release, wait

# Words of four bytes that a program moves.
BLOCK = 2048


def copy_pages(tensors: Sequence[Tensor], sources_C: Tensor, targets_C: Tensor) -> None:
    first, count = tensors[0], sources_C.shape[0]
    size = first[0, 0].numel() * first.element_size()
    if size % 4 or set(sources_C.tolist()) & set(targets_C.tolist()):
        return reference.copy_pages(tensors, sources_C, targets_C)
    if count:
        # What the kernel must know of them goes over in one piece.
        addresses_L = torch.tensor([x.data_ptr() for x in tensors])
        table = torch.cat((addresses_L, sources_C, targets_C)).to(first.device)
        grid = (count, 2 * len(tensors), ceil(size // 4, BLOCK))
        _copy_kernel(grid, (table,), (count,), (len(tensors), first.shape[1], size // 4, BLOCK))


@Kernel
def _copy_kernel(
    table, C, L: tl.constexpr, pages: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    release(PDL)
    c, layer, half = tl.program_id(0), tl.program_id(1) // 2, tl.program_id(1) % 2
    word = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = word < WORDS
    wait(PDL)
    base = tl.multiple_of(tl.load(table + layer).to(tl.pointer_type(tl.int32)), 16)
    source = (half * pages + tl.load(table + L + c)) * WORDS
    target = (half * pages + tl.load(table + L + C + c)) * WORDS
    tl.store(base + target + word, tl.load(base + source + word, inside), inside)
