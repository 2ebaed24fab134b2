"""Checkpoint tensors into weight slots, a few at a time.

Owns: how files are read, the names that may be missing or left over, and the errors that name what is wrong. Knows no
architecture: the slots say what they want.
"""

from __future__ import annotations

import pickle
import re
import zlib
from collections.abc import Callable, Container, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import BoundedSemaphore
from types import TracebackType
from typing import Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from quire.config.files import LISTED, checkpoint_files, damaged
from quire.layers.linear import LMHead
from quire.layers.slots import NORM, Part, Slot, walk_slots
from quire.types.errors import ClientError

# Tensors that checkpoints carry although they are computed: rotary frequencies, GPT-2's causal masks, OPT's version.
HARMLESS = re.compile(r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|attn\.(masked_)?bias|decoder\.version)$")
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

READERS = 4  # threads that copy tensors out of files

Reader = Callable[[], Tensor]


@dataclass
class _Want:
    """A part that waits for its tensor."""

    parameter: Tensor
    part: Part
    slot: Slot
    filled: bool = False


@runtime_checkable
class Translates(Protocol):
    """A model whose checkpoints may name, split or join tensors otherwise than its parameters."""

    def rename(self, name: str) -> str | None:
        """The parameter that the checkpoint's tensor is as it stands; None where it is not."""
        ...

    def translate(self, tensors: Iterator[tuple[str, Reader]]) -> Iterator[tuple[str, Reader]]: ...


def load_weights(model: nn.Module, folder: Path, load_format: str, seed: int = 0) -> None:
    """Fills every slot of `model` (materialised) that is not mapped from the checkpoint in `folder`.

    `load_format`: "auto" (safetensors, else .bin), "safetensors", "pt", "dummy" (small random numbers from `seed`, one
    generator for each tensor name). Tensors are cast to the parameter's dtype. Raises `ClientError` for missing,
    unexpected, misshapen or quantized tensors and for files that cannot be read.
    """
    wants: dict[str, list[_Want]] = {}
    for path, module, name, slot in walk_slots(model):
        for part in slot.parts:
            want = _Want(module.get_parameter(name), part, slot, slot.mapped)
            wants.setdefault(part.name(path), []).append(want)
    if load_format == "dummy":
        tensors = _dummy_tensors(wants, seed)
    else:
        files = checkpoint_files(folder, load_format)
        tensors = (pair for file in files for pair in _file_tensors(file))
        if isinstance(model, Translates):
            tensors = model.translate(tensors)
    prefix = getattr(model, "prefix", "")
    tied = {f"{path}.weight": module for path, module in model.named_modules() if _is_tied(module)}
    heads: dict[str, Tensor] = {}
    unexpected: list[str] = []
    unused: tuple[str, ...] = getattr(model, "unused", ())  # beginnings of names that this model has no use for
    with _Copies(READERS) as copies:
        for name, read in tensors:
            known = known_name(name, prefix, wants)
            if known is not None:
                _fill(name, read, wants[known], copies)
            elif name in tied:
                heads[name] = read()
            elif not HARMLESS.search(name) and not name.startswith(unused):
                unexpected.append(name)
    for name, tensor in heads.items():
        _settle_tied(name, tensor, tied[name], wants)
    missing = [name for name, waiting in wants.items() if not all(want.filled for want in waiting)]
    _complain(folder, missing, unexpected)


def wanted_tensors(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The checkpoint tensors that the slots of `model` ask for, with their shapes."""
    return {part.name(path): part.shape for path, _, _, slot in walk_slots(model) for part in slot.parts}


def check_names(model: nn.Module, folder: Path, stored: Mapping[str, tuple[int, ...]]) -> None:
    """What `load_weights` would say of names and shapes, of a checkpoint of which only these are known. Raises
    `ClientError`."""
    wanted, prefix = wanted_tensors(model), getattr(model, "prefix", "")
    tied = {f"{path}.weight": module for path, module in model.named_modules() if _is_tied(module)}
    missing, unexpected = dict(wanted), list[str]()
    for name, shape in stored.items():
        known = known_name(name, prefix, wanted)
        if known is not None:
            missing.pop(known, None)
            _check_shape(name, shape, wanted[known])
        elif name in tied:  # it fills the table where that is missing
            for path, module, own, slot in walk_slots(model):
                if getattr(module, own) is tied[name].weight:
                    missing.pop(slot.parts[0].name(path), None)
        elif not HARMLESS.search(name) and not name.startswith(getattr(model, "unused", ())):
            unexpected.append(name)
    _complain(folder, list(missing), unexpected)


def _check_shape(name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if shape != wanted:
        raise ClientError(
            f"tensor {name} has shape {shape} but config.json asks for {wanted}: the configuration and the weights do "
            "not belong together",
            "model",
        )


def known_name(name: str, prefix: str, wanted: Container[str]) -> str | None:
    """`name` as the slots call it: checkpoints of a bare body leave the prefix away, and some heads add one."""
    for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        if candidate in wanted:
            return candidate
    return None


class _Copies:
    """Tensors on their way into place, in several threads: what takes time is that the pages of a mapped file are read,
    converted and sent to the device. Names, shapes and types were checked before, one after the other, so that errors
    come in the order of the files. A tensor is let go when it is copied, and few wait, so little memory is needed."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, "quire-load")
        self._room = BoundedSemaphore(2 * threads)
        self._futures: list[Future[None]] = []

    def __call__(self, want: _Want, tensor: Tensor) -> None:
        self._room.acquire()
        self._futures.append(self._pool.submit(self._copy, want, tensor))

    def __enter__(self) -> _Copies:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=e is not None)
        if e is None:
            for future in self._futures:
                future.result()

    def _copy(self, want: _Want, tensor: Tensor) -> None:
        try:
            want.part.fill(want.parameter, tensor)
        finally:
            self._room.release()


def _at_once(want: _Want, tensor: Tensor) -> None:
    want.part.fill(want.parameter, tensor)


def _fill(name: str, read: Reader, waiting: list[_Want], copy: Callable[[_Want, Tensor], None] = _at_once) -> None:
    if all(want.filled for want in waiting):
        return
    tensor = read()
    if tensor.dtype not in FLOATS:
        raise ClientError(
            f"tensor {name} is stored as {str(tensor.dtype).removeprefix('torch.')}: this checkpoint is quantized; use "
            "the float checkpoint it was made from",
            "model",
        )
    for want in waiting:
        _check_shape(name, tuple(tensor.shape), want.part.shape)
        if not want.filled:
            copy(want, tensor)
            want.filled = True


def _is_tied(module: nn.Module) -> bool:
    return isinstance(module, LMHead) and module.tied


def _settle_tied(name: str, tensor: Tensor, head: nn.Module, wants: dict[str, list[_Want]]) -> None:
    """A tied head that the checkpoint holds all the same: it fills the table where that is missing, and where the two
    differ the file is believed rather than config.json, as Transformers does."""
    assert isinstance(head, LMHead)
    (table,) = [want for waiting in wants.values() for want in waiting if want.parameter is head.weight]
    if not table.filled:
        _fill(name, lambda: tensor, [table])
    elif tensor.shape == table.parameter.shape and torch.equal(tensor.to(table.parameter), table.parameter):
        return
    else:
        head.untie()
        assert isinstance(head.weight, Tensor), "weights are loaded before they are quantized"
        _fill(name, lambda: tensor, [_Want(head.weight, Part("weight", table.part.shape), table.slot)])


def _complain(folder: Path, missing: list[str], unexpected: list[str]) -> None:
    complaints: list[str] = []
    for kind, names in (("lacks", missing), ("has unexpected", unexpected)):
        if names:
            more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
            complaints.append(f"{kind} {', '.join(sorted(names)[:LISTED])}{more}")
    if complaints:
        raise ClientError(
            f"the checkpoint in {folder} {'; it '.join(complaints)}: config.json and the weights do not belong "
            "together, or a file is missing",
            "model",
            str(folder),
        )


def _file_tensors(path: Path) -> Iterator[tuple[str, Reader]]:
    if path.suffix == ".safetensors":
        yield from _safetensors(path)
    else:
        yield from ((name, lambda tensor=tensor: tensor) for name, tensor in _pickled(path).items())


def _safetensors(path: Path) -> Iterator[tuple[str, Reader]]:
    """Names first, bytes when asked for: the file is mapped, so that a slice reads only its pages."""
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                yield name, lambda name=name: file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from error


def _pickled(path: Path) -> dict[str, Tensor]:
    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files written before torch 1.6 cannot be mapped
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError) as error:
        raise damaged(path, error) from error
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise damaged(path, "it does not hold a dict of tensors")
    return loaded


def _dummy_tensors(wants: dict[str, list[_Want]], seed: int) -> Iterator[tuple[str, Reader]]:
    for name, waiting in wants.items():
        yield name, lambda name=name, want=waiting[0]: _dummy(name, want, seed)


def _dummy(name: str, want: _Want, seed: int) -> Tensor:
    """The whole tensor, made where it will live; a shard of it is then taken as from a file."""
    device = want.parameter.device
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()) ^ (seed & 0xFFFFFFFF))
    tensor = torch.randn(want.part.shape, generator=generator, device=device).mul_(0.02)
    return tensor.add_(1.0) if want.slot.init == NORM else tensor
