"""Is it right on this GPU? Kernels against their references, tokens against Transformers, real sizes against float32.

    python -m benchmarks.gpu.check [--only kernels,parity,sizes,life,determinism,long] [--long]

- kernels: `tests/ops/triton`, where the kernels run for real;
- parity: `tests/parity/test_engine.py` on the GPU: each native architecture, float32, token by token, with preemption,
  chunks, prefix hits, forks and beams; then the same tokens with block sizes 16 and 32, with swapping, with n=8;
- sizes: bf16 logprobs at real shapes no farther from a float32 engine's than those of plain PyTorch in bf16;
- long: the same at 32,000 tokens;
- determinism: `deterministic=True` gives the same tokens in any batch, in chunks, after prefix hits and preemption;
- life: two engines in one process, memory given back, a start after SIGKILL.

Prints a line for each and exits with 1 if any failed.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu import workloads

from quire import LLM, SamplingParams

PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark", "-p", "no:xdist"]
RESULTS: list[tuple[str, bool, str]] = []


def tell(name: str, fine: bool, what: str) -> None:
    RESULTS.append((name, fine, what))
    print("ok  " if fine else "FAIL", name, what, flush=True)


def pytest(name: str, *arguments: str) -> None:
    start = time.monotonic()
    done = subprocess.run([*PYTEST, *arguments], capture_output=True, text=True, check=False)
    last = done.stdout.strip().splitlines()[-1:] or done.stderr.strip().splitlines()[-1:]
    if done.returncode:
        print(done.stdout[-6000:], done.stderr[-2000:])
    tell(name, done.returncode == 0, f"{''.join(last)} ({time.monotonic() - start:.0f} s)")


def kernels() -> None:
    pytest("kernels", "tests/ops/triton")


def parity() -> None:
    pytest("parity", "tests/parity/test_engine.py")
    with tempfile.TemporaryDirectory() as root:
        folder = tiny(Path(root))
        prompts = [p[: 3 + 11 * i] for i, p in enumerate(workloads.fixed(12, 160, 5))]
        prompts = [[token % 190 + 3 for token in p] for p in prompts]
        plain = tokens(folder, prompts, device="cpu", ops={"*": "reference"}, enforce_eager=True)
        for name, options in {
            "block size 16": {"block_size": 16},
            "block size 32": {"block_size": 32},
            "swapping": {"block_size": 4, "num_gpu_blocks_override": 90, "swap_space": 0.05},
            "eager": {"enforce_eager": True},
            "depth 1": {"async_scheduling": False},
        }.items():
            got = tokens(folder, prompts, **options)
            tell(f"tokens, {name}", got == plain, f"{sum(map(eq, got, plain))} of {len(plain)} as on a CPU")
        sampled = tokens(folder, prompts[:3], n=8)
        expected = tokens(folder, prompts[:3], n=8, device="cpu", ops={"*": "reference"}, enforce_eager=True)
        count = sum(map(eq, sampled, expected))
        tell("tokens, n=8, seeded", count >= len(expected) - 1, f"{count} of {len(expected)} as on a CPU")


def eq(a: Any, b: Any) -> bool:
    return a == b


def tiny(root: Path) -> Path:
    """A checkpoint with weights large enough that outputs vary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=96, intermediate_size=160, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
        vocab_size=211, max_position_embeddings=512, tie_word_embeddings=False, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained(root)
    return root


def tokens(folder: Path, prompts: list[list[int]], n: int = 1, **options: Any) -> list[list[list[int]]]:
    fixed = {"dtype": "float32", "skip_tokenizer_init": True, "max_model_len": 256, "max_num_batched_tokens": 64}
    room = {} if "num_gpu_blocks_override" in options else {"kv_cache_memory_bytes": 1 << 28}
    with LLM(str(folder), max_num_seqs=16, **fixed, **room, **options) as llm:
        common: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True, "detokenize": False, "n": n}
        params = SamplingParams(**({"temperature": 0.0} if n == 1 else {"temperature": 1.0, "seed": 5}), **common)
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        if "swap_space" in options:
            assert llm.llm_engine.client.stats().preemptions > 0
        return [[list(c.token_ids) for c in output.outputs] for output in outputs]


def logprobs(model: str, prompt: list[int], **options: Any) -> torch.Tensor:
    """Of each prompt token but the first, and of 8 more that are forced by nothing but greed (float32 picks them)."""
    folder = workloads.write_model(Path(tempfile.mkdtemp()), model)
    fixed = {"load_format": "dummy", "skip_tokenizer_init": True, "max_model_len": len(prompt) + 16}
    with LLM(str(folder), kv_cache_memory_bytes=8 << 30, max_num_seqs=4, **fixed, **options) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        lines = output.prompt_logprobs
        return torch.tensor(
            [next(iter(line.values())).logprob for line in lines if line is not None], dtype=torch.float64
        )


def sizes(*cases: tuple[str, int]) -> None:
    plain = {"ops": {"*": "reference"}, "enforce_eager": True}
    for model, length in cases:
        (prompt,) = workloads.fixed(1, length, 7)
        exact = logprobs(model, prompt, dtype="float32", **plain)
        spread = (exact - exact.mean()).square().mean().sqrt()
        error = (logprobs(model, prompt, dtype="bfloat16") - exact).square().mean().sqrt() / spread
        reference = (logprobs(model, prompt, dtype="bfloat16", **plain) - exact).square().mean().sqrt() / spread
        wrong = (logprobs(model, prompt, dtype="bfloat16", seed=1) - exact).square().mean().sqrt() / spread
        fine = bool(error <= 1.25 * reference + 1e-3 and wrong > 4 * error)
        what = f"error of logprobs {error:.4f} of their spread; PyTorch {reference:.4f}; other weights {wrong:.2f}"
        tell(f"{model}, {length} tokens, bf16", fine, what)


def life() -> None:
    folder = workloads.write_model(Path(tempfile.mkdtemp()), "qwen06")
    fixed: dict[str, Any] = {"load_format": "dummy", "skip_tokenizer_init": True, "max_model_len": 2048}
    prompts = [{"prompt_token_ids": p} for p in workloads.fixed(5, 40, 1)]
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True, detokenize=False)

    def run(llm: LLM) -> list[list[int]]:
        llm.reset_prefix_cache()  # what is found there was rounded elsewhere
        return [list(o.outputs[0].token_ids) for o in llm.generate(prompts, params, use_tqdm=False)]

    before = torch.cuda.memory_allocated()
    with LLM(str(folder), gpu_memory_utilization=0.3, **fixed) as one:
        alone = run(one)
        with LLM(str(folder), gpu_memory_utilization=0.3, **fixed) as two:
            tell("two engines in one process", run(two) == alone == run(one), "same tokens")
    torch.cuda.empty_cache()
    left = torch.cuda.memory_allocated() - before
    # cuBLAS keeps a workspace of 32 MiB for each stream it ran on, for whoever comes next
    tell("memory given back", left <= 96 << 20, f"{left / 2**20:.0f} MiB are left")
    program = (
        "import sys; from quire import LLM\n"
        f"llm = LLM({str(folder)!r}, load_format='dummy', skip_tokenizer_init=True, max_model_len=2048)\n"
        "print('ready', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdin=-1, stdout=-1, env=os.environ, text=True)
    assert child.stdout is not None
    ready = child.stdout.readline().strip()
    child.send_signal(signal.SIGKILL)
    child.wait()
    with LLM(str(folder), gpu_memory_utilization=0.5, **fixed) as again:
        tell("a start after SIGKILL", ready == "ready" and run(again) == alone, "same tokens")


def determinism() -> None:
    """Tokens of some prompts alone, against the same among 6 and 63 others, in chunks, after prefix hits and preempted;
    and that without `deterministic` this finds differences."""
    folder = workloads.write_model(Path(tempfile.mkdtemp()), "l1b")
    lengths = (5, 33, 130, 257, 300, 511, 700)
    (text,) = workloads.fixed(1, 700, 11)
    prompts = [text[:n] if i % 2 else workloads.fixed(1, n, 20 + i)[0] for i, n in enumerate(lengths)]
    others = [p[: 40 + 9 * i] for i, p in enumerate(workloads.fixed(57, 560, 12))]

    def run(llm: LLM, batch: list[list[int]]) -> list[list[int]]:
        params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": p} for p in batch], params, use_tqdm=False)
        return [list(o.outputs[0].token_ids) for o in outputs]

    def cases(mode: bool) -> dict[str, int]:
        """How many of the prompts give the tokens that they give alone."""
        fixed: dict[str, Any] = {
            "load_format": "dummy", "skip_tokenizer_init": True, "dtype": "bfloat16", "max_model_len": 1024,
            "deterministic": mode,
        }  # fmt: skip
        got: dict[str, list[list[int]]] = {}
        with LLM(str(folder), gpu_memory_utilization=0.3, **fixed) as llm:
            alone: list[list[int]] = []
            for prompt in prompts:
                llm.reset_prefix_cache()
                alone += run(llm, [prompt])
            got["again, prefixes known"] = [run(llm, [prompt])[0] for prompt in prompts]
            llm.reset_prefix_cache()
            got["7 at once"] = run(llm, prompts)
            llm.reset_prefix_cache()
            got["64 at once"] = run(llm, prompts + others)[: len(prompts)]
        with LLM(str(folder), gpu_memory_utilization=0.3, max_num_batched_tokens=96, max_num_seqs=64, **fixed) as llm:
            got["chunks of 96"] = run(llm, prompts + others)[: len(prompts)]
        with LLM(str(folder), num_gpu_blocks_override=150, **fixed) as llm:
            got["preempted"] = run(llm, others + prompts)[-len(prompts) :]
            assert llm.llm_engine.client.stats().preemptions > 0
        return {name: sum(map(eq, tokens, alone)) for name, tokens in got.items()}

    equal = cases(True)
    for name, count in equal.items():
        tell(f"deterministic, {name}", count == len(prompts), f"{count} of {len(prompts)} as alone")
    control = cases(False)
    tell("without it, they differ somewhere", sum(control.values()) < len(prompts) * len(control), str(control))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="kernels,parity,sizes,life,determinism")
    parser.add_argument("--long", action="store_true", help="32,000 tokens too")
    args = parser.parse_args()
    parts: dict[str, Callable[[], None]] = {
        "kernels": kernels, "parity": parity, "life": life, "determinism": determinism,
        "sizes": lambda: sizes(("l1b", 700), ("qwen06", 700), ("l8b", 700)), "long": lambda: sizes(("l1b", 32_000)),
    }  # fmt: skip
    for name in [*filter(None, args.only.split(",")), *(["long"] if args.long else [])]:
        try:
            parts[name]()
        except Exception as error:
            tell(name, False, f"{type(error).__name__}: {error}")
    raise SystemExit(any(not fine for _, fine, _ in RESULTS))


if __name__ == "__main__":
    main()
