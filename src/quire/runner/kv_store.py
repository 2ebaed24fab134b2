"""The KV tensors, on the device and on the host. Owns: their memory and the moves of whole pages.

Knows layers and groups, not who holds which page: it does what a plan says. The i-th layer of every group shares one
tensor; since all groups draw page ids from one pool, no page is used by two of them at a time.
Shape legend: N pages, B tokens of a page, K KV heads, E head size; a tensor is (2, N, B, K, E): keys, values (in int8
each row holds its scale as well, see `ops.cache`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from quire.config.arch import ModelArch
from quire.ops.cache import COPY_PAGES, row_size
from quire.types.kv import KVGroup
from quire.types.plan import Ints, Plan
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
        self._side = _Side() if device.type == "cuda" and num_host_blocks else None
        self._host = [
            _zeros((2, num_host_blocks, *shape), dtype, torch.device("cpu"), pin=device.type == "cuda")
            for _ in range(count if num_host_blocks else 0)
        ]
        place = {layer: (g, i) for g, group in enumerate(groups) for i, layer in enumerate(group.layers)}
        self.layers: list[tuple[int, Tensor]] = [
            (place[layer][0], self.tensors[place[layer][1]]) for layer in range(len(place))
        ]

    def move(self, plan: Plan) -> None:
        """The page moves of a plan, in its order; on a GPU swaps go beside the steps, until a plan's fence waits for
        them."""
        if len(plan.swap_out) or len(plan.swap_in):
            with self._beside(plan.number):
                if len(plan.swap_out):
                    self._copy_pages(self.tensors, self._host, *_ids(plan.swap_out))
                if len(plan.swap_in):
                    self._copy_pages(self._host, self.tensors, *_ids(plan.swap_in))
        if self._side is not None:
            self._side.wait(plan.fence)
        if len(plan.copies):
            self._copy_pages(self.tensors, self.tensors, *_ids(plan.copies))

    def _beside(self, number: int) -> AbstractContextManager[None]:
        return nullcontext() if self._side is None else self._side.swaps(number)


class _Side:
    """A stream for swaps. They begin when the steps before them are done, and end in their order."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._ends: deque[tuple[int, torch.cuda.Event]] = deque()

    @contextmanager
    def swaps(self, number: int) -> Iterator[None]:
        """Those of the plan with this number."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
            end = torch.cuda.Event()
            end.record()
        self._ends.append((number, end))

    def wait(self, fence: int) -> None:
        """What follows in the current stream comes after the swaps of plans up to this number."""
        last: torch.cuda.Event | None = None
        while self._ends and self._ends[0][0] <= fence:
            last = self._ends.popleft()[1]
        if last is not None:
            last.wait()


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, pin: bool) -> Tensor:
    if device.type != "cpu" or pin:
        return torch.zeros(shape, dtype=dtype, device=device, pin_memory=pin)
    return torch.from_numpy(untouched(math.prod(shape) * dtype.itemsize)).view(dtype).view(shape)


def _ids(pairs: Ints) -> tuple[Tensor, Tensor]:
    both = torch.from_numpy(pairs.T.astype("int64"))
    return both[0], both[1]
