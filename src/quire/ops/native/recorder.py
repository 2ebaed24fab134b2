"""Recording a model's forward as a native program: what a graph is on a GPU.

Owns: `record`, which runs the Python of a forward once, without computing, and keeps the operations that its kernels
would have run; the buffers between them. Knows no plans and no models: it is told which function to run.

Sizes that change from step to step are recognised by their value while recording: the caller gives every such size a
number that nothing else has, and the program reads the true one from its `Dims`. A forward that computes anything
outside the native kernels cannot be recorded (`Unrecordable`), and runs eagerly then.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from quire.ops.native import program
from quire.ops.native.kernels import Kernels
from quire.ops.native.library import Operation, Pool
from quire.ops.native.program import Program, dim
from quire.utils.pages import untouched

Bytes = NDArray[np.uint8]


class Unrecordable(Exception):
    """Why a forward cannot be recorded."""


def _nothing() -> None:
    pass


class Buffers:
    """Memory between operations. A buffer is used again as soon as no tensor over it lives: a program runs in the order
    in which it was recorded, so whoever comes later in Python comes later in the program."""

    def __init__(self) -> None:
        self.all: list[Bytes] = []
        self._free: list[Bytes] = []
        self._then: dict[int, Callable[[], None]] = {}

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        fits = [slot for slot in self._free if slot.size >= size]
        slot = min(fits, key=lambda slot: slot.size) if fits else self._new(size)
        self._free = [other for other in self._free if other is not slot]
        # torch keeps the array alive as long as a tensor shares its memory, and tells nobody else when it lets go
        array = slot[:size]
        weakref.finalize(array, self._release, slot).atexit = False
        return torch.from_numpy(array).view(dtype).view(shape)

    def same(self, tensor: Tensor, address: int) -> bool:
        """Whether `address` lies in the buffer that begins with `tensor`."""
        slot = next(slot for slot in self.all if slot.ctypes.data == tensor.data_ptr())
        return 0 <= address - slot.ctypes.data < slot.size

    def when_free(self, tensor: Tensor, then: Callable[[], None]) -> None:
        """Call `then` once no tensor over the buffer that begins with `tensor` lives."""
        self._then[tensor.data_ptr()] = then

    def _release(self, slot: Bytes) -> None:
        self._free.append(slot)
        self._then.pop(slot.ctypes.data, _nothing)()

    def _new(self, size: int) -> Bytes:
        self.all.append(untouched(size))
        return self.all[-1]


class _Tape:
    """Stands for the pool: keeps operations instead of running them."""

    def __init__(self, pool: Pool) -> None:
        self.level, self.threads = pool.level, pool.threads
        self.operations: list[Operation] = []

    def run(self, operations: Any, count: int = 1, dims: Any = None) -> None:
        each = (operations,) if isinstance(operations, Operation) else operations
        self.operations += [Operation.from_buffer_copy(operation) for operation in each]


class Recorder(Kernels):
    """Kernels whose operations are kept. `sizes`: which entry of `Dims` a size stands for."""

    def __init__(self, pool: Pool, sizes: Mapping[int, int]) -> None:
        self.tape = _Tape(pool)
        self.buffers = Buffers()
        self._sizes = sizes
        super().__init__(self.tape)  # type: ignore[arg-type]

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return self.buffers.empty(tuple(shape), dtype)

    def gated_activation(self, x: Tensor, kind: str) -> Tensor:
        """A part of the linear layer that computed `x`, where nothing else can read that."""
        out = super().gated_activation(x, kind)
        operations = self.tape.operations
        linear = operations[-2] if len(operations) > 1 else None
        if linear is None or not program.computes(linear, x) or self.buffers.same(out, linear.p[0]):
            return out
        count = len(operations)

        def fuse() -> None:
            if len(operations) == count:  # nothing was recorded meanwhile
                operations[-2:] = [program.gated(operations[-2], out_at, kind)]

        out_at = out.data_ptr()
        self.buffers.when_free(x, fuse)
        return out

    def count(self, size: int) -> int:
        if size not in self._sizes:
            raise Unrecordable(f"a size of {size} is none of those that a program knows")
        return dim(self._sizes[size])


class _ViewsOnly(TorchDispatchMode):
    """Lets through what only looks at memory in another way, and records sums, which code that is not quire's makes by
    torch; everything else would be missing from the program."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch would import its compiler, for a second or more, to exclude this from it; nothing here is compiled."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.add.Tensor and not kwargs and _alike(*args):
            return self._recorder.add(*args)
        out = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage().data_ptr() for t in _tensors(args)}
        new = [t for t in _tensors(out) if t.untyped_storage().data_ptr() not in inputs]
        if new or func._schema.is_mutable:
            raise Unrecordable(f"{func} computes outside the native kernels")
        return out


def _alike(x: Any, y: Any) -> bool:
    both = isinstance(x, Tensor) and isinstance(y, Tensor)
    return both and (x.shape, x.dtype) == (y.shape, y.dtype) and x.dim() > 1 and x.is_floating_point()


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in _tensors(v)] if isinstance(value, list | tuple) else []


@contextmanager
def _swapped(model: nn.Module, recorder: Recorder) -> Any:
    """Every op bound to native kernels is the recorder's meanwhile."""
    old: list[tuple[nn.Module, Any]] = []
    try:
        for name, module in model.named_modules():
            op = getattr(module, "op", None)
            if op is None:
                continue
            if not isinstance(getattr(op, "__self__", None), Kernels):
                raise Unrecordable(f"{name} runs {getattr(op, '__qualname__', op)}, which is no native kernel")
            old.append((module, op))
            module.op = getattr(recorder, op.__name__)
        yield
    finally:
        for module, op in old:
            module.op = op


class Recording:
    """A program and what it works on. `outputs` are tensors over its buffers, written by `run`."""

    def __init__(self, recorder: Recorder, pool: Pool, outputs: Any) -> None:
        self._program = Program(recorder.tape.operations)
        self._pool = pool
        self._memory = recorder.buffers.all
        self.outputs = outputs
        self.dims = self._program.dims.n

    def __len__(self) -> int:
        return len(self._program)

    def run(self) -> None:
        """With the sizes in `dims`."""
        self._program.run(self._pool)


def record(model: nn.Module, pool: Pool, sizes: Mapping[int, int], forward: Callable[[Recorder], Any]) -> Recording:
    """Run `forward`, which calls `model`, without computing. Raises `Unrecordable`."""
    recorder = Recorder(pool, sizes)
    with _swapped(model, recorder), torch.inference_mode(), _ViewsOnly(recorder):
        outputs = forward(recorder)
    return Recording(recorder, pool, outputs)
