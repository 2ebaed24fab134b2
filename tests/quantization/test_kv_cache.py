"""A KV cache in int8: nearly the same answers from half the bytes, native and plain, through preemption and swaps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quire import LLM, SamplingParams
from quire.ops.native.library import load

PROMPTS = [f"Add {n} and {n + 3}." for n in range(12)]
SMALL: dict[str, Any] = dict(
    max_model_len=512, kv_cache_memory_bytes="16M", max_num_seqs=16, threads=1, log_level="warning"
)


def answers(**arguments: Any) -> tuple[list[list[int]], torch.Tensor]:
    """(tokens of each answer, logprobs of all prompt tokens)."""
    with LLM(**(SMALL | arguments)) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=24, prompt_logprobs=0)
        outputs = llm.chat([[{"role": "user", "content": text}] for text in PROMPTS], params, use_tqdm=False)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    lines = [
        next(iter(entry.values())).logprob for output in outputs for entry in output.prompt_logprobs or () if entry
    ]
    return tokens, torch.tensor(lines)


def agreement(a: list[list[int]], b: list[list[int]]) -> float:
    """Share of tokens up to the first that differs."""
    same = 0
    for x, y in zip(a, b, strict=True):
        same += next((i for i, (s, t) in enumerate(zip(x, y, strict=False)) if s != t), min(len(x), len(y)))
    return same / sum(max(len(x), len(y)) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def exact() -> tuple[list[list[int]], torch.Tensor]:
    return answers(dtype="float32")


@pytest.mark.parametrize("ops", [{}, {"*": "reference"}], ids=["native", "reference"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_nearly_the_same(exact: tuple[list[list[int]], torch.Tensor], ops: dict[str, str], dtype: str) -> None:
    if not ops and isinstance(reason := load(), str):
        pytest.skip(reason)
    tokens, lines = answers(dtype=dtype, kv_cache_dtype="int8", ops=ops)
    off = (lines - exact[1]).abs()
    assert 0 < off.mean() < 0.02, "rounded, and hardly"
    assert agreement(tokens, exact[0]) >= 0.9


def test_pages_swap_and_fork_as_others_do() -> None:
    """So few pages that sequences are preempted and their pages go to the host and back: the tokens do not change."""
    plain, _ = answers(dtype="float32", kv_cache_dtype="int8", enable_prefix_caching=False)
    tight, _ = answers(
        dtype="float32", kv_cache_dtype="int8", enable_prefix_caching=False, kv_cache_memory_bytes=None,
        num_gpu_blocks_override=16, swap_space=0.01, max_model_len=128,
    )  # fmt: skip
    assert agreement(tight, plain) >= 0.98
