"""One engine, one model, the offline workloads, in a process of its own: the same calls for quire and for vLLM.

    python -m benchmarks.gpu.offline --model l8b --tests w1,w3 --json out.json [--seconds 60] [--engine vllm]
        [--llm key=json ...]

Engines keep their defaults but for `max_model_len` (4096, for 8B 4352, for W4 8448) and, for W4, prefix caching off.
All workloads are measured once, then again, and so on; when `--seconds` are over (counted from the start of the
process), only what has not been measured at all is begun. quire's decode steps are also watched once (see `probe`).
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu import workloads

Run = tuple[float, int, int]  # seconds, tokens in, tokens out
BEGUN = time.perf_counter()


@dataclass(frozen=True)
class Test:
    """`run(i)` does a round, and gives one or more named results. `batch`: how many rows a test of decode steps has."""

    name: str
    rounds: int
    run: Callable[[int], dict[str, Run]]
    batch: int = 0


class Bench:
    def __init__(self, engine: str, model: str, options: dict[str, Any], out: Path) -> None:
        self.out, self.engine, self.model = out, engine, model
        self.runs: dict[str, list[Run]] = {}
        self.result: dict[str, Any] = {"engine": engine, "model": model, "llm": options, "tests": {}, "steps": {}}
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
        return seconds, sum(map(len, prompts)), count

    def measure(self, tests: Sequence[Test], deadline: float) -> None:
        """Rounds of all tests in turns, until all are done or what a test took last would end after `deadline`."""
        import torch

        took: dict[str, float] = {}
        for i in range(max(test.rounds for test in tests)):
            for test in tests:
                begin = time.perf_counter()
                if i >= test.rounds or (i and begin + took[test.name] > deadline):
                    continue
                for name, run in test.run(i).items():
                    self.record(name, run)
                if test.batch:
                    self.step(test.name)
                    if not i and self.engine == "quire" and torch.cuda.is_available():
                        self.watch(test)
                took[test.name] = time.perf_counter() - begin

    def record(self, name: str, run: Run) -> None:
        """A round more; rates are of the median."""
        runs = self.runs.setdefault(name, [])
        runs.append(run)
        middle, (_, tokens_in, tokens_out) = statistics.median(seconds for seconds, *_ in runs), run
        found = {
            "seconds": [round(seconds, 4) for seconds, *_ in runs],
            "output_tokens_per_s": round(tokens_out / middle, 1),
            "tokens_per_s": round((tokens_in + tokens_out) / middle, 1),
        }
        self.result["tests"][name] = found
        print(self.engine, self.model, name, found, flush=True)
        self.save()

    def step(self, name: str) -> None:
        """Milliseconds of a decode step: what 255 tokens more take."""
        whole, first = (statistics.median(run[0] for run in self.runs[key]) for key in (name, f"{name}_1"))
        found = self.result["steps"].setdefault(name, {})
        found["ms_per_step"] = round(1e3 * (whole - first) / 255, 4)
        print(self.engine, self.model, name, found["ms_per_step"], "ms a step", flush=True)
        self.save()

    def watch(self, test: Test) -> None:
        """Of a decode step: milliseconds of the device in graphs, and of the host but for its waiting, undisturbed."""
        from benchmarks.gpu import probe

        graphs: list[float] = []
        busy: list[float] = []
        for tokens, rounds in ((1, 3), (256, 2)):
            rows: list[tuple[float, float]] = []
            for i in range(rounds):
                prompts = workloads.fixed(test.batch, 128, 790 + 10 * i + tokens)
                with probe.watch() as seen:
                    seconds = self.generate(prompts, [tokens] * test.batch)[0]
                rows.append((seen.replayed_s(), seconds - seen.waited_s))
            graphs.append(min(graph for graph, _ in rows))
            busy.append(min(host for _, host in rows))
        found = self.result["steps"][test.name]
        for name, (first, whole) in {"graph_ms": graphs, "host_ms": busy}.items():
            found[name] = round(1e3 * (whole - first) / 255, 4)
        print(self.engine, self.model, test.name, found, flush=True)
        self.save()

    def decode(self, name: str, batch: int, seed: int, rounds: int) -> Test:
        def run(i: int) -> dict[str, Run]:
            one = self.generate(workloads.fixed(batch, 128, seed + i), [1] * batch)
            return {f"{name}_1": one, name: self.generate(workloads.fixed(batch, 128, seed + 20 + i), [256] * batch)}

        return Test(name, rounds, run, batch)

    def w1(self) -> Iterator[Test]:
        prompts, lengths = workloads.varied()

        def run(i: int) -> dict[str, Run]:
            self.llm.reset_prefix_cache()
            return {"W1": self.generate(prompts, lengths, 0.6)}

        yield Test("W1", 3, run)

    def w2(self) -> Iterator[Test]:
        yield Test("W2", 3, lambda i: {"W2": self.generate(workloads.fixed(1000, 512, 20 + i), [128] * 1000)})

    def w3(self) -> Iterator[Test]:
        yield self.decode("W3", 1, 300, 5)

    def w4(self) -> Iterator[Test]:
        for name, count, length, seed, rounds in (
            ("W4_1x8192", 1, 8192, 400, 7), ("W4_1x4096", 1, 4096, 420, 5), ("W4_16x4096", 16, 4096, 440, 3),
        ):  # fmt: skip

            def run(i: int, name: str = name, count: int = count, length: int = length, seed: int = seed):
                return {name: self.generate(workloads.fixed(count, length, seed + i), [1] * count)}

            yield Test(name, rounds, run)

    def w6(self) -> Iterator[Test]:
        def run(i: int) -> dict[str, Run]:
            prompts = workloads.shared(64, 4096, 64, 600 + i)
            self.llm.reset_prefix_cache()
            new = self.generate(prompts, [64] * 64)
            own = workloads.fixed(64, 64, 650 + i)
            again = [p[:4096] + o for p, o in zip(prompts, own, strict=True)]
            return {"W6_new": new, "W6_cached": self.generate(again, [64] * 64)}

        yield Test("W6", 3, run)

    def w7(self) -> Iterator[Test]:
        for count in (64, 256):
            yield self.decode(f"W7_{count}", count, 700 + count, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="quire")
    parser.add_argument("--model", default="l1b", choices=sorted(workloads.MODELS))
    parser.add_argument("--tests", default="w1,w3,w7", help="comma-separated, of w1 w2 w3 w4 w6 w7")
    parser.add_argument("--json", type=Path, default=Path("offline.json"))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further round after so many")
    parser.add_argument("--llm", nargs="*", default=[], metavar="key=json", help="arguments of LLM")
    args = parser.parse_args()
    given = {key: json.loads(value) for key, _, value in (pair.partition("=") for pair in args.llm)}
    bench = Bench(args.engine, args.model, given, args.json)
    known: dict[str, Callable[[], Iterator[Test]]] = {
        "w1": bench.w1, "w2": bench.w2, "w3": bench.w3, "w4": bench.w4, "w6": bench.w6, "w7": bench.w7,
    }  # fmt: skip
    tests = [test for name in args.tests.split(",") for test in known[name]()]
    bench.measure(tests, BEGUN + args.seconds)


if __name__ == "__main__":
    main()
