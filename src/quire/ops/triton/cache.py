"""Copies of whole KV pages, all layers in one launch. Owns: the table of the tensors' addresses and the kernel.

Shape legend: L layers, C copies; a tensor is (2, N, B, K, E).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from quire.ops.triton.launch import Kernel, ceil, release, wait

# Words of four bytes that a program moves.
BLOCK = 2048


class Pages:
    """The KV tensors of one cache, all of one shape and contiguous, so that their pages move together. The table of
    addresses holds while the tensors do."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        first = self.tensors[0]
        if not all(x.shape == first.shape and x.dtype == first.dtype and x.is_contiguous() for x in self.tensors):
            raise ValueError("KV tensors of one cache have one shape and type, and are contiguous")
        self.page = first[0, 0].numel() * first.element_size()
        if self.page % 4:
            raise ValueError(f"a page of {self.page} bytes is not made of words of four")
        addresses = [x.data_ptr() for x in self.tensors]
        self.addresses_L = torch.tensor(addresses, dtype=torch.int64, device=first.device)

    def copy(self, sources_C: Tensor, targets_C: Tensor) -> None:
        """Copies pages (int64 ids, on the device). No target may be a source of the same call."""
        count, words = sources_C.shape[0], self.page // 4
        if count == 0:
            return
        _copy_kernel(
            (count, 2 * len(self.tensors), ceil(words, BLOCK)),
            (self.addresses_L, sources_C, targets_C),
            constants=(self.tensors[0].shape[1], words, BLOCK),
        )


@Kernel
def _copy_kernel(
    addresses, sources, targets,
    pages: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    c = tl.program_id(0)
    layer, half = tl.program_id(1) // 2, tl.program_id(1) % 2
    word = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = word < WORDS
    base = tl.load(addresses + layer).to(tl.pointer_type(tl.int32))
    base = tl.multiple_of(base, 16)
    wait(PDL)
    source = (half * pages + tl.load(sources + c)) * WORDS
    target = (half * pages + tl.load(targets + c)) * WORDS
    tl.store(base + target + word, tl.load(base + source + word, inside), inside)
