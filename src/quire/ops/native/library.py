"""The shared library and its thread pools.

Owns: where the library lies, its C interface in ctypes (csrc/cpu/quire.h is the text to read), `Pool`. Knows no ops.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Sequence
from functools import cache
from pathlib import Path

ABI = 4
FILE = Path(__file__).with_name("libquire.so")
POINTERS, INTS, FLOATS, DIMS = 12, 16, 4, 16

PORTABLE, AVX2, AVX512 = range(3)
LEVELS = ("portable", "avx2", "avx512")

# A thread that waits spins so long before it sleeps: longer than the gap between two ops, shorter than a step.
SPIN_US = 60


class Operation(ctypes.Structure):
    """`qr_op`."""

    _fields_ = (
        ("op", ctypes.c_int32),
        ("flags", ctypes.c_int32),
        ("p", ctypes.c_void_p * POINTERS),
        ("i", ctypes.c_int64 * INTS),
        ("f", ctypes.c_double * FLOATS),
    )


class Dims(ctypes.Structure):
    """`qr_dims`: sizes of a step, read when a program runs. Op fields name entry k as -1 - k."""

    _fields_ = (("n", ctypes.c_int64 * DIMS),)


@cache
def load() -> ctypes.CDLL | str:
    """The library, or the reason why there is none. Loaded once: it is code, not state."""
    if not FILE.exists():
        return "the native library is not built: no C++ compiler was found when quire was installed"
    try:
        library = ctypes.CDLL(str(FILE))
    except OSError as error:
        return f"the native library cannot be loaded: {error}"
    if library.qr_abi() != ABI:
        return f"the native library is of another version ({library.qr_abi()}, not {ABI}): install quire again"
    library.qr_has_level.argtypes = (ctypes.c_int,)
    library.qr_pool_new.argtypes = (ctypes.c_int, ctypes.POINTER(ctypes.c_int), ctypes.c_int, ctypes.c_int)
    library.qr_pool_new.restype = ctypes.c_void_p
    for name in ("qr_pool_free", "qr_pool_threads", "qr_pool_level"):
        getattr(library, name).argtypes = (ctypes.c_void_p,)
    library.qr_pool_free.restype = None
    library.qr_run.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
    return library


def levels() -> list[int]:
    """The levels of instructions that this processor has, by the library's account; none without the library."""
    library = load()
    return [] if isinstance(library, str) else [level for level in range(len(LEVELS)) if library.qr_has_level(level)]


class Pool:
    """Threads that run programs; the caller of `run` is one of them. `cpus`: where they may run, one for each (None:
    all that this process may use); the others are pinned to those where the caller is not. `level`: -1 for the best.
    """

    def __init__(
        self, threads: int, cpus: Sequence[int] | None = None, level: int = -1, spin_us: int = SPIN_US
    ) -> None:
        library = load()
        if isinstance(library, str):
            raise RuntimeError(library)
        places = (ctypes.c_int * threads)(*cpus) if cpus is not None else None
        self._run = library.qr_run
        self._handle = library.qr_pool_new(threads, places, level, spin_us)
        if not self._handle:
            raise RuntimeError(f"a pool of {threads} threads at level {level} cannot be made here")
        self.threads, self.level = threads, int(library.qr_pool_level(self._handle))
        self._free = weakref.finalize(self, _free, library, self._handle, os.getpid())

    def run(self, operations: ctypes.Array[Operation] | Operation, count: int = 1, dims: Dims | None = None) -> None:
        """Runs `count` operations in order; returns when they are done."""
        failed = self._run(self._handle, ctypes.addressof(operations), count, ctypes.addressof(dims) if dims else None)
        if failed:
            raise RuntimeError(f"the native library cannot run this program ({failed})")


def _free(library: ctypes.CDLL, handle: int, owner: int) -> None:
    if os.getpid() == owner:  # a child process has the memory of its parent's pool, but not its threads
        library.qr_pool_free(handle)
