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


def copy_pages(sources: Sequence[Tensor], targets: Sequence[Tensor], sources_C: Tensor, targets_C: Tensor) -> None:
    first, count = sources[0], sources_C.shape[0]
    size = first[0, 0].numel() * first.element_size()
    same = sources[0].data_ptr() == targets[0].data_ptr()
    if size % 4 or (same and set(sources_C.tolist()) & set(targets_C.tolist())):
        return reference.copy_pages(sources, targets, sources_C, targets_C)
    if count:
        # What the kernel must know of them goes over in one piece.
        device = first.device if first.is_cuda else targets[0].device
        addresses_2L = torch.tensor([x.data_ptr() for x in (*sources, *targets)])
        table = torch.cat((addresses_2L, sources_C, targets_C))
        if device.type == "cuda":
            table = table.pin_memory().to(device, non_blocking=True)
        layers, words = len(sources), size // 4
        grid = (count, 2 * layers, ceil(words, BLOCK))
        _copy_kernel(grid, (table,), (count, first.shape[1], targets[0].shape[1]), (layers, words, BLOCK))


@Kernel
def _copy_kernel(table, C, FROM, TO, L: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """FROM, TO: pages of a tensor of either kind."""
    release(PDL)
    c, layer, half = tl.program_id(0), tl.program_id(1) // 2, tl.program_id(1) % 2
    word = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = word < WORDS
    wait(PDL)
    source = tl.multiple_of(tl.load(table + layer).to(tl.pointer_type(tl.int32)), 16)
    target = tl.multiple_of(tl.load(table + L + layer).to(tl.pointer_type(tl.int32)), 16)
    source += (half * FROM + tl.load(table + 2 * L + c)) * WORDS
    target += (half * TO + tl.load(table + 2 * L + C + c)) * WORDS
    tl.store(target + word, tl.load(source + word, inside), inside)
