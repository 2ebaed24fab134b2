"""W8: a server with dummy weights, and clients that stream from it: how long to the first token, and between tokens.

    python -m benchmarks.gpu.serve --model l8b --json serve.json [--rates 20 40] [--seconds 20] [--burst 1000]
        [-- more arguments of quire serve]

For each rate, as many requests as come in `--seconds` (Poisson arrivals); then `--burst` at once. Prompts are token
ids, 512 of them, 128 come back. The clients are those of `quire bench serve`, in this process. The server has a
tokenizer whose tokens are texts of four letters, so that it turns tokens into text as it would for a real model.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import string
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import workloads
from benchmarks.server.process import ServerProcess

from quire.cli import bench_serve
from quire.cli.remote import Remote

WARM_UP = 8


def write_tokenizer(folder: Path, size: int) -> None:
    """tokenizer.json with `size` tokens: the bytes, then texts of four letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = string.ascii_lowercase
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    for n in range(size - len(names)):
        names.append("".join(letters[n // 26**place % 26] for place in range(4)))
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def measure(url: str, prompts: workloads.Prompts, length: int, rate: float, seed: int) -> dict[str, Any]:
    """One load on the server at `url`: `length` tokens for each prompt, `rate` arrivals a second (inf: all at once)."""
    remote = Remote(url)
    options: dict[str, Any] = {
        "endpoint": "/v1/completions", "model": remote.model(), "temperature": 0.0, "ignore_eos": True, "warmup": 0,
        "max_concurrency": None, "request_rate": rate, "seed": seed,
    }  # fmt: skip
    works = [bench_serve.Work(prompt, length) for prompt in prompts]
    used = time.process_time()
    seconds, seen = asyncio.run(bench_serve.measure(remote, works, options))
    used = time.process_time() - used
    events = sum(1 + len(s.gaps) for s in seen if s.first is not None)
    found = bench_serve.report(seen, seconds)
    more = {"requests": len(works), "tokens_per_event": found["output_tokens"] / max(1, events), "client_cpu_s": used}
    return found | more


def run(
    model: str,
    more: Sequence[str] = (),
    rates: Sequence[float] = (20, 40),
    seconds: float = 20,
    burst: int = 1000,
    lengths: tuple[int, int] = (512, 128),
    out: Path | None = None,
) -> dict[str, Any]:
    """All loads, on one server; by rate, and "burst"."""
    folder = workloads.write_model(Path(tempfile.mkdtemp()), model)
    write_tokenizer(folder, workloads.MODELS[model]["vocab_size"])
    result: dict[str, Any] = {"arguments": list(more), "loads": {}}
    tokens_in, tokens_out = lengths
    loads = [(f"{rate:g}", rate, max(1, round(rate * seconds))) for rate in rates]
    loads += [("burst", math.inf, burst)] if burst else []
    server = ServerProcess(str(folder), "--load-format=dummy", "--dtype=bfloat16", *more)
    try:
        result["ready_s"] = server.ready_s
        measure(server.url, workloads.fixed(WARM_UP, tokens_in, 877), tokens_out, math.inf, 0)
        for i, (name, rate, count) in enumerate(loads):
            found = measure(server.url, workloads.fixed(count, tokens_in, 800 + i), tokens_out, rate, 800 + i)
            result["loads"][name] = found
            print(model, "W8", name, line(found), flush=True)
            if out is not None:
                out.write_text(json.dumps(result, indent=1))
            if found["failed"]:
                raise SystemExit(f"{found['failed']} requests failed: {found['errors']}")
    finally:
        server.stop()
    return result


def line(found: dict[str, Any]) -> str:
    """A load's figures."""
    parts = [f"{found['requests']} requests"]
    for name in ("ttft", "itl"):
        spread = found[f"{name}_ms"] or {}
        parts.append(f"{name} ms " + ", ".join(f"{p} {spread[p]:.2f}" for p in ("p50", "p99", "max") if p in spread))
    return "; ".join([*parts, f"{found['output_tokens_per_s']:.0f} output tokens/s"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="l8b", choices=sorted(workloads.MODELS))
    parser.add_argument("--json", type=Path, default=Path("serve.json"))
    parser.add_argument("--rates", type=float, nargs="*", default=[20, 40])
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--burst", type=int, default=1000)
    parser.add_argument("--lengths", type=int, nargs=2, default=[512, 128], metavar=("IN", "OUT"))
    args, more = parser.parse_known_args()
    more = [argument for argument in more if argument != "--"]
    run(args.model, more, args.rates, args.seconds, args.burst, tuple(args.lengths), args.json)


if __name__ == "__main__":
    main()
