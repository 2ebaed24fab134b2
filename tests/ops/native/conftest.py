"""What the tests of the native library share: pools of each level of instructions that this processor has."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from quire.ops.native.kernels import Kernels
from quire.ops.native.library import LEVELS, Pool, levels, load


@cache
def _kernels(level: int, threads: int) -> Kernels:
    return Kernels(Pool(threads, level=level, spin_us=5))  # two test processes share two cores


@pytest.fixture(params=range(len(LEVELS)), ids=LEVELS)
def level(request: pytest.FixtureRequest) -> int:
    if isinstance(reason := load(), str):
        pytest.skip(reason)
    if request.param not in levels():
        pytest.skip(f"this processor has no {LEVELS[request.param]}")
    return request.param


@pytest.fixture
def kernels(level: int) -> Callable[[int], Kernels]:
    """Kernels of a pool of so many threads, at the test's level."""
    return lambda threads: _kernels(level, threads)
