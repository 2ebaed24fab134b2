"""Collectives among the ranks of one engine.

Owns: `Group`, what a rank may ask of the others, alone (`SoloGroup`) or through torch.distributed (`GlooGroup`). Knows
nothing of models, plans or how the processes were started.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

_OPS = {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}


class Group(Protocol):
    """`rank` of `size` ranks. All ranks make each call, in the same order, with tensors of one shape and dtype."""

    rank: int
    size: int

    def all_reduce(self, x: Tensor, op: str = "sum") -> Tensor:
        """`x` becomes the sum (or "min", "max") over the ranks, in place."""
        ...

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        """The ranks' tensors next to each other along `dim`, in the order of the ranks."""
        ...

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        """`x` becomes that of rank `source`, in place."""
        ...

    def close(self) -> None:
        """Leaves the group; no call may follow."""
        ...


class SoloGroup:
    """The group of one rank: every collective is the identity."""

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor, op: str = "sum") -> Tensor:
        return x

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        return x

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        return x

    def close(self) -> None:
        return None


class GlooGroup:
    """A group over gloo: tensors in host memory. The store and the group are objects of this instance; there is no
    default process group, so several engines can share a process."""

    def __init__(self, rank: int, size: int, meeting: Path, timeout_s: float = 600.0) -> None:
        """meeting: a path that does not exist yet, in a folder that all ranks see; it will hold the store."""
        self.rank, self.size = rank, size
        store = dist.FileStore(str(meeting), size)  # pyright: ignore[reportPrivateImportUsage]
        # torch declares the collectives of a backend in C++ only
        self._group: Any = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=timeout_s))

    def all_reduce(self, x: Tensor, op: str = "sum") -> Tensor:
        self._group.allreduce([x], _OPS[op]).wait()
        return x

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self._group.allgather([parts], [x.contiguous()]).wait()
        return torch.cat(parts, dim)

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        self._group.broadcast(x, source).wait()
        return x

    def close(self) -> None:
        self._group.shutdown()


def join(rank: int, size: int, meeting: Path) -> Group:
    """The group of these ranks; waits until all have come."""
    return GlooGroup(rank, size, meeting) if size > 1 else SoloGroup()
