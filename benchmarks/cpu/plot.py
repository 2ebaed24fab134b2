"""The picture of a run: how fast each engine is beside quire, a line for each workload.

    python -m benchmarks.cpu.plot .bench/cpu.json docs/benchmark-cpu.svg

Owns: the drawing (matplotlib, of the `bench` extra). Knows rows of the report, nothing of how they came about.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cpu.catalog import PEERS
from benchmarks.cpu.report import Row, number, rows
from benchmarks.cpu.results import Results

# Told apart by colour and by form.
LOOKS = {
    "llamacpp": ("#0f766e", "o"),
    "openvino": ("#4338ca", "s"),
    "vllm": ("#b45309", "D"),
    "transformers": ("#64748b", "v"),
}
OURS, LIMIT = "#dc2626", "#0f172a"
TITLES = {"C1": "one request", "C2": "many requests", "C3": "long prompt", "C4": "shared prefix", "C5": "start"}
SIZES = {"m135": "135M", "m1b": "1B"}
UNITS = {"ms per token": "ms/token", "output tokens/s": "tokens/s"}


def draw(found: Sequence[Row], path: Path) -> None:
    """Write an SVG: on each line quire is at 1, each peer at its speed relative to quire's in the same sitting, and a
    bar at what the machine allows. Memory is left to the table."""
    import matplotlib

    matplotlib.use("svg")
    # The same rows give the same file.
    matplotlib.rcParams |= {"svg.hashsalt": "quire", "font.size": 11, "svg.fonttype": "none"}
    from matplotlib import pyplot

    found = [r for r in found if r.workload != "memory"]
    figure, axis = pyplot.subplots(figsize=(10, 1.5 + 0.36 * len(found)))
    axis.axvline(1, color=OURS, linewidth=2, zorder=1, label="quire")
    for name, (color, marker) in LOOKS.items():
        places = [(1 / r.pairs[name].ratio, y) for y, r in enumerate(found) if name in r.pairs]
        if places:
            axis.scatter(
                *zip(*places, strict=True), color=color, marker=marker, s=45, zorder=3, label=PEERS[name].title
            )
    bounds = [(y, r.pair.bound, r) for y, r in enumerate(found)]
    limits = [(1 / r.metric.ratio(r.pair.ours, bound), y) for y, bound, r in bounds if bound is not None]
    if limits:
        axis.scatter(
            *zip(*limits, strict=True), color=LIMIT, marker="|", s=160, zorder=2, label="what the machine allows"
        )
    axis.set_xscale("log")
    ticks = [t for t in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10) if axis.get_xlim()[0] <= t <= axis.get_xlim()[1]]
    axis.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    axis.set_xticks([], minor=True)
    axis.set_yticks(range(len(found)), [label(r) for r in found])
    axis.set_ylim(len(found) - 0.5, -0.5)
    axis.set_xlabel("slower than quire  \N{LEFTWARDS ARROW}  speed relative to quire  \N{RIGHTWARDS ARROW}  faster")
    axis.grid(axis="y", color="#e2e8f0", zorder=0)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="upper center", ncols=6, frameon=False, handletextpad=0.3, columnspacing=1.2)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.4 / figure.get_figheight()))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None}, facecolor="white")
    pyplot.close(figure)


def label(r: Row) -> str:
    """A line's name and quire's figure."""
    unit = UNITS.get(r.metric.unit, r.metric.unit)
    name = f"{TITLES[r.workload]}, {SIZES.get(r.model, r.model)} {r.precision}"
    return f"{name}: {number(r.ours)} {unit}"


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    draw(rows(Results.read(Path(sys.argv[1]))), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
