"""The weight files of a checkpoint: which they are, and what tensors they hold by their headers.

Owns: the rule which files count, the reading of safetensors headers without their tensors, and the words for files that
are damaged. Knows no torch, and nothing of what tensors mean.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from quire.types.errors import ClientError

LARGEST_HEADER = 100_000_000  # bytes; the format's own bound
LISTED = 5
BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a checkpoint; `dtype` as safetensors writes it ("BF16")."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return prod(self.shape)


def checkpoint_files(folder: Path, load_format: str = "auto") -> list[Path]:
    """The weight files of `folder` in a fixed order: those that an index names, else all of one kind. Raises
    `ClientError`."""
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
        raise damaged(index, error) from error
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


def headers(files: Iterable[Path]) -> list[Stored]:
    """The tensors of safetensors files; their data is not read. Raises `ClientError` for a damaged file."""
    found: list[Stored] = []
    for path in files:
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length > LARGEST_HEADER:
                    raise ValueError("its header is too long")
                entries: dict[str, Any] = json.loads(file.read(length))
            for name, entry in entries.items():
                if name != "__metadata__":
                    found.append(Stored(name, str(entry["dtype"]), tuple(int(n) for n in entry["shape"])))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise damaged(path, error) from error
    return found


def damaged(path: Path, error: object) -> ClientError:
    """The error for a file that cannot be read."""
    first = next(iter(str(error).splitlines()), "") or type(error).__name__
    return ClientError(
        f"{path} cannot be read ({first}): the file is damaged or incomplete; download or copy it again",
        "model",
        str(path),
    )
