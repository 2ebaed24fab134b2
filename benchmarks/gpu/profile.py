"""Where the time of a decode step and of a prefill goes: kernels on the device, and the host between two steps.

python -m benchmarks.gpu.profile --model l1b [--batch 64] [--prompt 128] [--steps 20] [--llm key=json ...]
python -m benchmarks.gpu.profile --model l8b --prefill 8192
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu import workloads

from quire import LLM, SamplingParams
from quire.sampling_params import RequestOutputKind


def kernels(run: Any, steps: int, top: int = 16) -> None:
    """Prints the kernels by their time a step, the busy share of the device, and how many were launched a step."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        wall = time.perf_counter() - start
    total: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    busy, begin, end = 0.0, float("inf"), 0.0
    for event in profile.events() or ():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            taken = event.time_range.end - event.time_range.start
            total[event.name][0] += taken
            total[event.name][1] += 1
            busy += taken
            begin, end = min(begin, event.time_range.start), max(end, event.time_range.end)
    launched = sum(count for _, count in total.values())
    print(f"{wall / steps * 1e3:.3f} ms a step under the profiler; the device: {busy / steps / 1e3:.3f} ms a step,")
    print(f"busy {busy / max(end - begin, 1e-9):.0%} of the time; {launched / steps:.0f} kernels a step")
    for name, (taken, count) in sorted(total.items(), key=lambda item: -item[1][0])[:top]:
        print(
            f"  {taken / steps:9.1f} us {taken / busy:6.1%} {count / steps:7.1f} x {taken / count:8.2f} us  {name[:90]}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="l1b", choices=sorted(workloads.MODELS))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prefill", type=int, default=0, help="profile one prompt of this length instead")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--host", action="store_true", help="also the host's functions, by their own time")
    parser.add_argument("--llm", nargs="*", default=[], metavar="key=json", help="arguments of LLM")
    args = parser.parse_args()
    given = {key: json.loads(value) for key, _, value in (pair.partition("=") for pair in args.llm)}
    folder = workloads.write_model(Path(tempfile.mkdtemp()), args.model)
    options = {"load_format": "dummy", "skip_tokenizer_init": True, "dtype": "bfloat16", "max_model_len": 16384}
    llm = LLM(str(folder), **{**options, **given})
    engine = llm.llm_engine

    def add(seed: int, length: int, tokens: int) -> None:
        params = SamplingParams(
            temperature=args.temperature,
            ignore_eos=True,
            max_tokens=tokens,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        for i, prompt in enumerate(workloads.fixed(1 if args.prefill else args.batch, length, seed)):
            engine.add_request(f"{seed}-{i}", {"prompt_token_ids": prompt}, params)

    def finish() -> None:
        while engine.has_work:
            engine.step()

    if args.prefill:
        for seed in (1, 2):
            add(seed, args.prefill, 1)
            finish()
        add(3, args.prefill, 1)
        kernels(finish, 1)
        return
    tokens = 4 * args.steps + 40
    for seed in (1, 2):
        add(seed, args.prompt, tokens)
        finish()

    def steps(count: int) -> None:
        for _ in range(count):
            engine.step()

    add(3, args.prompt, tokens)
    steps(20)
    torch.cuda.synchronize()
    start = time.perf_counter()
    steps(args.steps)
    wall = time.perf_counter() - start
    print(f"{wall / args.steps * 1e3:.3f} ms a step, {args.batch} rows of {args.prompt} tokens and more")
    kernels(lambda: steps(args.steps), args.steps)
    # The host alone: a device that has nothing to do answers at once, so time the parts of a step where it waits not.
    waits = 0.0
    pending = type(engine.client._inflight[0][1]) if engine.client._inflight else None  # type: ignore
    if pending is not None:
        plain = pending.result

        def timed(self: Any) -> Any:
            nonlocal waits
            begin = time.perf_counter()
            if self.sampled is not None and self.sampled._event is not None:
                self.sampled._event.synchronize()
            waits += time.perf_counter() - begin
            return plain(self)

        pending.result = timed
        start = time.perf_counter()
        steps(args.steps)
        wall = time.perf_counter() - start
        pending.result = plain
        print(f"host {(wall - waits) / args.steps * 1e3:.3f} ms a step, waiting {waits / args.steps * 1e3:.3f} ms")
    if args.host:
        profiler = cProfile.Profile()
        profiler.enable()
        steps(args.steps)
        profiler.disable()
        pstats.Stats(profiler).sort_stats("tottime").print_stats(22)
    finish()


if __name__ == "__main__":
    main()
