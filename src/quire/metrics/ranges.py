"""Names for parts of the engine's work on the time line of a profiler (NVTX, for Nsight Systems).

Owns: whether there are any. Off, a range costs a function call.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

Ranges = Callable[[str], AbstractContextManager[Any]]
_NOTHING = nullcontext()


def no_ranges(name: str) -> AbstractContextManager[Any]:
    return _NOTHING


def make_ranges(wanted: bool, device: str) -> Ranges:
    """`range(name)` around a part of the work; NVTX ranges where they are `wanted` and the device is CUDA's."""
    if not wanted or device != "cuda":
        return no_ranges
    import torch.cuda.nvtx

    return torch.cuda.nvtx.range
