"""What was measured, in a JSON file that is written after every round: an interrupted run leaves its figures, and the
next one goes on from them.

Owns: the file, and which of its cells are done. A cell is quire beside one peer in one workload: the two took turns in
one sitting, with the machine's ceilings measured right before and after, so that only figures of one cell are compared.
Knows no process and no arithmetic beyond medians.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cpu.catalog import QUIRE
from benchmarks.cpu.driver import QUIET_CORES, Memory

Key = tuple[str, str, str, str]


@dataclass(slots=True)
class Cell:
    """`rounds`: for each engine, a dict of figures a round. `wanted`: undisturbed rounds that each engine is to have.
    `seconds`: what all of it takes, the start of the engines included; an estimate where the cell was cut short."""

    model: str
    precision: str
    workload: str
    peer: str
    wanted: dict[str, int]
    rounds: dict[str, list[dict[str, float]]]
    time: str = ""
    seconds: float = 0.0
    ceilings: dict[str, float] = field(default_factory=dict[str, float])
    memory: dict[str, Memory] = field(default_factory=dict[str, Memory])
    settings: dict[str, Any] = field(default_factory=dict[str, Any])

    @classmethod
    def new(cls, key: Key, rounds: int, time: str) -> Cell:
        engines = (QUIRE, key[3])
        return cls(*key, dict.fromkeys(engines, rounds), {name: [] for name in engines}, time)

    @property
    def key(self) -> Key:
        return self.model, self.precision, self.workload, self.peer

    def clean(self, name: str) -> list[dict[str, float]]:
        """The rounds of an engine in which others left the machine alone."""
        return [found for found in self.rounds[name] if found["others_cores"] <= QUIET_CORES]

    @property
    def complete(self) -> bool:
        return bool(self.ceilings) and all(len(self.clean(name)) >= n for name, n in self.wanted.items())

    @property
    def measured(self) -> bool:
        """Whether there is a figure of each engine."""
        return all(self.rounds.values())

    @property
    def worth(self) -> tuple[bool, int, int]:
        """Of two attempts at a cell, the one with more is kept."""
        return (
            self.complete,
            min(len(self.clean(name)) for name in self.rounds),
            min(len(found) for found in self.rounds.values()),
        )

    def chosen(self, name: str) -> list[dict[str, float]]:
        """The rounds that count: the undisturbed ones, or all where there is none."""
        return self.clean(name) or self.rounds[name]

    def median(self, name: str, figure: str) -> float:
        """Of one figure of an engine."""
        return statistics.median(found[figure] for found in self.chosen(name))

    def spread(self, name: str, figure: str) -> float:
        """(largest - smallest) / median."""
        values = [found[figure] for found in self.chosen(name)]
        return (max(values) - min(values)) / statistics.median(values)


class Results:
    """The cells of one quire on one machine."""

    def __init__(self, path: Path, circumstances: Mapping[str, Any]) -> None:
        self.path, self.circumstances = path, dict(circumstances)
        self.cells: dict[Key, Cell] = {}
        self.left_out: dict[str, str] = {}

    @classmethod
    def read(cls, path: Path) -> Results:
        """A file as it is."""
        document = json.loads(path.read_text())
        results = cls(path, document["circumstances"])
        for found in document["cells"]:
            memory = {name: Memory(**values) for name, values in found.pop("memory").items()}
            cell = Cell(**found, memory=memory)
            results.cells[cell.key] = cell
        results.left_out = document["left_out"]
        return results

    @classmethod
    def resume(cls, path: Path, circumstances: Mapping[str, Any]) -> Results:
        """A file to go on with, or a new one. ValueError where its figures are of other circumstances."""
        if not path.exists():
            return cls(path, circumstances)
        results = cls.read(path)
        other = [name for name, value in circumstances.items() if results.circumstances.get(name) != value]
        if other:
            raise ValueError(f"{path} was measured with another {', '.join(other)}: delete it or name another --json")
        return results

    def complete(self, key: Key) -> bool:
        return key in self.cells and self.cells[key].complete

    def put(self, cell: Cell) -> None:
        """Keep a cell, unless an earlier attempt at it brought more, and write the file."""
        old = self.cells.get(cell.key)
        if old is None or cell.worth >= old.worth:
            self.cells[cell.key] = cell
        else:
            old.seconds = cell.seconds or old.seconds
        self.save()

    def save(self) -> None:
        """Write the file; what is there is always whole."""
        document = {
            "circumstances": self.circumstances,
            "cells": [asdict(cell) for cell in self.cells.values()],
            "left_out": self.left_out,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(document, indent=1) + "\n")
        part.replace(self.path)


def digest(package: Path) -> str:
    """Names one state of a package: its Python files and native libraries."""
    found = hashlib.sha256()
    for path in sorted(p for p in package.rglob("*") if p.suffix in (".py", ".so")):
        found.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return found.hexdigest()[:12]
