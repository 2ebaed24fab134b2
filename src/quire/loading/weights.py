"""Checkpoint tensors into weight slots, one at a time.

Owns: which files of a folder are read and how, the names that may be missing or left over, and the errors that name
what is wrong. Knows no architecture: the slots say what they want.
"""

from __future__ import annotations

import json
import pickle
import re
import zlib
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from quire.layers.linear import LMHead
from quire.layers.slots import NORM, Part, Slot, walk_slots
from quire.types.errors import ClientError

# Tensors that checkpoints carry although they are computed: rotary frequencies, GPT-2's causal masks, OPT's version.
HARMLESS = re.compile(r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|attn\.(masked_)?bias|decoder\.version)$")
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LISTED = 5

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
    for name, read in tensors:
        known = known_name(name, prefix, wants)
        if known is not None:
            _fill(name, read, wants[known])
        elif name in tied:
            heads[name] = read()
        elif not HARMLESS.search(name) and not name.startswith(unused):
            unexpected.append(name)
    for name, tensor in heads.items():
        _settle_tied(name, tensor, tied[name], wants)
    missing = [name for name, waiting in wants.items() if not all(want.filled for want in waiting)]
    _complain(folder, missing, unexpected)


def known_name(name: str, prefix: str, wanted: Container[str]) -> str | None:
    """`name` as the slots call it: checkpoints of a bare body leave the prefix away, and some heads add one."""
    for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        if candidate in wanted:
            return candidate
    return None


def _fill(name: str, read: Reader, waiting: list[_Want]) -> None:
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
        if tuple(tensor.shape) != want.part.shape:
            raise ClientError(
                f"tensor {name} has shape {tuple(tensor.shape)} but config.json asks for {want.part.shape}: the "
                "configuration and the weights do not belong together",
                "model",
            )
        if not want.filled:
            want.part.fill(want.parameter, tensor)
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


def checkpoint_files(folder: Path, load_format: str = "auto") -> list[Path]:
    """The weight files of `folder` in a fixed order: those that an index names, else all of one kind."""
    kinds = {"auto": ("safetensors", "bin"), "safetensors": ("safetensors",), "pt": ("bin",)}
    if load_format not in kinds:
        raise ClientError(
            f"load_format {load_format!r} is not known; there are {', '.join([*kinds, 'dummy'])}",
            "load_format",
            load_format,
        )
    for kind in kinds[load_format]:
        stem = "model.safetensors" if kind == "safetensors" else "pytorch_model.bin"
        if (index := folder / f"{stem}.index.json").exists():
            return _indexed_files(index)
        if (single := folder / stem).exists():
            return [single]
        # Mistral's own format lies beside the same weights under these names.
        found = sorted(path for path in folder.glob(f"*.{kind}") if not path.name.startswith("consolidated"))
        if found and not (kind == "bin" and found == [folder / "training_args.bin"]):
            return [path for path in found if path.name != "training_args.bin"]
    wanted = " or ".join(f"*.{kind}" for kind in kinds[load_format])
    raise ClientError(
        f"no {wanted} file in {folder}: give a folder with weights, or load_format='dummy' for random ones",
        "model",
        str(folder),
    )


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise _damaged(index, error) from error
    files = [index.parent / name for name in names]
    absent = [path.name for path in files if not path.exists()]
    if absent:
        more = f" and {len(absent) - LISTED} more" if len(absent) > LISTED else ""
        raise ClientError(
            f"{index.parent} lacks {', '.join(absent[:LISTED])}{more}, which {index.name} names: download the "
            "checkpoint again",
            "model",
            str(index.parent),
        )
    return files


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
        raise _damaged(path, error) from error


def _pickled(path: Path) -> dict[str, Tensor]:
    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files written before torch 1.6 cannot be mapped
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError) as error:
        raise _damaged(path, error) from error
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise _damaged(path, "it does not hold a dict of tensors")
    return loaded


def _damaged(path: Path, error: object) -> ClientError:
    first = next(iter(str(error).splitlines()), "") or type(error).__name__
    return ClientError(
        f"{path} cannot be read ({first}): the file is damaged or incomplete; download or copy it again",
        "model",
        str(path),
    )


def _dummy_tensors(wants: dict[str, list[_Want]], seed: int) -> Iterator[tuple[str, Reader]]:
    for name, waiting in wants.items():
        yield name, lambda name=name, want=waiting[0]: _dummy(name, want, seed)


def _dummy(name: str, want: _Want, seed: int) -> Tensor:
    """The whole tensor, made where it will live; a shard of it is then taken as from a file."""
    device = want.parameter.device
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()) ^ (seed & 0xFFFFFFFF))
    tensor = torch.randn(want.part.shape, generator=generator, device=device).mul_(0.02)
    return tensor.add_(1.0) if want.slot.init == NORM else tensor
