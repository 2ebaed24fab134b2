"""From a run's JSON file to the table and the picture: measured, aimed at, recorded of vLLM, allowed by the machine.

    python -m benchmarks.gpu.report .bench/gpu.json                                       the table
    python -m benchmarks.gpu.report .bench/gpu.json --page docs/performance.md --plot docs/benchmark-gpu.svg

Owns: what is reported of each workload, the verdicts, and the part of the page between the two marks. The recorded
figures and the targets are in recorded.json, the machine's limits in `bounds`. Runs nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.bounds import Ceilings, bound

BEGIN, END = "<!-- benchmarks.gpu.report: begin -->", "<!-- benchmarks.gpu.report: end -->"
MODELS = {"qwen06": "Qwen3-0.6B", "l1b": "Llama-3.2-1B", "l8b": "Llama-3.1-8B"}
RECORDED = Path(__file__).with_name("recorded.json")


@dataclass(frozen=True)
class Metric:
    """The figure of a workload. `digits`: shown after the point."""

    title: str
    digits: int
    lower: bool = True

    def ratio(self, ours: float, theirs: float) -> float:
        """How many times better ours is."""
        return theirs / ours if self.lower else ours / theirs

    def show(self, value: float) -> str:
        return f"{value:,.{self.digits}f}"


METRICS = {
    "W1": Metric("W1, output tokens/s", 0, lower=False),
    "W2": Metric("W2, output tokens/s", 0, lower=False),
    "W3": Metric("W3, ms per token, batch 1", 3),
    "W7_64": Metric("W7, ms per step, batch 64", 3),
    "W7_256": Metric("W7, ms per step, batch 256", 3),
    "W4_1x8192": Metric("W4, prefill of 1 x 8,192, s", 4),
    "W4_1x4096": Metric("W4, prefill of 1 x 4,096, s", 4),
    "W4_16x4096": Metric("W4, prefill of 16 x 4,096, s", 3),
    "W6_new": Metric("W6, shared 4k prefix, new, s", 3),
    "W6_cached": Metric("W6, the same, cached, s", 3),
    "W8_20_ttft": Metric("W8, 20 requests/s: TTFT p50, ms", 1),
    "W8_20_itl": Metric("W8, 20 requests/s: ITL p99, ms", 1),
    "W8_40_ttft": Metric("W8, 40 requests/s: TTFT p50, ms", 1),
    "W8_40_itl": Metric("W8, 40 requests/s: ITL p99, ms", 1),
    "W8_burst": Metric("W8, 1,000 at once, output tokens/s", 0, lower=False),
    "W5_cold": Metric("W5, process to engine, no kernels yet, s", 1),
    "W5_warm": Metric("W5, process to engine, warm, s", 1),
}


@dataclass(frozen=True)
class Row:
    """One figure. `idle`: share of a step in which the device is in no graph; `host_ms`: see `probe`."""

    workload: str
    model: str
    value: float
    vllm: Sequence[float]
    target: float | None
    bound: float | None
    idle: float | None = None
    host_ms: float | None = None

    @property
    def metric(self) -> Metric:
        return METRICS[self.workload]

    @property
    def met(self) -> bool | None:
        return None if self.target is None else self.metric.ratio(self.value, self.target) >= 1

    @property
    def share(self) -> float | None:
        """Of the bound that is reached."""
        return None if self.bound is None else self.metric.ratio(self.value, self.bound)


def value(result: dict[str, Any], workload: str, model: str) -> float | None:
    """What a run measured, None where it did not."""
    kind, _, rest = workload.partition("_")
    try:
        if kind in ("W3", "W7"):
            return result["offline"][model]["steps"][workload]["ms_per_step"]
        if kind == "W5":
            return result["startup"][model][rest]["engine_ready_s"]
        if kind == "W8":
            load, _, name = rest.partition("_")
            found = result["serve"][model]["loads"][load]
            return found[f"{name}_ms"]["p50" if name == "ttft" else "p99"] if name else found["output_tokens_per_s"]
        test = result["prefill" if kind == "W4" else "offline"][model]["tests"][workload]
    except (KeyError, TypeError):
        return None
    return statistics.median(test["seconds"]) if METRICS[workload].lower else test["output_tokens_per_s"]


def rows(result: dict[str, Any], recorded: dict[str, Any]) -> list[Row]:
    """All figures that there are, in the order of the table."""
    ceilings = result.get("ceilings")
    limits = Ceilings(ceilings["read_gb_s"] * 1e9, ceilings["bf16_tflop_s"] * 1e12) if ceilings else None
    found: list[Row] = []
    for workload in METRICS:
        for model in MODELS:
            measured = value(result, workload, model)
            if measured is None:
                continue
            known = recorded["figures"].get(workload, {}).get(model, {})
            steps = result.get("offline", {}).get(model, {}).get("steps", {}).get(workload, {})
            graph = steps.get("graph_ms")
            found.append(
                Row(
                    workload, model, measured, known.get("vllm", ()), known.get("target"),
                    bound(workload, model, limits) if limits else None,
                    max(0.0, 1 - graph / measured) if graph else None, steps.get("host_ms"),
                )
            )  # fmt: skip
    return found


def text(result: dict[str, Any], recorded: dict[str, Any]) -> str:
    """The circumstances and the table, in Markdown."""
    vllm = recorded["vllm"]
    heads = ["", "model", "quire", "target", f"vLLM {vllm['version']}", "quire / vLLM", "bound", "of the bound"]
    heads += ["device idle", "host, ms per step"]
    found = rows(result, recorded)
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in found]
    missed = sum(row.met is False for row in found)
    judged = sum(row.met is not None for row in found)
    wanted = sum("target" in known for of in recorded["figures"].values() for known in of.values())
    lines += ["", f"{judged - missed} of {judged} targets that were measured are met; there are {wanted} in all."]
    if result.get("errors"):
        lines += ["", *(f"- {what} failed: {why}" for what, why in result["errors"].items())]
    return "\n".join([*_circumstances(result, vllm), "", *lines])


def _circumstances(result: dict[str, Any], vllm: dict[str, Any]) -> list[str]:
    machine, versions = result["machine"], ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    minutes = f"{result['seconds'] / 60:.1f} minutes"
    lines = [
        f"`python -m benchmarks.gpu.run`, {result['date']}, {minutes} on one {machine['gpu']}, "
        f"{machine['cores']} cores of {machine['cpu']}. {versions}. bf16, random weights, medians, quire's "
        f"defaults but for `max_model_len` (and, for W4, prefix caching off). Beside it the recorded "
        f"figures of vLLM {vllm['version']} ({vllm['date']}, {vllm['machine']}; where two: unlike processors)."
    ]
    if ceilings := result.get("ceilings"):
        lines += [
            "",
            f"The machine in that run: read {ceilings['read_gb_s']:,.0f} GB/s, copy {ceilings['copy_gb_s']:,.0f} GB/s "
            f"(read and written), bf16 product {ceilings['bf16_tflop_s']:,.0f} TFLOP/s, "
            f"{ceilings['host_score']:.0f} million rounds a second of a plain Python loop. "
            "The bound is what these allow (bytes of weights, keys and values; operations of linear layers and "
            "attention), and nothing else. The device is idle when it is in no captured graph.",
        ]
    return lines


def _cells(row: Row) -> list[str]:
    show = row.metric.show
    target = "" if row.target is None else f"{show(row.target)}: {'met' if row.met else 'missed'}"
    theirs = sorted({min(row.vllm), max(row.vllm)}) if row.vllm else []
    ratios = sorted(row.metric.ratio(row.value, figure) for figure in theirs)
    return [
        row.metric.title,
        MODELS[row.model],
        show(row.value),
        target,
        " to ".join(map(show, theirs)),
        " to ".join(f"{ratio:.2f}x" for ratio in ratios),
        "" if row.bound is None else show(row.bound),
        "" if row.share is None else f"{row.share:.0%}",
        "" if row.idle is None else f"{row.idle:.0%}",
        "" if row.host_ms is None else f"{row.host_ms:.2f}",
    ]


def write_page(path: Path, part: str) -> None:
    """Put `part` between the marks. Raises ValueError where the page has none."""
    page = path.read_text(encoding="utf-8")
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{path} has no lines {BEGIN} and {END}: add them where the table is to be")
    path.write_text(f"{before}{BEGIN}\n\n{part}\n\n{END}{after}", encoding="utf-8")


def draw(found: Sequence[Row], path: Path) -> None:
    """An SVG: vLLM (its best figure) is at 1, quire, the target and the bound where they are beside it."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "quire", "font.size": 10, "svg.fonttype": "none"}
    from matplotlib import pyplot

    found = [row for row in found if row.vllm]
    best = [min(row.vllm) if row.metric.lower else max(row.vllm) for row in found]
    figure, axis = pyplot.subplots(figsize=(10, 1.4 + 0.3 * len(found)))
    axis.axvline(1, color="#b45309", linewidth=2, zorder=1, label="vLLM, recorded")
    for label, color, marker, figures in (
        ("what the machine allows", "#0f172a", "|", [row.bound for row in found]),
        ("target", "#64748b", "d", [row.target for row in found]),
        ("quire", "#dc2626", "o", [row.value for row in found]),
    ):
        places = [
            (row.metric.ratio(figure_, theirs), y)
            for y, (row, figure_, theirs) in enumerate(zip(found, figures, best, strict=True))
            if figure_ is not None
        ]
        if places:
            axis.scatter(*zip(*places, strict=True), color=color, marker=marker, s=60, zorder=3, label=label)
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 1.5, 2, 3, 5, 10, 20) if low <= tick <= high]
    axis.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axis.set_xticks([], minor=True)
    names = [f"{MODELS[row.model]}, {row.metric.title}: {row.metric.show(row.value)}" for row in found]
    axis.set_yticks(range(len(found)), names)
    axis.set_ylim(len(found) - 0.5, -0.5)
    axis.set_xlabel("speed relative to vLLM  \N{RIGHTWARDS ARROW}  faster")
    axis.grid(axis="y", color="#e2e8f0", zorder=0)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="upper center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.4 / figure.get_figheight()))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None}, facecolor="white")
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("--page", type=Path, help="write the table between the marks of this page")
    parser.add_argument("--plot", type=Path, help="draw the picture (needs matplotlib)")
    args = parser.parse_args()
    result, recorded = json.loads(args.json.read_text()), json.loads(RECORDED.read_text())
    part = text(result, recorded)
    print(part)
    if args.plot is not None:
        draw(rows(result, recorded), args.plot)
    if args.page is not None:
        there = None if args.plot is None else os.path.relpath(args.plot, args.page.parent)
        write_page(args.page, part if there is None else f"{part}\n\n![The same, beside vLLM]({there})")


if __name__ == "__main__":
    main()
