"""A server under load: seconds to ready, rates and latencies at each concurrency, and what the front end costs.

    python -m benchmarks.server.load MODEL [--load-format dummy] [--concurrency 1 8 64 256] [--input-len 128]
        [--output-len 32] [--seconds 20] [--url URL] [-- more arguments of quire serve]

The clients (`quire bench serve`) are on the same machine and take their share of it: `client_cpu_s` says how much. The
front end's cost is the processor time of its whole process (HTTP, tokenization, detokenization, the way to the engine)
by the tokens that it streamed. With `--url`, a server that runs already is measured instead, of whatever make.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import psutil
from benchmarks.server.process import ServerProcess, use


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--url", help="measure this server, instead of starting one")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=20, help="about how long each concurrency is measured")
    parser.add_argument("--seed", type=int, default=0)
    args, more = parser.parse_known_args()
    if args.url:
        table(args, args.url, [])
        return
    server = ServerProcess(args.model, f"--load-format={args.load_format}", *[a for a in more if a != "--"])
    print(f"ready after {server.ready_s:.2f} s")
    try:
        table(args, server.url, [server.front, server.engine])
    finally:
        server.stop()


def table(args: argparse.Namespace, url: str, processes: list[psutil.Process]) -> None:
    """A line for each concurrency. `processes`: front end and engine, where they are known."""
    for concurrency in args.concurrency:
        rate = bench(url, args, concurrency, max(4, concurrency))["requests_per_s"]
        count = max(concurrency, min(2000, int(rate * args.seconds)))
        before = [use(process).cpu_s for process in processes]
        begin = time.monotonic()
        result = bench(url, args, concurrency, count)
        spent = [use(process).cpu_s - s for process, s in zip(processes, before, strict=True)]
        row: dict[str, Any] = {"concurrency": concurrency, "requests": count, "failed": result["failed"]}
        row |= {k: round(result[k], 2) for k in ("requests_per_s", "output_tokens_per_s", "client_cpu_s")}
        for name in ("ttft", "itl"):
            row |= {f"{name}_{p}_ms": round(result[f"{name}_ms"][p], 1) for p in ("p50", "p99")}
        row["wall_s"] = round(time.monotonic() - begin, 1)
        if spent:
            row["front_us_per_token"] = round(1e6 * spent[0] / result["output_tokens"], 1)
            row["engine_cpu_s"] = round(spent[1], 2)
        print(json.dumps(row), flush=True)


def bench(url: str, args: argparse.Namespace, concurrency: int, count: int) -> dict[str, Any]:
    args.seed += 1  # prompts that no cache knows
    command = [sys.executable, "-m", "quire", "bench", "serve", f"--url={url}", f"--num-prompts={count}"]
    command += [f"--max-concurrency={concurrency}", f"--input-len={args.input_len}", f"--output-len={args.output_len}"]
    done = subprocess.run([*command, f"--seed={args.seed}"], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
