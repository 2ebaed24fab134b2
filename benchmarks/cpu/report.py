"""From timings to a verdict: figures of a round, medians, ratios, targets, bounds, tables.

    python -m benchmarks.cpu.report .bench/cpu.json          the tables of what was measured

Owns: what is reported of each workload, what is aimed at, and the arithmetic of it. Runs nothing.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from benchmarks.cpu.catalog import PEERS, QUIRE
from benchmarks.cpu.models import SHAPES, Shape
from benchmarks.cpu.results import Cell, Results
from benchmarks.cpu.workloads import Request, Timing, build, computed_tokens

BITS = {"bf16": 16, "int8": 8, "int4": 4}


@dataclass(frozen=True, slots=True)
class Metric:
    """The figure by which a workload is judged."""

    name: str
    unit: str
    lower: bool = True

    def ratio(self, ours: float, theirs: float) -> float:
        """How many times better ours is."""
        return theirs / ours if self.lower else ours / theirs


METRICS = {
    "C1": Metric("ms_per_token", "ms per token"),
    "C2": Metric("output_tokens_per_s", "output tokens/s", lower=False),
    "C3": Metric("wall_s", "s"),
    "C4": Metric("wall_s", "s"),
    "C5": Metric("first_token_s", "s"),
    "memory": Metric("peak_mib", "MiB"),
}


@dataclass(frozen=True, slots=True)
class Target:
    """How many times better than the best peer (or than `peer`) of the same run quire is to be. `value`: what that is
    on the machine that the target was set on (2 cores, AVX-512 BF16, 80 GB/s)."""

    ratio: float
    value: float | None = None
    peer: str | None = None


TARGETS: dict[tuple[str, str, str], Target] = {
    ("m135", "bf16", "C1"): Target(6.4 / 4.9, 4.9),
    ("m135", "int8", "C1"): Target(5.5 / 3.6, 3.6),
    ("m135", "int4", "C1"): Target(3.4 / 2.8, 2.8),
    ("m1b", "bf16", "C1"): Target(36.1 / 33, 33),
    ("m1b", "int8", "C1"): Target(27.3 / 18.5, 18.5),
    ("m1b", "int4", "C1"): Target(17.9 / 13, 13),
    ("m135", "bf16", "C2"): Target(1.3),
    ("m135", "int8", "C2"): Target(1.5, peer="openvino"),
    ("m1b", "bf16", "C2"): Target(1.2),
    ("m1b", "int8", "C2"): Target(1.4, peer="openvino"),
    ("m135", "bf16", "C3"): Target(1.1),
    ("m135", "int8", "C3"): Target(1.4),
    ("m1b", "bf16", "C3"): Target(2.17 / 2.08, 2.08),
    ("m1b", "int8", "C3"): Target(1.4, peer="openvino"),
    ("m135", "bf16", "C4"): Target(1.3),
    ("m135", "bf16", "C5"): Target(2.6 / 1.3, 1.3),
    ("m135", "bf16", "memory"): Target(708 / 900, 900),
}
TRANSFORMERS_TARGET = 4.0  # C2, bf16: against the yardstick that most articles take


@dataclass(frozen=True, slots=True)
class Pair:
    """quire beside one peer, in one sitting: both figures, how many times better quire's is, what the machine would
    have allowed then, and why the figures may be doubted."""

    ours: float
    theirs: float
    ratio: float
    bound: float | None
    limit: str | None
    spread: float
    others: float
    complete: bool


@dataclass(slots=True)
class Row:
    """One line of a table: quire beside each peer in one workload (or in memory), the best peer, and the target."""

    model: str
    precision: str
    workload: str
    pairs: dict[str, Pair]
    best: str | None
    target: Target | None

    @property
    def metric(self) -> Metric:
        return METRICS[self.workload]

    @property
    def pair(self) -> Pair:
        """The pair that decides: quire and the best peer; any other where none counts."""
        return self.pairs[self.best] if self.best else next(iter(self.pairs.values()))

    @property
    def ours(self) -> float:
        """quire's figure: of the sitting that decides; of start-up the median of all sittings."""
        return statistics.median(p.ours for p in self.pairs.values()) if self.workload == "C5" else self.pair.ours

    @property
    def met(self) -> bool | None:
        """Whether quire reaches the target; None where nothing can be said."""
        if self.target is None or self.best is None:
            return None
        return self.pair.ratio >= self.target.ratio


def figures(requests: Sequence[Request], timings: Sequence[Timing]) -> dict[str, float]:
    """The figures of one round."""
    wall = max(t.last for t in timings)
    made = sum(t.count for t in timings)
    found = {
        "wall_s": wall,
        "output_tokens_per_s": made / wall,
        "total_tokens_per_s": (made + sum(len(r.prompt) for r in requests)) / wall,
        "ttft_s": statistics.fmean(t.first for t in timings),
    }
    gaps = [(t.last - t.first) / (t.count - 1) for t in timings if t.count > 1]
    if gaps:
        found["ms_per_token"] = 1000 * statistics.fmean(gaps)
    return found


def bound(
    shape: Shape, precision: str, workload: str, requests: Sequence[Request], ceilings: Mapping[str, float]
) -> tuple[float, str] | None:
    """What no engine on this machine can beat, in the workload's figure, and why: "bytes" (each step reads all weights
    once) or "operations" (of the linear layers; attention and the rest are left out). Products of 8-bit integers are
    taken as twice as fast as those of bf16, which holds for the instructions of all processors that have both. None
    for start-up."""
    if workload == "C5":
        return None
    weights = shape.block_weights + shape.embedding_weights
    reading = weights * BITS[precision] / 8 / (ceilings["read_gb_s"] * 1e9)
    if workload == "C1":
        return 1000 * reading, "bytes"
    # A request's tokens come one after the other, so that the longest output says how many steps there are at least.
    by_bytes = reading * max(r.output_tokens for r in requests)
    made = sum(r.output_tokens for r in requests)
    products = shape.block_weights * computed_tokens(list(requests)) + shape.embedding_weights * made
    by_operations = 2 * products / (ceilings["bf16_gflop_s"] * 1e9 * (1 if precision == "bf16" else 2))
    seconds, limit = max((by_bytes, "bytes"), (by_operations, "operations"))
    return (made / seconds if workload == "C2" else seconds), limit


def rows(results: Results) -> list[Row]:
    """All lines, in the order of the table; memory after C2, the load that its target was set for."""
    cells = [cell for cell in results.cells.values() if cell.measured]
    found: list[Row] = []
    for model, precision in product(SHAPES, BITS):
        for workload in METRICS:
            source = "C2" if workload == "memory" else workload
            chosen = [c for c in cells if (c.model, c.precision, c.workload) == (model, precision, source)]
            if pairs := {c.peer: judged for c in ordered(chosen) if (judged := pair(c, workload))}:
                found.append(row(model, precision, workload, pairs))
    return found


def ordered(cells: Sequence[Cell]) -> list[Cell]:
    """As the peers are in their table."""
    return sorted(cells, key=lambda cell: list(PEERS).index(cell.peer))


def pair(cell: Cell, workload: str) -> Pair | None:
    """What a cell says of its workload, or of memory, if it does."""
    metric = METRICS[workload]
    if workload == "memory":
        if not cell.memory:
            return None
        ours, theirs = cell.memory[QUIRE].peak, cell.memory[cell.peer].peak
        return Pair(ours, theirs, metric.ratio(ours, theirs), None, None, 0.0, 0.0, cell.complete)
    ours, theirs = cell.median(QUIRE, metric.name), cell.median(cell.peer, metric.name)
    requests = build(workload, cell.model, 0)
    shape = SHAPES[cell.model]
    least = bound(shape, cell.precision, workload, requests, cell.ceilings) if cell.ceilings else None
    return Pair(
        ours,
        theirs,
        metric.ratio(ours, theirs),
        *(least or (None, None)),
        max(cell.spread(name, metric.name) for name in cell.rounds),
        max(found["others_cores"] for name in cell.rounds for found in cell.chosen(name)),
        cell.complete,
    )


def row(model: str, precision: str, workload: str, pairs: dict[str, Pair]) -> Row:
    """The line of one workload: the best peer is the one that quire is least ahead of."""
    target = TARGETS.get((model, precision, workload))
    rivals = {name: pair.ratio for name, pair in pairs.items()}
    if workload == "C5":
        rivals = {name: ratio for name, ratio in rivals.items() if PEERS[name].rival}
    if target is not None and target.peer is not None:
        rivals = {name: ratio for name, ratio in rivals.items() if name == target.peer}
    return Row(model, precision, workload, pairs, min(rivals, key=rivals.__getitem__, default=None), target)


def text(results: Results) -> str:
    """The whole report, in Markdown."""
    found = rows(results)
    lines = [table(found), "", *transformers_ratio(found)]
    limits = [cell.ceilings for cell in results.cells.values() if cell.ceilings]
    if limits:
        reads, products = ([limit[name] for limit in limits] for name in ("read_gb_s", "bf16_gflop_s"))
        lines.append(
            f"\n* best peer; ~ not complete. Read at {min(reads):.1f} to {max(reads):.1f} GB/s, "
            f"bf16 products at {min(products):.0f} to {max(products):.0f} GFLOP/s."
        )
    lines += [f"left out: {what}: {why}" for what, why in results.left_out.items()]
    return "\n".join(lines)


def table(rows: Sequence[Row]) -> str:
    """Markdown, a table for each model and precision."""
    blocks: list[str] = []
    for key in dict.fromkeys((r.model, r.precision) for r in rows):
        group = [r for r in rows if (r.model, r.precision) == key]
        names = [name for name in PEERS if any(name in r.pairs for r in group)]
        labels = [PEERS[name].label(key[1]) for name in names]
        heads = ["", "quire", *labels, "quire / best", "target", "bound", "spread, others"]
        lines = [f"## {key[0]}, {key[1]}", "", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        lines += ["| " + " | ".join(_cells(r, names)) + " |" for r in group]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def transformers_ratio(rows: Sequence[Row]) -> list[str]:
    """The lines about the articles' yardstick."""
    return [
        f"C2 {r.model}: {r.pairs['transformers'].ratio:.2f}x of Transformers (target {TRANSFORMERS_TARGET:.0f}x)"
        for r in rows
        if r.workload == "C2" and r.precision == "bf16" and "transformers" in r.pairs
    ]


def _cells(r: Row, names: Sequence[str]) -> list[str]:
    values = [_peer(r, name) if name in r.pairs else "" for name in names]
    decisive = r.pair
    ratio = "" if r.best is None else f"{decisive.ratio:.2f}x"
    limits = ""
    if decisive.bound is not None:
        part = 1 / r.metric.ratio(decisive.bound, decisive.ours)
        limits = f"{number(decisive.bound)} ({decisive.limit}): {part:.0%} reached"
    noise = "" if r.workload == "memory" else f"{decisive.spread:.0%}, {decisive.others:.1f}"
    return [f"{r.workload}, {r.metric.unit}", number(r.ours), *values, ratio, _target(r), limits, noise]


def _peer(r: Row, name: str) -> str:
    """A peer's figure, and how many times better quire's of the same sitting was."""
    found = r.pairs[name]
    marks = ("" if found.complete else " ~") + (" *" if name == r.best else "")
    return f"{number(found.theirs)} ({found.ratio:.2f}x){marks}"


def _target(r: Row) -> str:
    if r.target is None:
        return ""
    value = "" if r.target.value is None else f" ({number(r.target.value)})"
    verdict = {None: "", True: ": met", False: ": missed"}[r.met]
    return f"{r.target.ratio:.2f}x{value}{verdict}"


def number(value: float) -> str:
    """Three digits or so."""
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


if __name__ == "__main__":
    print(text(Results.read(Path(sys.argv[1]))))
