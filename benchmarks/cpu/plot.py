"""The picture of a run: each engine's figure and the bound, a panel for each workload.

Owns: the drawing (matplotlib, of the `bench` extra). Knows rows of the report, nothing of how they came about.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.cpu.catalog import PEERS, QUIRE
from benchmarks.cpu.report import Row, number

OURS, THEIRS, LIMIT = "#c2410c", "#94a3b8", "#0f172a"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write an SVG: bars of each row's figure, quire's in its own colour, the bound as a line."""
    import matplotlib

    matplotlib.use("svg")
    # The same rows give the same file.
    matplotlib.rcParams |= {"svg.hashsalt": "quire", "font.size": 9, "svg.fonttype": "none"}
    from matplotlib import pyplot

    columns = min(4, len(rows))
    lines = -(-len(rows) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(3.2 * columns, 2.2 * lines), squeeze=False)
    for axis in axes.flat[len(rows) :]:
        axis.axis("off")
    for axis, row in zip(axes.flat, rows, strict=False):
        names = [name for name in PEERS if name in row.values][::-1]
        values = [row.values[name] for name in names]
        bars = axis.barh(
            [PEERS[name].label(row.precision) for name in names],
            values,
            color=[OURS if name == QUIRE else THEIRS for name in names],
        )
        axis.bar_label(bars, [f" {number(value)}" for value in values])
        axis.set_xlim(0, 1.3 * max([*values, row.bound or 0.0]))
        if row.bound is not None:
            axis.axvline(row.bound, color=LIMIT, linestyle=":", linewidth=1)
        better = "lower" if row.metric.lower else "higher"
        axis.set_title(
            f"{row.workload} {row.model} {row.precision}, {row.metric.unit}\n({better} is better)", fontsize=9
        )
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xticks([])
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)
