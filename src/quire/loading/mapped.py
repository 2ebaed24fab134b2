"""Parameters that are the checkpoint's own bytes: mapped from the file, neither read nor copied.

Owns: which parameters a safetensors file holds as they are, and the mappings. Those whose dtype, shape or order differ
are left to `weights.py`. Nobody writes to a parameter after loading; were it done all the same, a page would be copied
(the mapping is private), the file stay as it is. A file may be closed, renamed or deleted while it is mapped; writing
into it in place changes the weights of whoever runs from it.
"""

from __future__ import annotations

import json
import mmap
import sys
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quire.config.files import LARGEST_HEADER, checkpoint_files
from quire.layers.slots import Part, walk_slots
from quire.loading.weights import Translates, known_name

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor of a file: bytes `start .. end` of the mapping."""

    mapping: mmap.mmap
    start: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def map_parameters(model: nn.Module, folder: Path, load_format: str, dtype: torch.dtype) -> dict[int, Tensor]:
    """Tensors over mapped files, by the id of the parameter (on the meta device) whose place they can take; the slots
    are marked as mapped. Parameters that consist of several tensors are among them where these lie side by side in
    the file, as gate_proj and up_proj mostly do."""
    if load_format not in ("auto", "safetensors") or sys.byteorder != "little":
        return {}
    files = [path for path in checkpoint_files(folder, load_format) if path.suffix == ".safetensors"]
    names = {part.name(path) for path, _, _, slot in walk_slots(model) for part in slot.parts}
    stored: dict[str, _Stored] = {}
    prefix = getattr(model, "prefix", "")
    for file in files:
        for name, tensor in _index(file):
            if isinstance(model, Translates) and (name := model.rename(name) or "") == "":
                continue
            known = known_name(name, prefix, names)
            if known is not None and known not in stored:
                stored[known] = tensor
    mapped: dict[int, Tensor] = {}
    for path, module, name, slot in walk_slots(model):
        parameter = module.get_parameter(name)
        pieces = [(part, stored.get(part.name(path))) for part in slot.parts]
        found = _run(pieces, tuple(parameter.shape), dtype)
        if found is not None:
            mapped[id(parameter)] = _tensor(found, dtype, tuple(parameter.shape))
            slot.mapped = True
    return mapped


def mapped_bytes(model: nn.Module) -> int:
    """Bytes of the parameters that are mapped still; those that were quantized have been let go."""
    sizes: dict[int, int] = {}
    for _, module, name, slot in walk_slots(model):
        parameter = attrgetter(name)(module)
        if slot.mapped and isinstance(parameter, nn.Parameter):
            sizes[id(parameter)] = parameter.nbytes
    return sum(sizes.values())


def _run(
    pieces: Iterable[tuple[Part, _Stored | None]], shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[mmap.mmap, int, int] | None:
    """The bytes that all pieces make up together, if they are `shape` as it is."""
    run: tuple[mmap.mmap, int, int] | None = None
    for part, stored in sorted(pieces, key=lambda piece: piece[0].start):
        rows = part.rows()
        if stored is None or rows is None or stored.shape != part.shape or stored.dtype != dtype:
            return None
        row = dtype.itemsize * prod(shape[1:])
        begin, end = stored.start + rows.start * row, stored.start + rows.stop * row
        if run is None:
            run = (stored.mapping, begin, end)
        elif run[0] is stored.mapping and run[2] == begin:
            run = (run[0], run[1], end)
        else:
            return None
    whole = run is not None and run[2] - run[1] == dtype.itemsize * prod(shape) and run[1] % dtype.itemsize == 0
    return run if whole else None


def _tensor(run: tuple[mmap.mmap, int, int], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    mapping, begin, end = run
    array = np.frombuffer(mapping, np.uint8, end - begin, begin)
    # A weight that is packed or quantized is let go; its pages are then given back, not only with the whole file's.
    weakref.finalize(array, _forget, mapping, begin, end).atexit = False
    return torch.from_numpy(array).view(dtype).view(shape)


def _forget(mapping: mmap.mmap, begin: int, end: int) -> None:
    first, last = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if first < last and hasattr(mapping, "madvise"):
        mapping.madvise(mmap.MADV_DONTNEED, first, last - first)


def _index(path: Path) -> list[tuple[str, _Stored]]:
    """The tensors of a file by its header: a length in 8 bytes, then JSON. None of them where something is not as
    it should be: who reads the file tensor by tensor finds out what is wrong, and says so."""
    try:
        with path.open("rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        length = int.from_bytes(mapping[:8], "little")
        if length > min(LARGEST_HEADER, len(mapping) - 8):
            return []
        header: Mapping[str, Any] = json.loads(mapping[8 : 8 + length])
        return [
            (name, _stored(mapping, 8 + length, entry))
            for name, entry in header.items()
            if name != "__metadata__" and entry["dtype"] in DTYPES
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


def _stored(mapping: mmap.mmap, base: int, entry: Mapping[str, Any]) -> _Stored:
    """The tensor of an entry of a header, its data behind `base`. Raises `ValueError` for one that cannot be."""
    begin, end = entry["data_offsets"]
    shape, dtype = tuple(entry["shape"]), DTYPES[entry["dtype"]]
    if any(type(number) is not int or number < 0 for number in (begin, end, *shape)):
        raise ValueError("a place or a size is no whole number")
    if base + end > len(mapping) or end - begin != dtype.itemsize * prod(shape):
        raise ValueError("the place does not fit the file or the shape")
    return _Stored(mapping, base + begin, base + end, dtype, shape)
