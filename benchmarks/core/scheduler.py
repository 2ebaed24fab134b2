"""Cost of the core alone: schedule + commit of steadily decoding sequences, in microseconds a sequence and step.

    python benchmarks/core/scheduler.py [--sequences 256] [--steps 400] [--depth 1] [--stream]

No model, no device: results are arrays of made-up tokens. Median of the steps, since machines are noisy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import deque

import numpy as np

from quire.core.scheduler import Scheduler
from quire.types.kv import KVGroup
from quire.types.params import SamplingParams
from quire.types.plan import Plan, StepResult
from quire.types.request import Request


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--depth", type=int, default=1)
    parser.add_argument("--eos", type=int, default=1, help="how many end tokens the model has")
    parser.add_argument("--stream", action="store_true", help="a delta for each token, as a server needs")
    args = parser.parse_args()
    blocks = args.sequences * ((180 + args.steps) // 16 + 1)
    scheduler = Scheduler(
        (KVGroup("full", (0,)),), blocks, 16, args.sequences, 1 << 16, 180 + args.steps,
        lead=int(args.depth > 1),
    )  # fmt: skip
    for i in range(args.sequences):
        prompt = [(i * 31 + j) % 997 for j in range(100 + i % 16)]  # staggered, so that steps cross block borders alike
        params = SamplingParams(max_tokens=args.steps + 60, temperature=0.0)
        scheduler.add(
            Request(
                str(i), prompt, params, seed=i, eos_token_ids=tuple(range(1000, 1000 + args.eos)), stream=args.stream
            )
        )
    flights: deque[Plan] = deque()
    times: list[float] = []
    for _ in range(args.steps):
        begin = time.perf_counter()
        while len(flights) < args.depth and (plan := scheduler.schedule()) is not None:
            flights.append(plan)
        plan = flights.popleft()
        between = time.perf_counter()
        count = len(plan.sample_rows)
        result = StepResult(plan.number, np.full((count, 1), 7, np.int32), np.ones(count, np.int32))
        again = time.perf_counter()
        scheduler.commit(plan, result)
        if count == args.sequences:
            times.append((between - begin) + (time.perf_counter() - again))
    per_sequence = statistics.median(times) / args.sequences * 1e6
    print(json.dumps({
        "sequences": args.sequences, "depth": args.depth, "stream": args.stream,
        "us_per_sequence_and_step": round(per_sequence, 3), "us_per_step": round(per_sequence * args.sequences, 1),
        "target": 1.0,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
