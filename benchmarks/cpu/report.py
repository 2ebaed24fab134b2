"""From timings to a verdict: figures of a round, medians, ratios, targets, bounds, tables.

Owns: what is reported of each workload, what is aimed at, and the arithmetic of it. Runs nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.cpu.catalog import PEERS, QUIRE
from benchmarks.cpu.driver import Memory
from benchmarks.cpu.models import Shape
from benchmarks.cpu.workloads import Request, Timing, computed_tokens

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


@dataclass(slots=True)
class Result:
    """One engine on one workload: a dict of figures a round, and what was seen of memory."""

    peer: str
    rounds: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    memory: Memory | None = None

    def median(self, name: str) -> float:
        """Of one figure over the rounds."""
        return statistics.median(found[name] for found in self.rounds)

    def spread(self, name: str) -> float:
        """(largest - smallest) / median."""
        values = [found[name] for found in self.rounds]
        return (max(values) - min(values)) / self.median(name)


@dataclass(slots=True)
class Row:
    """One line of a table: what all engines reached in one workload (or in memory), best peer, target and bound."""

    model: str
    precision: str
    workload: str
    metric: Metric
    values: dict[str, float]
    best: str | None
    ratio: float | None
    target: Target | None
    bound: float | None = None
    limit: str | None = None
    spread: float = 0.0
    others: float = 0.0

    @property
    def met(self) -> bool | None:
        """Whether quire reaches the target; None where nothing can be said."""
        if self.target is None or self.ratio is None:
            return None
        return self.ratio >= self.target.ratio


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
    once) or "operations" (of the linear layers, bf16 only: attention and the rest are left out). None for start-up."""
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
    by_operations = 2 * products / (ceilings["bf16_gflop_s"] * 1e9) if precision == "bf16" else 0.0
    seconds, limit = max((by_bytes, "bytes"), (by_operations, "operations"))
    return (made / seconds if workload == "C2" else seconds), limit


def row(model: str, precision: str, workload: str, results: Sequence[Result]) -> Row:
    """The line of one workload, still without its bound."""
    metric = METRICS[workload]
    values = {r.peer: r.median(metric.name) for r in results if r.rounds}
    noise = [found.get("others_cores", 0.0) for r in results for found in r.rounds]
    spread = max((r.spread(metric.name) for r in results if r.rounds), default=0.0)
    return _judged(model, precision, workload, values, spread, max(noise, default=0.0))


def memory_row(model: str, precision: str, results: Sequence[Result]) -> Row:
    """The line of memory: peaks since the start of each process."""
    values = {r.peer: r.memory.peak for r in results if r.memory}
    return _judged(model, precision, "memory", values, 0.0, 0.0)


def _judged(model: str, precision: str, workload: str, values: dict[str, float], spread: float, others: float) -> Row:
    metric, target = METRICS[workload], TARGETS.get((model, precision, workload))
    rivals = {name: value for name, value in values.items() if name != QUIRE}
    if workload == "C5":
        rivals = {name: value for name, value in rivals.items() if PEERS[name].rival}
    if target is not None and target.peer is not None:
        rivals = {name: value for name, value in rivals.items() if name == target.peer}
    best = (min if metric.lower else max)(rivals, key=rivals.__getitem__, default=None)
    ours = values.get(QUIRE)
    ratio = None if best is None or ours is None else metric.ratio(ours, rivals[best])
    return Row(model, precision, workload, metric, values, best, ratio, target, spread=spread, others=others)


def table(rows: Sequence[Row]) -> str:
    """Markdown, a table for each model and precision."""
    blocks: list[str] = []
    for key in dict.fromkeys((r.model, r.precision) for r in rows):
        group = [r for r in rows if (r.model, r.precision) == key]
        names = [name for name in PEERS if any(name in r.values for r in group)]
        heads = [
            "",
            *(PEERS[name].label(key[1]) for name in names),
            "quire / best",
            "target",
            "bound",
            "spread, others",
        ]
        lines = [f"## {key[0]}, {key[1]}", "", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        lines += ["| " + " | ".join(_cells(r, names)) + " |" for r in group]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def transformers_ratio(rows: Sequence[Row]) -> list[str]:
    """The lines about the articles' yardstick."""
    found: list[str] = []
    for r in rows:
        if r.workload == "C2" and r.precision == "bf16" and {QUIRE, "transformers"} <= r.values.keys():
            ratio = r.metric.ratio(r.values[QUIRE], r.values["transformers"])
            found.append(f"C2 {r.model}: {ratio:.2f}x of Transformers (target {TRANSFORMERS_TARGET:.0f}x)")
    return found


def as_json(r: Row) -> dict[str, Any]:
    """A row for the file."""
    return {**asdict(r), "met": r.met}


def _cells(r: Row, names: Sequence[str]) -> list[str]:
    values = [f"{number(r.values[name])}{' *' * (name == r.best)}" if name in r.values else "" for name in names]
    ratio = "" if r.ratio is None else f"{r.ratio:.2f}x"
    limits = "" if r.bound is None else f"{number(r.bound)} ({r.limit})"
    noise = "" if r.workload == "memory" else f"{r.spread:.0%}, {r.others:.1f}"
    return [f"{r.workload}, {r.metric.unit}", *values, ratio, _target(r), limits, noise]


def _target(r: Row) -> str:
    if r.target is None:
        return ""
    value = "" if r.target.value is None else f" ({number(r.target.value)})"
    verdict = {None: "", True: ": met", False: ": missed"}[r.met]
    return f"{r.target.ratio:.2f}x{value}{verdict}"


def number(value: float) -> str:
    """Three digits or so."""
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"
