"""A Llama as quire's own class, and the same weights from Transformers' code: what running somebody else's code costs.

    python -m benchmarks.backend [--device cuda] [--model l8b] [--rounds 3] [--json out.json] [--llm key=json ...]

Three engines, one after another in one process, on random weights: `native` (model_impl="quire"), `transformers`
(model_impl="transformers", which finds that the code computes what quire's blocks do), and `code` (the same, without
that: the model's own layers, with quire's attention and feed-forward blocks in them). Two workloads: `decode` (many
short prompts, long answers) and `prefill` (long prompts, one token). Greedy answers are compared as well: those of the
first two must be equal, since it is the same arithmetic on the same numbers.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.gpu import workloads

IMPLEMENTATIONS = ("native", "transformers", "code")
SMALL = {
    "m135": {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3},
}
# (requests, tokens in, tokens out) on each device.
WORK = {
    "cpu": {"decode": (16, 32, 64), "prefill": (4, 512, 1)},
    "cuda": {"decode": (64, 128, 256), "prefill": (16, 2048, 1)},
}


def config_of(model: str) -> dict[str, Any]:
    """config.json of a shape; m135 is that of SmolLM-135M."""
    if model in SMALL:
        rest = {"head_dim": 64, "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True}
        return {**workloads.MODELS["l1b"], **SMALL[model], **rest}
    return workloads.MODELS[model]


@contextmanager
def engine(folder: Path, implementation: str, options: dict[str, Any]) -> Iterator[Any]:
    """An `LLM`; `code` never takes quire's blocks for the model's own."""
    quire = importlib.import_module("quire")
    impl = "quire" if implementation == "native" else "transformers"
    unlike = mock.patch("quire.models.transformers.model.likeness", lambda *args: None)
    with unlike if implementation == "code" else mock.MagicMock():
        llm = quire.LLM(model=str(folder), model_impl=impl, load_format="dummy", skip_tokenizer_init=True, **options)
    try:
        yield llm
    finally:
        llm.llm_engine.shutdown()
        del llm
        gc.collect()


def measure(llm: Any, work: dict[str, tuple[int, int, int]], rounds: int) -> tuple[dict[str, float], Any]:
    """Tokens a second of each workload (in and out), the median of the rounds, and the first answers."""
    params_of = importlib.import_module("quire").SamplingParams
    speeds: dict[str, list[float]] = {name: [] for name in work}
    answers: Any = None
    for turn in range(rounds + 1):
        for name, (requests, tokens_in, tokens_out) in work.items():
            prompts = [{"prompt_token_ids": ids} for ids in workloads.fixed(requests, tokens_in, 31 * turn + 7)]
            params = params_of(temperature=0.0, max_tokens=tokens_out, ignore_eos=True, detokenize=False)
            start = time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            seconds = time.perf_counter() - start
            if turn:  # the first round warms up
                speeds[name].append(requests * (tokens_in + tokens_out) / seconds)
            elif name == "decode":
                answers = [list(output.outputs[0].token_ids) for output in outputs]
    return {name: statistics.median(each) for name, each in speeds.items()}, answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=sorted(WORK), default="cpu")
    parser.add_argument("--model", choices=[*SMALL, *workloads.MODELS], default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=IMPLEMENTATIONS, action="append")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--llm", action="append", default=[], help="key=json, handed to LLM")
    args = parser.parse_args()
    model = args.model or ("l1b" if args.device == "cuda" else "m135")
    options = {"dtype": "bfloat16", "device": args.device, "max_model_len": 4096, "disable_log_stats": True}
    options |= {key: json.loads(value) for key, _, value in (each.partition("=") for each in args.llm)}
    results: dict[str, dict[str, float]] = {}
    answers: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        (folder / "config.json").write_text(json.dumps(config_of(model)))
        for implementation in args.only or IMPLEMENTATIONS:
            start = time.perf_counter()
            with engine(folder, implementation, options) as llm:
                ready = time.perf_counter() - start
                speeds, answers[implementation] = measure(llm, WORK[args.device], args.rounds)
            results[implementation] = {"ready_s": ready, **speeds}
            del llm
            gc.collect()
            if args.device == "cuda":
                importlib.import_module("torch").cuda.empty_cache()
            shown = "  ".join(f"{name} {value:10.1f}" for name, value in results[implementation].items())
            print(f"{model} {implementation:12s} {shown}", flush=True)
    if "native" in results:
        for name in results:
            shares = {key: results[name][key] / results["native"][key] for key in WORK[args.device]}
            same = answers[name] == answers["native"]
            print(f"{name:12s} of native: {', '.join(f'{k} {v:.1%}' for k, v in shares.items())}; same tokens: {same}")
    if args.json:
        args.json.write_text(json.dumps({"model": model, "device": args.device, "results": results}, indent=1))


if __name__ == "__main__":
    main()
