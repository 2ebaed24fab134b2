"""One engine, one model, the offline workloads, in a process of its own: the same calls for quire and for vLLM.

    python -m benchmarks.gpu.offline --model l8b --tests w1,w3 --json out.json [--engine vllm] [--llm key=json ...]

Engines keep their defaults but for `max_model_len` (4096, for 8B 4352, for W4 8448) and, for W4, prefix caching off.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import workloads

Run = tuple[float, int]  # seconds, output tokens


class Bench:
    def __init__(self, engine: str, model: str, options: dict[str, Any], out: Path) -> None:
        self.out, self.engine, self.model = out, engine, model
        self.result: dict[str, Any] = {"engine": engine, "model": model, "llm": options, "tests": {}}
        start = time.perf_counter()
        module = importlib.import_module(engine)
        self.params, make = module.SamplingParams, module.LLM
        self.result["import_s"] = time.perf_counter() - start
        self.result["version"] = module.__version__
        folder = workloads.write_model(Path(tempfile.mkdtemp()), model)
        start = time.perf_counter()
        fixed = {"load_format": "dummy", "skip_tokenizer_init": True, "dtype": "bfloat16"}
        self.llm = make(model=str(folder), **fixed, **options)
        self.result["ready_s"] = time.perf_counter() - start
        self.result["first_token_s"] = self.generate(workloads.fixed(1, 16, 997), [1])[0]
        self.generate(workloads.fixed(16, 64, 999), [16] * 16)
        self.generate(workloads.fixed(4, 300, 998), [8] * 4, 0.6)
        self.save()

    def save(self) -> None:
        self.out.write_text(json.dumps(self.result, indent=1))

    def generate(self, prompts: workloads.Prompts, lengths: Sequence[int], temperature: float = 0.0) -> Run:
        params = [
            self.params(temperature=temperature, ignore_eos=True, max_tokens=n, detokenize=False) for n in lengths
        ]
        start = time.perf_counter()
        outputs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        seconds = time.perf_counter() - start
        count = sum(len(output.outputs[0].token_ids) for output in outputs)
        assert count == sum(lengths), (count, sum(lengths))
        return seconds, count

    def record(self, name: str, runs: list[Run], tokens_in: int) -> float:
        """The median of some runs."""
        middle, count = statistics.median(seconds for seconds, _ in runs), runs[0][1]
        self.result["tests"][name] = {
            "seconds": [round(seconds, 4) for seconds, _ in runs],
            "output_tokens_per_s": round(count / middle, 1),
            "tokens_per_s": round((count + tokens_in) / middle, 1),
        }
        print(self.engine, self.model, name, self.result["tests"][name], flush=True)
        self.save()
        return middle

    def steps(self, name: str, count: int, seed: int, ones: int, rounds: int) -> None:
        """Milliseconds a step: what 255 tokens more take."""
        fixed = workloads.fixed
        one = [self.generate(fixed(count, 128, seed + i), [1] * count) for i in range(ones)]
        all_ = [self.generate(fixed(count, 128, seed + 20 + i), [256] * count) for i in range(rounds)]
        first = self.record(f"{name}_1", one, 128 * count)
        whole = self.record(name, all_, 128 * count)
        self.result["tests"][name]["ms_per_step"] = round(1e3 * (whole - first) / 255, 4)
        print(self.engine, self.model, name, self.result["tests"][name]["ms_per_step"], "ms a step", flush=True)
        self.save()

    def w1(self) -> None:
        prompts, lengths = workloads.varied()
        runs: list[Run] = []
        for _ in range(3):
            self.llm.reset_prefix_cache()
            runs.append(self.generate(prompts, lengths, 0.6))
        self.record("W1", runs, sum(map(len, prompts)))

    def w2(self) -> None:
        runs = [self.generate(workloads.fixed(1000, 512, 20 + i), [128] * 1000) for i in range(2)]
        self.record("W2", runs, 512_000)

    def w3(self) -> None:
        self.steps("W3", 1, 300, 7, 5)

    def w4(self) -> None:
        for name, count, length, seed, rounds in (
            ("W4_1x8192", 1, 8192, 400, 7), ("W4_1x4096", 1, 4096, 420, 5), ("W4_16x4096", 16, 4096, 440, 3),
        ):  # fmt: skip
            runs = [self.generate(workloads.fixed(count, length, seed + i), [1] * count) for i in range(rounds)]
            self.record(name, runs, count * length)

    def w6(self) -> None:
        new: list[Run] = []
        known: list[Run] = []
        for i in range(3):
            prompts = workloads.shared(64, 4096, 64, 600 + i)
            self.llm.reset_prefix_cache()
            new.append(self.generate(prompts, [64] * 64))
            own = workloads.fixed(64, 64, 650 + i)
            known.append(self.generate([p[:4096] + o for p, o in zip(prompts, own, strict=True)], [64] * 64))
        self.record("W6_new", new, 64 * 4160)
        self.record("W6_cached", known, 64 * 4160)

    def w7(self) -> None:
        for count in (64, 256):
            self.steps(f"W7_{count}", count, 700 + count, 3, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="quire")
    parser.add_argument("--model", default="l1b", choices=sorted(workloads.MODELS))
    parser.add_argument("--tests", default="w1,w3,w7", help="comma-separated, of w1 w2 w3 w4 w6 w7")
    parser.add_argument("--json", type=Path, default=Path("offline.json"))
    parser.add_argument("--llm", nargs="*", default=[], metavar="key=json", help="arguments of LLM")
    args = parser.parse_args()
    given = {key: json.loads(value) for key, _, value in (pair.partition("=") for pair in args.llm)}
    bench = Bench(args.engine, args.model, given, args.json)
    tests: dict[str, Callable[[], None]] = {
        "w1": bench.w1, "w2": bench.w2, "w3": bench.w3, "w4": bench.w4, "w6": bench.w6, "w7": bench.w7,
    }  # fmt: skip
    for name in args.tests.split(","):
        tests[name]()


if __name__ == "__main__":
    main()
