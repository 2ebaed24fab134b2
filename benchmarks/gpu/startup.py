"""W5: seconds from a process's start to its engine and to its first token; with and without compiled kernels at hand.

    python -m benchmarks.gpu.startup --models qwen06 l1b l8b --json startup.json [--warm 3] [--cache FOLDER]
        [-- more arguments of the engine]

Owns: the caches, a folder for each model under `--cache`: of kernels, and of Python's bytecode, which a machine lacks
that may not write beside its packages. The first process of a model finds its folder empty (`cold`), the others what
the first one compiled (`warm`). The processes are those of `quire bench startup`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import workloads

PHASES = ("import_quire_s", "engine_ready_s", "first_token_s")


def start(folder: Path, cache: Path, more: Sequence[str], times: int = 1) -> dict[str, float]:
    """Medians of `times` processes, one after the other."""
    command = [sys.executable, "-m", "quire", "bench", "startup", f"--num-iters={times}", f"--model={folder}"]
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "PYTHONPYCACHEPREFIX": str(cache / "bytecode")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(
        [*command, "--load-format=dummy", "--dtype=bfloat16", *more],
        env=environment, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    return {phase: round(found[phase], 3) for phase in PHASES}


def run(model: str, cache: Path, warm: int = 3, more: Sequence[str] = ()) -> dict[str, dict[str, float]]:
    """`cold` and `warm`. Leaves `cache` filled."""
    shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as root:
        folder = workloads.write_model(Path(root), model)
        found = {"cold": start(folder, cache, more)}
        if warm:
            found["warm"] = start(folder, cache, more, warm)
    for name, phases in found.items():
        print(model, "W5", name, phases, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(workloads.MODELS), choices=sorted(workloads.MODELS))
    parser.add_argument("--json", type=Path, default=Path("startup.json"))
    parser.add_argument("--warm", type=int, default=3, help="processes with a filled cache")
    parser.add_argument("--cache", type=Path, help="where the kernel caches are made; by default a temporary folder")
    args, more = parser.parse_known_args()
    more = [argument for argument in more if argument != "--"]
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as root:
        for model in args.models:
            result[model] = run(model, (args.cache or Path(root)) / model, args.warm, more)
            args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
