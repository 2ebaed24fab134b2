"""All workloads on one GPU, in one go of at most `--minutes`: W1 to W8, three models, and what the machine gives.

    python -m benchmarks.gpu.run --json .bench/gpu.json [--minutes 9] [--models l8b] [--only offline serve]
    python -m benchmarks.gpu.report .bench/gpu.json

Owns: the order of things, and their time. Each stage is a process of its own, with its own output file. A stage may
take its least (each workload once) and its share of what the least of the others leaves free; where that is short,
rounds are dropped, never a workload. One that fails, or takes the time of those after it, is ended and named in the
file. Start-up comes first, since it needs empty kernel caches; the others find what it left there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu import report, workloads

from quire import __version__
from quire.utils import devices, optional

LENGTHS = {"qwen06": 4096, "l1b": 4096, "l8b": 4352}  # max_model_len
TESTS = {"qwen06": "w3,w7,w1", "l1b": "w3,w7,w1,w2", "l8b": "w3,w7,w6,w1,w2"}
PREFILL = 8448
BURST = 1000
GRACE = 10  # seconds to end in


@dataclass(frozen=True)
class Stage:
    """`least`, `most`: seconds with one round of each workload, and with all. `command`: the module's arguments, given
    the seconds that it may take; its result is written to the file named last."""

    key: tuple[str, ...]
    least: float
    most: float
    command: Callable[[float], list[str]]


def stages(models: Sequence[str]) -> list[Stage]:
    """In the order in which they run. The seconds were seen on an H200."""
    starts = {"qwen06": (30, 45), "l1b": (35, 48), "l8b": (40, 62)}
    offline = {"qwen06": (22, 40), "l1b": (22, 42), "l8b": (65, 165)}
    found = [Stage(("ceilings",), 12, 12, lambda s: ["ceilings"])]
    for model in models:
        least, most = starts[model]

        def start(seconds: float, model: str = model, least: float = least, most: float = most) -> list[str]:
            warm = 1 + round(2 * (seconds - least) / (most - least))
            options = ["--models", model, f"--warm={warm}", "--cache=."]
            return ["startup", *options, "--", f"--max-model-len={LENGTHS[model]}"]

        found.append(Stage(("startup", model), least, most, start))
    for model in models:

        def measure(seconds: float, model: str = model) -> list[str]:
            options = [f"--tests={TESTS[model]}", f"--seconds={seconds:.0f}"]
            return ["offline", f"--model={model}", *options, "--llm", f"max_model_len={LENGTHS[model]}"]

        found.append(Stage(("offline", model), *offline[model], measure))
    if "l8b" in models:

        def prefill(seconds: float) -> list[str]:
            options = ["--llm", f"max_model_len={PREFILL}", "enable_prefix_caching=false"]
            return ["offline", "--model=l8b", "--tests=w4", f"--seconds={seconds:.0f}", *options]

        def serve(seconds: float) -> list[str]:
            rate = max(8.0, min(20.0, (seconds - 43) / 2))
            options = ["--rates", "20", "40", f"--seconds={rate:.0f}", f"--burst={BURST}"]
            return ["serve", "--model=l8b", *options, "--", f"--max-model-len={LENGTHS['l8b']}"]

        found += [Stage(("prefill", "l8b"), 18, 26, prefill), Stage(("serve", "l8b"), 59, 83, serve)]
    return found


def allot(left: float, stage: Stage, later: Sequence[Stage]) -> tuple[float, float]:
    """Seconds that a stage should take, and after which it is ended, of `left` that it shares with `later` ones."""
    reserved = sum(each.least for each in later)
    wish = stage.most - stage.least
    wishes = wish + sum(each.most - each.least for each in later)
    free = max(0.0, left - reserved - stage.least)
    should = stage.least + (wish * min(1.0, free / wishes) if wishes else 0.0)
    return should, max(left - reserved, min(left, stage.least))


def run(stage: Stage, should: float, limit: float, root: Path) -> Any:
    """What the stage measured. Raises RuntimeError, with what came before the failure in its second argument."""
    out = root / f"{'-'.join(stage.key)}.json"
    module, *arguments = stage.command(should)
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    if stage.key[0] == "startup":
        arguments[arguments.index("--cache=.")] = f"--cache={root / 'cache'}"
    elif len(stage.key) > 1:
        environment["TRITON_CACHE_DIR"] = str(root / "cache" / stage.key[1])
    command = [sys.executable, "-m", f"benchmarks.gpu.{module}", f"--json={out}", *arguments]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        status = process.wait(limit + GRACE)
        failure = f"it ended with status {status}" if status else None
    except subprocess.TimeoutExpired:
        failure = f"it was ended after {limit:.0f} s, since the others need the rest"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found = json.loads(out.read_text()) if out.exists() else None
    if stage.key[0] == "startup" and found is not None:
        found = found.get(stage.key[1])
    if failure:
        raise RuntimeError(failure, found)
    return found


def circumstances() -> dict[str, Any]:
    machine = devices.probe()
    versions = {"quire": __version__, "torch": optional.version("torch"), "triton": optional.version("triton")}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    if commit.returncode == 0:
        versions["commit"] = commit.stdout.strip()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": {
            "gpu": machine.gpus[0].name if machine.gpus else "no GPU",
            "cpu": devices.cpu_name(),
            "cores": machine.cores,
        },
        "versions": {**versions, "Python": platform.python_version()},
        "settings": {"max_model_len": LENGTHS, "W4": {"max_model_len": PREFILL, "enable_prefix_caching": False}},
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path(".bench/gpu.json"))
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    parser.add_argument("--models", nargs="+", default=list(workloads.MODELS), choices=list(workloads.MODELS))
    parser.add_argument("--only", nargs="+", help="of ceilings startup offline prefill serve")
    args = parser.parse_args(argv)
    begin = time.monotonic()
    todo = [stage for stage in stages(args.models) if not args.only or stage.key[0] in args.only]
    result: dict[str, Any] = {**circumstances(), "minutes": args.minutes, "seconds": 0.0, "errors": {}}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as root:
        for i, stage in enumerate(todo):
            left = 60 * args.minutes - (time.monotonic() - begin)
            name = " ".join(stage.key)
            if left <= 0:
                result["errors"][name] = "no time was left"
                continue
            should, limit = allot(left, stage, todo[i + 1 :])
            print(f"== {name}: {should:.0f} of {left:.0f} s", flush=True)
            try:
                found = run(stage, should, limit, Path(root))
            except RuntimeError as error:
                reason, found = error.args
                result["errors"][name] = reason
                print(f"{name}: {reason}", flush=True)
            place = result
            for key in stage.key[:-1]:
                place = place.setdefault(key, {})
            place[stage.key[-1]] = found
            result["seconds"] = round(time.monotonic() - begin, 1)
            args.json.write_text(json.dumps(result, indent=1))
    print(report.text(result, json.loads(report.RECORDED.read_text())))
    return result


if __name__ == "__main__":
    main()
