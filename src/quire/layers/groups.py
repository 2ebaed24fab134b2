"""Which layers share a block table: `kv_groups`. Owns: the partition. No torch; knows no tensors and no blocks."""

from __future__ import annotations

import math

from quire.config.arch import ModelArch
from quire.types.kv import KVGroup

# Each group costs a block table for each sequence; beyond this many, freeing blocks behind a window is not worth it.
MAX_GROUPS = 8


def kv_groups(arch: ModelArch, max_len: int | None = None) -> tuple[KVGroup, ...]:
    """The layers of `arch` in groups of one rule and of equal layer count, so that pages of all groups have one size.

    A layer's index inside its group is the KV tensor it uses; groups share page ids. 2 full and 4 sliding layers give
    one full group and two sliding ones of two layers each. A window that no sequence of at most `max_len` tokens
    outgrows counts as full. Where the counts have so small a common divisor that there would be more than `MAX_GROUPS`,
    all layers form one full group: their windows still hold, their blocks are merely kept.
    """
    kinds: dict[int | None, list[int]] = {}
    for layer, window in enumerate(arch.sliding_windows):
        if window is not None and max_len is not None and window >= max_len:
            window = None
        kinds.setdefault(window, []).append(layer)
    size = math.gcd(*(len(layers) for layers in kinds.values()))
    if arch.num_layers // size > MAX_GROUPS:
        return (KVGroup("full", tuple(range(arch.num_layers))),)
    return tuple(
        KVGroup("full" if window is None else "sliding", tuple(layers[at : at + size]), window)
        for window, layers in kinds.items()
        for at in range(0, len(layers), size)
    )
