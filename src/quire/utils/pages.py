"""Memory that costs nothing before it is used. Owns: how it is asked for. No torch."""

from __future__ import annotations

import mmap

import numpy as np
from numpy.typing import NDArray


def untouched(size: int) -> NDArray[np.uint8]:
    """`size` bytes of zeros on page boundaries, which the system provides page by page as they are first written.

    NumPy's own zeros come in huge pages where they can be had: a KV cache of thirty layers would then take 120 MiB for
    its first token. Raises `MemoryError`.
    """
    try:
        memory = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"{size} bytes cannot be had") from error
    return np.frombuffer(memory, np.uint8, size)
