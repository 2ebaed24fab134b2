"""quire and its peers, alternately, on the same work, in one go.

    python -m benchmarks.cpu.run                                      everything that is installed, at most half an hour
    python -m benchmarks.cpu.run --models m135 --workloads C1 --peers quire llamacpp --repeats 1         a minute

Owns: the order of things. For each model and precision the engines are started, one process each, and stay; for each
workload each runs once to warm up, then they take turns, A B A B, until each has `--repeats` rounds. Start-up (C5) has
new processes, taking turns as well. An engine that is not there, or fails, is left out and named with the reason;
without quire's figure the others are not measured. Prints tables, writes JSON and a plot.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cpu import models, report, workloads
from benchmarks.cpu.catalog import PEERS, PRECISIONS, QUIRE, Peer
from benchmarks.cpu.driver import Noise, PeerError, Runner, wait_for_quiet
from benchmarks.cpu.report import Result, Row

from quire.utils import devices

# What has a target, and is run unless something else is asked for.
PLAN = {
    ("m135", "bf16"): ("C1", "C2", "C3", "C4", "C5"),
    ("m135", "int8"): ("C1", "C2", "C3"),
    ("m135", "int4"): ("C1",),
    ("m1b", "bf16"): ("C1", "C2", "C3"),
    ("m1b", "int8"): ("C1", "C2", "C3"),
    ("m1b", "int4"): ("C1",),
}
SLOW_START = 15.0  # an engine that needs so many seconds to start does it once after the warm-up, not `--repeats` times
PICTURE = models.ROOT / "docs" / "benchmark-cpu.svg"


@dataclass(slots=True)
class Run:
    """What is to be done, and what came of it."""

    args: argparse.Namespace
    deadline: float
    rows: list[Row] = field(default_factory=list[Row])
    results: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    skipped: list[str] = field(default_factory=list[str])

    def skip(self, what: str, why: object) -> None:
        """Leave something out, and say so."""
        self.skipped.append(f"{what}: {why}")
        print(f"left out: {self.skipped[-1]}", file=sys.stderr, flush=True)

    def late(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self.deadline


def main(argv: Sequence[str] | None = None) -> Run:
    args = parse(argv)
    run = Run(args, time.monotonic() + 60 * args.minutes)
    plan = list(planned(args))
    before = os.getloadavg()
    wait_for_quiet(args.quiet)
    limits = ceilings(args.threads)
    for model, precision, names in plan:
        if run.late():
            run.skip(f"{model} {precision}", "the time is up (--minutes)")
        else:
            group(run, model, precision, names)
    # The better of before and after: others may have been at work.
    limits = {name: max(value, limits[name]) for name, value in ceilings(args.threads).items()}
    for row in run.rows:
        if row.workload in workloads.NAMES:
            requests = workloads.build(row.workload, row.model, 0)
            found = report.bound(models.SHAPES[row.model], row.precision, row.workload, requests, limits)
            row.bound, row.limit = found or (None, None)
    print("\n".join([report.table(run.rows), "", *report.transformers_ratio(run.rows)]))
    print(f"\n* best peer. {limits['read_gb_s']:.1f} GB/s read, {limits['bf16_gflop_s']:.0f} bf16 GFLOP/s")
    write(run, limits, before)
    return run


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=workloads.NAMES, help="instead of those that have a target")
    parser.add_argument("--models", nargs="+", choices=list(models.SHAPES), default=list(models.SHAPES))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--repeats", type=int, default=3, help="rounds of each engine and workload")
    parser.add_argument("--threads", type=int, default=devices.physical_cores())
    parser.add_argument("--quiet", type=float, default=5.0, help="wait so many seconds at most for others to be idle")
    parser.add_argument("--minutes", type=float, default=30.0, help="start nothing more after so long")
    parser.add_argument("--cache", type=Path, default=models.CACHE, help="models and virtual environments")
    parser.add_argument("--json", type=Path, help="results; CACHE/cpu.json by default")
    parser.add_argument("--plot", type=Path, help="SVG; by default docs/ if nothing is chosen here, else CACHE/cpu.svg")
    args = parser.parse_args(argv)
    args.peers = [name for name in PEERS if name in {QUIRE, *args.peers}]
    # One for all: a partial run must not replace the published picture.
    args.whole = not {a.split("=")[0] for a in (sys.argv[1:] if argv is None else argv)} & {
        "--workloads", "--models", "--precisions", "--peers", "--repeats", "--minutes",
    }  # fmt: skip
    return args


def planned(args: argparse.Namespace) -> Iterator[tuple[str, str, Sequence[str]]]:
    """(model, precision, workloads) in order."""
    for model in args.models:
        for precision in args.precisions:
            names = args.workloads or PLAN.get((model, precision), ())
            if names:
                yield model, precision, names


def ceilings(threads: int) -> dict[str, float]:
    """See ceilings.py."""
    command = [sys.executable, "-m", "benchmarks.cpu.ceilings", "--threads", str(threads)]
    return json.loads(subprocess.run(command, cwd=models.ROOT, capture_output=True, text=True, check=True).stdout)


def group(run: Run, model: str, precision: str, names: Sequence[str]) -> None:
    """All engines of one precision on one model."""
    peers = {peer.name: path for peer, path in available(run, model, precision)}
    if "C5" in names and QUIRE in peers:
        finish(run, model, precision, "C5", startup(run, model, precision, peers))
    with ExitStack() as stack:
        runners: dict[str, Runner] = {}
        for name, path in peers.items():
            if name != QUIRE and QUIRE not in runners:
                break
            try:
                runner = stack.enter_context(launch(run, name, path, precision))
                run.settings[f"{name} {precision}"] = runner.wait_ready()
                runners[name] = runner
            except PeerError as error:
                run.skip(f"{PEERS[name].label(precision)}, {model}", error)
        for workload in names:
            if workload != "C5" and QUIRE in runners and not run.late():
                finish(run, model, precision, workload, turns(run, model, precision, workload, runners))


def available(run: Run, model: str, precision: str) -> Iterator[tuple[Peer, Path]]:
    """The engines that can take part, with the model in their format."""
    for name in run.args.peers:
        peer = PEERS[name]
        if precision not in peer.formats:
            continue
        if not peer.python(run.args.cache).exists():
            run.skip(peer.title, "not installed (make bench-cpu-peers)")
            continue
        try:
            yield peer, peer.model(model, precision, run.args.cache)
        except RuntimeError as error:
            run.skip(f"{peer.label(precision)}, {model}", error)


def launch(run: Run, name: str, path: Path, precision: str) -> Runner:
    """An engine's process, not yet ready; PeerError where there is no room for it beside the others."""
    peer, threads = PEERS[name], run.args.threads
    size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))
    if free_memory() < 2 * size + (1 << 30):
        raise PeerError("not enough memory is free beside the others: fewer --peers at a time")
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **peer.environment(run.args.cache / "venvs" / name),
    }
    options = {"model": str(path), "precision": precision, "threads": threads}
    return Runner(peer.python(run.args.cache), peer.module, options, environment)


def turns(run: Run, model: str, precision: str, workload: str, runners: dict[str, Runner]) -> list[Result]:
    """One workload: each engine warms up, then they take turns. An engine that fails is out."""
    results = {name: Result(name) for name in runners}
    for number in (workloads.WARM_UP, *range(run.args.repeats)):
        requests = workloads.build(workload, model, number)
        for name, runner in list(runners.items()):
            if run.late() and any(result.rounds for result in results.values()):
                break
            try:
                found = timed(run, runner, requests)
            except PeerError as error:
                run.skip(f"{PEERS[name].label(precision)}, {model} {workload}", error)
                runners.pop(name)
                results.pop(name)
                continue
            if number != workloads.WARM_UP:
                results[name].rounds.append(found)
                progress(name, precision, model, workload, found)
    for name, runner in runners.items():
        results[name].memory = runner.memory()
    return list(results.values())


def timed(run: Run, runner: Runner, requests: list[workloads.Request]) -> dict[str, float]:
    """The figures of one round."""
    wait_for_quiet(run.args.quiet)
    noise = Noise(runner.process.pid)
    timings = runner.generate(requests)
    return {**report.figures(requests, timings), "others_cores": noise.cores()}


def startup(run: Run, model: str, precision: str, peers: dict[str, Path]) -> list[Result]:
    """C5: from the start of a new process to its first token."""
    results = {name: Result(name) for name in peers}
    slow: set[str] = set()
    for number in (workloads.WARM_UP, *range(run.args.repeats)):
        requests = workloads.build("C5", model, number)
        for name in list(results):
            if run.late() or (name in slow and number > 0):
                continue
            wait_for_quiet(run.args.quiet)
            try:
                with launch(run, name, peers[name], precision) as runner:
                    runner.send(requests)
                    runner.wait_ready()
                    runner.receive(requests)
            except PeerError as error:
                run.skip(f"{PEERS[name].label(precision)}, {model} C5", error)
                results.pop(name)
                continue
            stamps = runner.stamps
            found = {"import_s": stamps["imported"], "ready_s": stamps["ready"], "first_token_s": stamps["done"]}
            if stamps["done"] > SLOW_START:
                slow.add(name)
            if number != workloads.WARM_UP:
                results[name].rounds.append(found)
                progress(name, precision, model, "C5", found)
    return list(results.values())


def finish(run: Run, model: str, precision: str, workload: str, results: Sequence[Result]) -> None:
    """Keep what one workload brought. Memory is told after C2, the load that the target was set for."""
    measured = [result for result in results if result.rounds]
    if not measured:
        return
    run.rows.append(report.row(model, precision, workload, measured))
    if workload == "C2":
        run.rows.append(report.memory_row(model, precision, measured))
    place = {"model": model, "precision": precision, "workload": workload}
    run.results += [{**place, **asdict(result)} for result in measured]


def progress(name: str, precision: str, model: str, workload: str, found: dict[str, float]) -> None:
    """One line a round."""
    metric = report.METRICS[workload]
    others = f", others used {found['others_cores']:.1f} cores" if found.get("others_cores", 0) > 0.15 else ""
    text = (
        f"{workload} {model} {PEERS[name].label(precision)}: {report.number(found[metric.name])} {metric.unit}{others}"
    )
    print(text, file=sys.stderr, flush=True)


def free_memory() -> int:
    """Bytes that can be taken without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def write(run: Run, limits: dict[str, float], load: tuple[float, float, float]) -> None:
    """The JSON file and the plot."""
    args = run.args
    target = args.json or args.cache / "cpu.json"
    document = {
        "machine": {"cpu": devices.cpu_name(), "cores": devices.physical_cores(), "memory": devices.host_memory()},
        "time": time.strftime("%Y-%m-%d %H:%M"),
        "load": {"before": load, "after": os.getloadavg()},
        "arguments": {name: value for name, value in vars(args).items() if not isinstance(value, Path)},
        "ceilings": limits,
        "settings": run.settings,
        "rows": [report.as_json(row) for row in run.rows],
        "results": run.results,
        "left_out": run.skipped,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(document, indent=1) + "\n")
    try:
        from benchmarks.cpu.plot import draw

        if run.rows:
            draw(run.rows, args.plot or (PICTURE if args.whole else args.cache / "cpu.svg"))
    except ImportError as error:
        run.skip("the plot", f"{error} (pip install 'quire[bench]')")


if __name__ == "__main__":
    main()
