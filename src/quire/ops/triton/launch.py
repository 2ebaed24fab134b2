"""What the Triton kernels share: launches that cost little, and programmatic dependent launch.

Owns: `Kernel` and the device functions `wait` and `release`. Knows no ops.

A kernel that is launched dependently (PDL) may begin while the one before it still runs. Up to `wait` it may read
weights alone, which no kernel writes; `release` lets the next one begin. Every kernel here calls both, so that the
order of all kernels before holds too: a kernel that did not wait would end before those in front of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quire.ops.triton.ahead import AHEAD, Ahead

INTERPRETED: bool = knobs.runtime.interpret

# Triton's own launch takes some 20 us of Python, most of them to find what it compiled before. Its inner call is no
# public interface, so that it is used only where it is known.
_KNOWN = triton.__version__.startswith("3.6.")


@cache
def dependent() -> bool:
    """Whether kernels are launched dependently: on Hopper and later."""
    return not INTERPRETED and torch.cuda.get_device_capability()[0] >= 9


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return 2 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


class Kernel:
    """A kernel in Triton. Its parameters: tensors, then integers that vary from call to call (in capitals; one compiled
    kernel serves all their values), then constants, the last of which is `PDL`, added here. `fused`: whether the
    compiler may round a product and a sum once instead of twice. `jit`: Triton's, or Gluon's."""

    def __init__(self, function: Callable[..., None], fused: bool = True, jit: Any = triton.jit) -> None:
        parameters = inspect.signature(function).parameters.values()
        plain = [p.name for p in parameters if p.annotation is inspect.Parameter.empty]
        self._jit = jit(function, do_not_specialize=[name for name in plain if name.isupper()])
        self._fused = fused
        self._compiled: dict[Any, Any] = {}
        self._coming: dict[Any, Future[Any]] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: tuple[Tensor | None, ...],
        sizes: tuple[int, ...] = (),
        constants: tuple[Any, ...] = (),
        warps: int = 4,
        stages: int = 1,
        tiles: tuple[Any, ...] = (),
        registers: int | None = None,
    ) -> None:
        """Tensors of any alignment; sizes below 2^31. `tiles`: tensor descriptors, before the tensors. `registers`: at
        most so many for a thread."""
        pdl = dependent()
        ahead = AHEAD.get()
        if tiles:
            options = {"num_warps": warps, "num_stages": stages, "launch_pdl": pdl}
            key = (constants, warps, stages, pdl, *(None if x is None else x.dtype for x in tensors))
            if ahead is not None:
                self._foresee(ahead, key, (*tiles, *map(_like, tensors), *sizes, *constants, pdl), options)
                return
            if (coming := self._coming.pop(key, None)) is not None:
                wait_for([coming])
            self._jit[grid](*tiles, *tensors, *sizes, *constants, pdl, **options)
            return
        pointers = [None if x is None else x.data_ptr() for x in tensors]
        bits = 0
        for pointer in pointers:
            bits |= pointer or 0
        device = 0 if INTERPRETED else torch.cuda.current_device()
        kinds = [None if x is None else x.dtype for x in tensors]
        key = (constants, warps, stages, registers, device, pdl, bits & 15, *kinds)
        compiled = self._compiled.get(key)
        if compiled is None or ahead is not None:
            options = {
                "num_warps": warps, "num_stages": stages, "maxnreg": registers, "launch_pdl": pdl,
                "enable_fp_fusion": self._fused,
            }  # fmt: skip
            if ahead is not None:
                if compiled is None:
                    self._foresee(ahead, key, (*map(_like, tensors), *sizes, *constants, pdl), options)
                return
            if (coming := self._coming.pop(key, None)) is not None:
                wait_for([coming])
            compiled = self._jit[grid](*tensors, *sizes, *constants, pdl, **options)
            if _KNOWN and not INTERPRETED and bits & 15 == 0:
                self._compiled[key] = compiled
            return
        compiled.run(
            *grid, torch._C._cuda_getCurrentRawStream(device), compiled.function, compiled.packed_metadata,
            None, None, None, *pointers, *sizes, *constants, pdl,
        )  # fmt: skip

    def _foresee(self, ahead: Ahead, key: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        if INTERPRETED:
            ahead.submit((self, key), lambda: None)
            return
        self._jit.device_caches[torch.cuda.current_device()]  # made here, once, and not by two threads

        def compile() -> None:
            compiled = self._jit.warmup(*arguments, grid=(1, 1, 1), **options)
            assert compiled.run is not None  # its launcher is made, by a C compiler, and it is loaded

        coming = ahead.submit((self, key), compile)
        if coming is not None:
            self._coming[key] = coming


class _Like:
    """A tensor's dtype and alignment: all that is asked about it where it is not read."""

    __slots__ = ("_at", "dtype")

    def __init__(self, tensor: Tensor) -> None:
        self.dtype, self._at = tensor.dtype, tensor.data_ptr()

    def data_ptr(self) -> int:
        return self._at


def _like(tensor: Tensor | None) -> _Like | None:
    return None if tensor is None else _Like(tensor)


def open_compiler() -> None:
    """What Triton finds out once, whatever it compiles."""
    if _KNOWN:
        driver: Any = triton.runtime.driver.active
        triton.runtime.cache.triton_key()
        triton.compiler.make_backend(driver.get_current_target()).hash()


def ceil(size: int, block: int) -> int:
    """Blocks that cover `size`."""
    return -(-size // block)


def power(size: int) -> int:
    """The power of two that is no smaller."""
    return 1 << (size - 1).bit_length()


@triton.jit
def wait(PDL: tl.constexpr):
    """Until all that earlier kernels wrote can be read."""
    if PDL:
        gdc_wait()


@triton.jit
def release(PDL: tl.constexpr):
    """The next kernel may begin, once all programs of this one have come here."""
    if PDL:
        gdc_launch_dependents()
