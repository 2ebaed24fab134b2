"""A server under load: seconds to ready, rates and latencies at each concurrency, and what the front end costs.

    python -m benchmarks.server.load MODEL [--load-format dummy] [--concurrency 1 8 64 256] [--input-len 128]
        [--output-len 32] [--seconds 20] [-- more arguments of quire serve]

The clients (`quire bench serve`) are on the same machine and take their share of it: `client_cpu_s` says how much. The
front end's cost is the processor time of its whole process (HTTP, tokenization, detokenization, the way to the engine)
by the tokens that it streamed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

from benchmarks.server.process import ServerProcess, use


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=20, help="about how long each concurrency is measured")
    parser.add_argument("--seed", type=int, default=0)
    args, more = parser.parse_known_args()
    server = ServerProcess(args.model, f"--load-format={args.load_format}", *[a for a in more if a != "--"])
    print(f"ready after {server.ready_s:.2f} s")
    try:
        for concurrency in args.concurrency:
            rate = bench(server, args, concurrency, max(4, concurrency))["requests_per_s"]
            count = max(concurrency, min(2000, int(rate * args.seconds)))
            front, engine = use(server.front), use(server.engine)
            begin = time.monotonic()
            result = bench(server, args, concurrency, count)
            front_s, engine_s = use(server.front).cpu_s - front.cpu_s, use(server.engine).cpu_s - engine.cpu_s
            row: dict[str, Any] = {"concurrency": concurrency, "requests": count, "failed": result["failed"]}
            row |= {k: round(result[k], 2) for k in ("requests_per_s", "output_tokens_per_s", "client_cpu_s")}
            for name in ("ttft", "itl"):
                row |= {f"{name}_{p}_ms": round(result[f"{name}_ms"][p], 1) for p in ("p50", "p99")}
            row |= {"front_us_per_token": round(1e6 * front_s / result["output_tokens"], 1)}
            row |= {"engine_cpu_s": round(engine_s, 2), "wall_s": round(time.monotonic() - begin, 1)}
            print(json.dumps(row), flush=True)
    finally:
        server.stop()


def bench(server: ServerProcess, args: argparse.Namespace, concurrency: int, count: int) -> dict[str, Any]:
    args.seed += 1  # prompts that no cache knows
    command = [sys.executable, "-m", "quire", "bench", "serve", f"--url={server.url}", f"--num-prompts={count}"]
    command += [f"--max-concurrency={concurrency}", f"--input-len={args.input_len}", f"--output-len={args.output_len}"]
    done = subprocess.run([*command, f"--seed={args.seed}"], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
