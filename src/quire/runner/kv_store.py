"""The KV tensors, on the device and on the host. Owns: their memory and the moves of whole pages.

Knows layers and groups, not who holds which page: it does what a plan says. The i-th layer of every group shares one
tensor; since all groups draw page ids from one pool, no page is used by two of them at a time.
Shape legend: N pages, B tokens of a page, K KV heads, E head size; a tensor is (2, N, B, K, E): keys, values (in int8
each row holds its scale as well, see `ops.cache`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from quire.config.arch import ModelArch
from quire.ops.cache import COPY_PAGES, row_size
from quire.types.kv import KVGroup
from quire.types.plan import Ints
from quire.utils.pages import untouched


def page_bytes(arch: ModelArch, groups: tuple[KVGroup, ...], block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page over all the tensors that it runs through."""
    layers = max(len(group.layers) for group in groups)
    return layers * 2 * block_size * arch.num_kv_heads * row_size(arch.head_dim, dtype) * dtype.itemsize


class KVStore:
    """`num_blocks` device pages and `num_host_blocks` host pages (pinned where the device is not the host)."""

    def __init__(
        self,
        arch: ModelArch,
        groups: tuple[KVGroup, ...],
        num_blocks: int,
        num_host_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        copy_pages: Callable[..., None] = COPY_PAGES.reference,
    ) -> None:
        count = max(len(group.layers) for group in groups)
        shape = (block_size, arch.num_kv_heads, row_size(arch.head_dim, dtype))
        self.tensors = [_zeros((2, num_blocks, *shape), dtype, device, pin=False) for _ in range(count)]
        self._copy_pages = copy_pages
        self._host = [
            _zeros((2, num_host_blocks, *shape), dtype, torch.device("cpu"), pin=device.type == "cuda")
            for _ in range(count if num_host_blocks else 0)
        ]
        place = {layer: (g, i) for g, group in enumerate(groups) for i, layer in enumerate(group.layers)}
        self.layers: list[tuple[int, Tensor]] = [
            (place[layer][0], self.tensors[place[layer][1]]) for layer in range(len(place))
        ]

    def move(self, swap_out: Ints, swap_in: Ints, copies: Ints) -> None:
        """The page moves of a plan, in its order."""
        if len(swap_out):
            sources, targets = _ids(swap_out)
            for device, host in zip(self.tensors, self._host, strict=True):
                host[:, targets] = device[:, sources.to(device.device)].to("cpu")
        if len(swap_in):
            sources, targets = _ids(swap_in)
            for device, host in zip(self.tensors, self._host, strict=True):
                device[:, targets.to(device.device)] = host[:, sources].to(device.device)
        if len(copies):
            self._copy_pages(self.tensors, *_ids(copies))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, pin: bool) -> Tensor:
    if device.type != "cpu" or pin:
        return torch.zeros(shape, dtype=dtype, device=device, pin_memory=pin)
    return torch.from_numpy(untouched(math.prod(shape) * dtype.itemsize)).view(dtype).view(shape)


def _ids(pairs: Ints) -> tuple[Tensor, Tensor]:
    both = torch.from_numpy(pairs.T.astype("int64"))
    return both[0], both[1]
