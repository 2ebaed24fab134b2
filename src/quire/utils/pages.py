"""Memory that costs nothing before it is used. Owns: how it is asked for. No torch."""

from __future__ import annotations

import mmap
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray


def untouched(size: int, huge: bool = False) -> NDArray[np.uint8]:
    """`size` bytes of zeros on page boundaries, which the system provides page by page as they are first written.

    NumPy's own zeros come in huge pages where they can be had: a KV cache of thirty layers would then take 120 MiB for
    its first token. `huge`: they may, since all of it will be used. Raises `MemoryError`.
    """
    try:
        memory = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"{size} bytes cannot be had") from error
    if huge and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8, size)
