"""Weight slots: a parameter knows which checkpoint tensors fill it, and where.

Owns: `Part`, `Slot` and `SlotModule`, the base of every module with weights of its own. Knows no files and no
devices: the loader asks for the parts by name and hands over tensors one at a time, each copied straight into place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

NORMAL, NORM = "normal", "norm"


@dataclass(frozen=True)
class Part:
    """One checkpoint tensor, or a slice of one, and the place that it fills.

    `source`: its name, relative to the path of the module that owns the slot: "weight" is the module's own tensor,
    "../q_proj.weight" belongs to a sibling named q_proj. `shape` is the whole tensor's shape in the checkpoint.
    `take` is what is read of it (a slice for each dimension; None: all), then transposed where `transposed` is set
    (GPT-2 stores (in, out)). It lands in rows `start .. start + size` of the parameter's first dimension; size -1:
    everything. A shard pass narrows `take` and moves `start`.
    """

    source: str
    shape: tuple[int, ...]
    start: int = 0
    size: int = -1
    take: tuple[slice, ...] | None = None
    transposed: bool = False

    def name(self, path: str) -> str:
        """The tensor's full checkpoint name, for a slot of the module at `path`."""
        source, parents = self.source, path.split(".") if path else []
        while source.startswith("../"):
            source, parents = source[3:], parents[:-1]
        return ".".join([*parents, source])

    def rows(self) -> slice | None:
        """The rows of the tensor that are taken as they are; None where it is transposed or cut otherwise."""
        if self.transposed or not self.shape:
            return None
        first, *rest = self.take or (slice(None),)
        begin, end, step = first.indices(self.shape[0])
        return slice(begin, end) if step == 1 and all(cut == slice(None) for cut in rest) else None

    def fill(self, parameter: Tensor, tensor: Tensor) -> None:
        """Copies `tensor` (the whole one, of `shape`) into `parameter`, with a cast and a move where they differ."""
        if self.take is not None:
            tensor = tensor[self.take]
        if self.transposed:
            tensor = tensor.t()
        place = parameter if self.size < 0 else parameter.narrow(0, self.start, self.size)
        place.copy_(tensor)


@dataclass
class Slot:
    """How one parameter is filled. `init` says what random numbers suit it when there is no checkpoint: `NORMAL`
    (around 0) or `NORM` (around 1). `mapped`: the parameter is the file's own bytes, and needs no filling."""

    parts: list[Part]
    init: str = NORMAL
    mapped: bool = False


class SlotModule(nn.Module):
    """A module with weights of its own. `split` says how a shard pass may cut it: "heads" (rows, in whole heads),
    "columns" (rows of the weight: output features), "rows" (columns of the weight: input features, outputs summed),
    "vocab" (rows, in token ids), "experts" (rows, in whole experts), None (kept whole)."""

    def __init__(self, split: str | None = None) -> None:
        super().__init__()
        self.slots: dict[str, Slot] = {}
        self.split = split

    def no_slot(self, name: str) -> None:
        """Declares that the optional parameter `name` is absent (None)."""
        self.register_parameter(name, None)

    def add_slot(self, name: str, shape: Sequence[int], parts: list[Part] | None = None, init: str = NORMAL) -> None:
        """Declares the parameter `name` on the meta device; `parts` default to the tensor of the same name."""
        parameter = nn.Parameter(torch.empty(tuple(shape), device="meta"), requires_grad=False)
        self.register_parameter(name, parameter)
        self.slots[name] = Slot(parts or [Part(name, tuple(shape))], init)


def walk_slots(model: nn.Module) -> Iterator[tuple[str, SlotModule, str, Slot]]:
    """(path, module, parameter name, slot) of each slot of `model`, each once."""
    for path, module in model.named_modules():
        if isinstance(module, SlotModule):
            for name, slot in module.slots.items():
                yield path, module, name, slot
