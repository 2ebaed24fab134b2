"""Do the seams hold on a GPU? Reference ops on CUDA, plans in flight at depth 2, a decode step as a captured graph.

    python benchmarks/gpu/seams.py [--out FOLDER]

Checks first (tokens of a tiny float32 model are those of Transformers, on the CPU and the GPU, at depth 1 and 2, with
and without the graph, under preemption and swapping), then times a decode step of a 1B shape. Nothing here is tuned:
the figures show what the host costs, not what the GPU can do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quire import LLM, SamplingParams
from quire.runner import batch as batches
from quire.runner.model_runner import ModelRunner, Pending
from quire.runner.sampler import sample_greedy
from quire.types.plan import Plan, ints

TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 211, "hidden_size": 96,
    "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "torch_dtype": "float32", "eos_token_id": 2, "bos_token_id": 1, "hidden_act": "silu",
}  # fmt: skip
LLAMA_1B = {
    **TINY, "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 2048, "torch_dtype": "bfloat16",
    "tie_word_embeddings": True, "rope_theta": 500000.0,
}  # fmt: skip


class StaticInputs:
    """Stands for an `Upload`: the arrays of a decode step of `rows` rows, at addresses that a graph can record."""

    def __init__(self, rows: int, padding_row: int, device: torch.device) -> None:
        one = {"counts": 1, "within": 0, "tokens": -1, "rows": padding_row, "starts": -1, "upper": 0}
        order = torch.arange(rows, device=device)
        self.tensors = {name: torch.full((rows,), value, device=device) for name, value in one.items()}
        self.tensors |= {
            "row_of": order,
            "sample_index": order,
            "last": order,
            "cu_q": torch.arange(rows + 1, device=device),
        }
        self.tensors["sample_rows"] = self.tensors["rows"]
        self.padding = {"rows": padding_row, "starts": -1, "upper": 0}

    def fill(self, upload: Any, rows: int) -> None:
        for name, padding in self.padding.items():
            self.tensors[name][:rows].copy_(upload[name])
            self.tensors[name][rows:] = padding

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]


class GraphRunner(ModelRunner):
    """A model runner whose pure greedy decode steps replay one captured graph: gather, forward, sample."""

    replays = 0

    def capture(self, rows: int, max_len: int, device: torch.device) -> GraphRunner:
        self._inputs = StaticInputs(rows, self._table.padding_row, device)
        longest = ints([max_len - 1] * rows)
        plan = Plan(
            -1, ints([0] * rows), longest, ints([1] * rows), np.zeros(rows, np.bool_), ints([0] * (rows + 1)), ints(),
            ints(range(rows)), ints([0] * rows), (),
        )  # fmt: skip
        with torch.inference_mode():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._forward(plan)
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._out = self._forward(plan)
        self._rows = rows
        return self

    def _forward(self, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
        table = self._table
        batch = batches.build(plan, self._inputs, table, self._store.layers)  # type: ignore[arg-type]
        hidden_TD = self._model(batch.tokens_T, batch.step.positions_T, batch.step)
        tokens_S, top_S = sample_greedy(self._model.compute_logits(hidden_TD))
        table.last_R[batch.rows_R] = tokens_S
        table.length_R[batch.rows_R] = batch.lengths_R
        return tokens_S, top_S

    @torch.inference_mode()
    def submit(self, plan: Plan) -> Pending:
        count = len(plan.rows)
        if not count or count > self._rows or (plan.counts != 1).any() or len(plan.tokens):
            return super().submit(plan)
        table, upload = self._table, self._upload
        table.stage(plan, upload)
        batches.stage(plan, upload)
        upload.send()
        table.apply(plan, upload)
        self._store.move(plan.swap_out, plan.swap_in, plan.copies)
        self._inputs.fill(upload, count)
        self._graph.replay()
        self.replays += 1
        tokens_S, top_S = self._out
        return Pending(plan.number, self._sampler._sampled(tokens_S[:count], top_S[:count], [], []), ())


def with_graph(llm: LLM, rows: int) -> GraphRunner:
    worker = llm.llm_engine.client._executor.worker  # type: ignore[attr-defined]
    old = worker._runner
    runner = GraphRunner(old._model, old._store, old._table, old._sampler, old._replay, worker.device, 2)
    worker._runner = runner.capture(rows, llm.llm_engine.config.model.max_model_len, worker.device)
    return runner


def generate(llm: LLM, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": list(p)} for p in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@torch.inference_mode()
def agrees(reference: Any, prompt: list[int], tokens: list[int]) -> bool:
    """Transformers, fed these tokens, finds each of them likeliest (to within 1e-4 of the logits' spread)."""
    logits = reference(torch.tensor([[*prompt, *tokens]], device="cuda")).logits[0, len(prompt) - 1 : -1].float()
    best, spread = logits.max(-1).values, logits.max(-1).values - logits.min(-1).values
    chosen = logits.gather(-1, torch.tensor(tokens, device="cuda")[:, None])[:, 0]
    return bool((best - chosen <= 1e-4 * spread).all())


def check(folder: Path) -> list[dict[str, Any]]:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained(folder)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 211, size=int(n)).tolist() for n in rng.integers(2, 200, size=24)]
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().cuda()
    common = {
        "model": str(folder), "dtype": "float32", "skip_tokenizer_init": True, "block_size": 16,
        "max_num_batched_tokens": 128, "max_num_seqs": 16,
    }  # fmt: skip
    cases: list[tuple[str, dict[str, Any], bool]] = [
        ("cpu", {"device": "cpu"}, False),
        ("cuda depth 1", {"device": "cuda", "async_scheduling": False}, False),
        ("cuda depth 2", {"device": "cuda"}, False),
        ("cuda depth 2, graph", {"device": "cuda"}, True),
        ("cuda depth 2, graph, preemption", {"device": "cuda", "num_gpu_blocks_override": 40}, True),
        ("cuda depth 2, graph, swap", {"device": "cuda", "num_gpu_blocks_override": 40, "swap_space": 0.05}, True),
    ]
    rows = []
    for name, options, graph in cases:
        options = {"kv_cache_memory_bytes": 1 << 28, **options}
        if "num_gpu_blocks_override" in options:
            options.pop("kv_cache_memory_bytes")
        llm = LLM(**common, **options)
        runner = with_graph(llm, 16) if graph else None
        tokens = generate(llm, prompts, 40)
        schedule = llm.llm_engine.config.scheduler
        rows.append({
            "case": name, "of": len(prompts),
            "equal": sum(agrees(reference, *pair) for pair in zip(prompts, tokens, strict=True)),
            "depth": schedule.depth, "lead": schedule.lead, "preemptions": llm.llm_engine.client.stats().preemptions,
            "replays": runner.replays if runner else 0,
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
        llm.close()
    return rows


def time_steps(folder: Path, batch: int, steps: int) -> list[dict[str, Any]]:
    (folder / "config.json").write_text(json.dumps(LLAMA_1B))
    rows = []
    prompts = [[(7 * i + j) % 1000 + 3 for j in range(64)] for i in range(batch)]
    for name, options, graph in (
        ("depth 1", {"async_scheduling": False}, False),
        ("depth 2", {}, False),
        ("depth 2, graph", {}, True),
    ):
        llm = LLM(
            model=str(folder), skip_tokenizer_init=True, load_format="dummy", max_model_len=512, max_num_seqs=batch,
            kv_cache_memory_bytes=1 << 32, enable_prefix_caching=False, **options,
        )  # fmt: skip
        runner = with_graph(llm, batch) if graph else None
        generate(llm, prompts, 8)
        core = llm.llm_engine.client
        submit_s, begins = [], []
        executor = core._executor  # type: ignore[attr-defined]
        plain = executor.submit

        def timed(
            plan: Plan, plain: Any = plain, begins: list[float] = begins, submit_s: list[float] = submit_s
        ) -> Any:
            begin = time.perf_counter()
            out = plain(plan)
            submit_s.append(time.perf_counter() - begin)
            begins.append(begin)
            return out

        executor.submit = timed
        torch.cuda.synchronize()
        generate(llm, prompts, steps)
        gaps = np.diff(begins)[5:-2]
        rows.append({
            "case": name, "batch": batch, "ms_per_step": round(statistics.median(gaps.tolist()) * 1e3, 3),
            "submit_ms": round(statistics.median(submit_s[5:-2]) * 1e3, 3), "replays": runner.replays if runner else 0,
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
        llm.close()
        del llm, core, executor, plain, timed
        torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        (folder := Path(name) / "tiny").mkdir()
        (large := Path(name) / "1b").mkdir()
        checks = check(folder)
        times = time_steps(large, 64, 100) + time_steps(large, 1, 100)
    report = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "checks": checks, "times": times}
    if args.out is not None:
        (args.out / "seams.json").write_text(json.dumps(report, indent=1))
    if any(row["equal"] != row["of"] for row in checks):
        raise SystemExit("tokens differ")


if __name__ == "__main__":
    main()
