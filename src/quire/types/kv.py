"""KV groups: layers that share a cache shape and a rule. Owns the description, not blocks or tensors."""

from __future__ import annotations

import msgspec


class KVGroup(msgspec.Struct, frozen=True):
    """Layers that share one block table.

    `kind`: "full" (every token stays), "sliding" (only the last `window` tokens are read again), "state" (one page
    holds the state after the last computed token; pages at block ends are snapshots), "latent" (like full, another page
    layout). All pages of an engine have one byte size, so block ids of different groups come from one pool.
    """

    kind: str
    layers: tuple[int, ...]
    window: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("full", "sliding", "state", "latent"):
            raise ValueError(f"unknown KV group kind {self.kind!r}")
        if (self.kind == "sliding") != (self.window is not None):
            raise ValueError("a sliding group needs a window, and only a sliding group has one")


def pages_needed(groups: tuple[KVGroup, ...], length: int, chunk: int, block_size: int) -> int:
    """Pages that one sequence of `length` tokens holds at the most when it is computed in chunks of `chunk`."""
    total = 0
    for group in groups:
        pages = -(-length // block_size)
        if group.kind == "state":
            pages = min(pages, 2)
        elif group.window is not None:
            pages = min(pages, -(-(group.window + chunk) // block_size) + 1)
        total += pages
    return total
