"""quire and its peers, alternately, on the same work: what is missing of the table, in as many goes as it takes.

    python -m benchmarks.cpu.run --minutes 8                          again and again, until it says that all is done
    python -m benchmarks.cpu.run --models m135 --workloads C1 --peers llamacpp --repeats 1               a minute

Owns: the order of things. For each model, precision and peer, quire and that peer are started, one process each; for
each workload they run once to warm up and then take turns, A B A B, until each has `--repeats` rounds in which no other
program used the machine, or twice as many in all. Start-up (C5) has new processes, taking turns as well. What the
machine can do at most is measured before and after each workload. When `--minutes` are over, a round that is under way
is dropped. Every finished round is in the JSON file; the next go does what is not complete there, so that the same
command repeated ends with the whole table. A peer that is not there, or fails, is left out and named with the reason.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.cpu import models, report, workloads
from benchmarks.cpu.catalog import PEERS, PRECISIONS, QUIRE
from benchmarks.cpu.driver import QUIET_CORES, Noise, Patience, PeerError, Runner, TimeUp
from benchmarks.cpu.results import Cell, Key, Results, digest

import quire
from quire.utils import devices

# The table: what has a target. C5 is first, while no engine holds memory.
PLAN = {
    ("m135", "bf16"): ("C5", "C1", "C2", "C3", "C4"),
    ("m135", "int8"): ("C1", "C2", "C3"),
    ("m135", "int4"): ("C1",),
    ("m1b", "bf16"): ("C1", "C2", "C3"),
    ("m1b", "int8"): ("C1", "C2", "C3"),
    ("m1b", "int4"): ("C1",),
}
SLOW_START = 15.0  # an engine that needs so many seconds to start does it once after the warm-up, not `--repeats` times
Measure = Callable[[str, list[workloads.Request]], dict[str, float]]


@dataclass(slots=True)
class Run:
    """One go. `fruitful`: a cell was completed in it."""

    args: argparse.Namespace
    results: Results
    deadline: float
    patience: Patience
    fruitful: bool = False

    def leave_out(self, what: str, why: object) -> None:
        """Leave something out, and say so."""
        self.results.left_out[what] = str(why)
        self.results.save()
        say(f"left out: {what}: {why}")

    def fits(self, cell: Cell, seconds: float) -> bool:
        """Whether there is time left for so much. The first cell of a go is tried in any case."""
        if not self.fruitful or time.monotonic() + seconds < self.deadline:
            return True
        say(f"{' '.join(cell.key)} needs about {seconds:.0f} s: left for the next go")
        return False


def main(argv: Sequence[str] | None = None) -> Results:
    args = parse(argv)
    try:
        results = Results.resume(args.json, circumstances(args))
    except ValueError as error:
        sys.exit(str(error))
    results.left_out.clear()  # what is missing is tried again
    run = Run(args, results, time.monotonic() + 60 * args.minutes, Patience(args.quiet))
    wanted = [key for keys in planned(args) for key in keys]
    try:
        for keys in planned(args):
            if missing := [key for key in keys if not results.complete(key)]:
                sitting(run, missing)
    except TimeUp:
        say("the time is up (--minutes)")
    except KeyboardInterrupt:
        say("interrupted")
    print(report.text(results))
    done = sum(map(results.complete, wanted))
    rest = "" if done == len(wanted) else "; the same command again does the rest"
    print(f"\n{done} of {len(wanted)} cells are complete in {args.json}{rest}")
    return results


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=workloads.NAMES, help="instead of those that have a target")
    parser.add_argument("--models", nargs="+", choices=list(models.SHAPES), default=list(models.SHAPES))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    rivals = [name for name in PEERS if name != QUIRE]
    parser.add_argument("--peers", nargs="+", choices=rivals, default=rivals)
    parser.add_argument("--repeats", type=int, default=3, help="undisturbed rounds of each engine and workload")
    parser.add_argument("--threads", type=int, default=devices.physical_cores())
    parser.add_argument("--quiet", type=float, default=60.0, help="seconds, in all, to wait for others to be idle")
    parser.add_argument("--minutes", type=float, default=30.0, help="stop after so long")
    parser.add_argument("--cache", type=Path, default=models.CACHE, help="models and virtual environments")
    parser.add_argument("--json", type=Path, help="results, old and new; CACHE/cpu.json by default")
    args = parser.parse_args(argv)
    args.json = args.json or args.cache / "cpu.json"
    return args


def circumstances(args: argparse.Namespace) -> dict[str, Any]:
    """What must be the same for figures to stand in one file."""
    machine = {"processor": devices.cpu_name(), "cores": devices.physical_cores(), "threads": args.threads}
    return {**machine, "repeats": args.repeats, "quire": digest(Path(quire.__file__).parent)}


def planned(args: argparse.Namespace) -> Iterator[list[Key]]:
    """The cells, those of one sitting together."""
    for model in args.models:
        for precision in args.precisions:
            names = PLAN.get((model, precision), ()) if args.workloads is None else args.workloads
            for peer in args.peers:
                if names and precision in PEERS[peer].formats:
                    yield [(model, precision, workload, peer) for workload in names]


def ceilings(threads: int) -> dict[str, float]:
    """See ceilings.py."""
    command = [sys.executable, "-m", "benchmarks.cpu.ceilings", "--threads", str(threads)]
    return json.loads(subprocess.run(command, cwd=models.ROOT, capture_output=True, text=True, check=True).stdout)


def sitting(run: Run, keys: Sequence[Key]) -> None:
    """quire and one peer on one model, through the workloads that are missing."""
    model, precision, _, peer = keys[0]
    what = f"{PEERS[peer].label(precision)}, {model}"
    if not PEERS[peer].python(run.args.cache).exists():
        return run.leave_out(PEERS[peer].title, "not installed (make bench-cpu-peers)")
    try:
        paths = {name: PEERS[name].model(model, precision, run.args.cache) for name in (QUIRE, peer)}
    except RuntimeError as error:
        return run.leave_out(what, error)
    start = partial(launch, run, precision, paths)
    with ExitStack() as stack:
        runners: dict[str, Runner] = {}
        before: dict[str, float] = {}
        for key in keys:
            begun = time.monotonic()
            cell = Cell.new(key, run.args.repeats, time.strftime("%Y-%m-%d %H:%M"))
            old = run.results.cells.get(key)
            if not run.fits(cell, old.seconds if old else 0.0):
                continue
            before = before or ceilings(run.args.threads)
            try:
                if cell.workload == "C5":
                    finished = turns(run, cell, begun, partial(first_token, start))
                else:
                    for name in () if runners else paths:
                        runners[name] = stack.enter_context(start(name))
                        runners[name].wait_ready()
                    cell.settings = {name: runner.settings for name, runner in runners.items()}
                    finished = turns(run, cell, begun, partial(one_round, runners))
                    cell.memory = {name: runner.memory() for name, runner in runners.items()}
            except PeerError as error:
                run.leave_out(f"{what} {cell.workload}", error)
                if cell.workload == "C5":
                    continue
                return None  # a runner that failed is no more
            if finished:
                after = ceilings(run.args.threads)
                # The better of before and after: others may have been at work.
                cell.ceilings, before = {name: max(value, before[name]) for name, value in after.items()}, after
                cell.seconds = time.monotonic() - begun
                run.fruitful |= cell.complete
            run.results.put(cell)
    return None


def launch(run: Run, precision: str, paths: dict[str, Path], name: str) -> Runner:
    """An engine's process, not yet ready; PeerError where there is no room for it."""
    peer, threads, path = PEERS[name], run.args.threads, paths[name]
    size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))
    if free_memory() < 2 * size + (1 << 30):
        raise PeerError("not enough memory is free")
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **peer.environment(run.args.cache / "venvs" / name),
    }
    options = {"model": str(path), "precision": precision, "threads": threads}
    return Runner(peer.python(run.args.cache), peer.module, options, environment, deadline=run.deadline)


def turns(run: Run, cell: Cell, begun: float, measure: Measure) -> bool:
    """Warm both engines up, then let them take turns; False where the time does not suffice for that."""
    for number in range(workloads.WARM_UP, 2 * run.args.repeats):
        requests = workloads.build(cell.workload, cell.model, number)
        start = time.monotonic()
        for name in cell.rounds:
            wanted = cell.wanted[name]
            if len(cell.clean(name)) >= wanted or len(cell.rounds[name]) >= 2 * wanted:
                continue
            run.patience.wait(run.deadline)
            found = measure(name, requests)
            if number != workloads.WARM_UP:
                cell.rounds[name].append(found)
                progress(cell, name, found)
                if cell.measured:
                    run.results.put(cell)
            elif found.get("first_token_s", 0.0) > SLOW_START:
                cell.wanted[name] = 1
        if number == workloads.WARM_UP:
            now = time.monotonic()
            rest = (now - start) * max(cell.wanted.values())
            cell.seconds = now - begun + rest
            if not run.fits(cell, rest):
                return False
    return True


def one_round(runners: dict[str, Runner], name: str, requests: list[workloads.Request]) -> dict[str, float]:
    """The figures of one round of C1 to C4."""
    noise = Noise(runners[name].process.pid)
    timings = runners[name].generate(requests)
    return {**report.figures(requests, timings), "others_cores": noise.cores()}


def first_token(start: Callable[[str], Runner], name: str, requests: list[workloads.Request]) -> dict[str, float]:
    """The figures of C5: from the start of a new process to its first token."""
    with start(name) as runner:
        noise = Noise(runner.process.pid)
        runner.send(requests)
        runner.wait_ready()
        runner.receive(requests)
        found, stamps = {"others_cores": noise.cores()}, runner.stamps
    return found | {"import_s": stamps["imported"], "ready_s": stamps["ready"], "first_token_s": stamps["done"]}


def progress(cell: Cell, name: str, found: dict[str, float]) -> None:
    """One line a round."""
    metric, others = report.METRICS[cell.workload], found["others_cores"]
    noise = f", others used {others:.1f} cores" if others > QUIET_CORES else ""
    what = f"{cell.workload} {cell.model} {PEERS[name].label(cell.precision)}"
    say(f"{what}: {report.number(found[metric.name])} {metric.unit}{noise}")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def free_memory() -> int:
    """Bytes that can be taken without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


if __name__ == "__main__":
    main()
