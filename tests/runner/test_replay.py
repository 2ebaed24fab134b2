"""Recorded steps give what eager ones give, and models that cannot be recorded run eagerly."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from quire import LLM, SamplingParams
from quire.ops.native.bound import kernels
from quire.ops.native.library import load
from quire.ops.native.recorder import Buffers
from quire.runner.replay import MAX_TOKENS, HostReplay, NoReplay

needs_library = pytest.mark.skipif(isinstance(load(), str), reason=str(load()))
PROMPTS = [[(7 * i + 3 * j) % 2000 + 10 for j in range(n)] for i, n in enumerate((1, 3, 90, 17, 33, 5))]


def replay_of(llm: LLM) -> Any:
    client: Any = llm.llm_engine.client
    return client._executor.worker._runner._replay


def run(**options: Any) -> tuple[list[Any], int]:
    """What is visible, and how many steps were replayed."""
    with LLM("demo", dtype="float32", max_model_len=160, skip_tokenizer_init=True, **options) as llm:
        replay, count = replay_of(llm), [0]
        plain = replay.run

        def counted(plan: Any) -> Any:
            count[0] += 1
            return plain(plan)

        replay.run = counted
        common: dict[str, Any] = {"max_tokens": 20, "ignore_eos": True, "detokenize": False}
        params = [
            SamplingParams(temperature=0.0, **common),
            SamplingParams(temperature=0.9, seed=3, n=2, **common),
            SamplingParams(temperature=0.0, logprobs=2, prompt_logprobs=1, **common),
            SamplingParams(temperature=1.0, top_k=9, seed=1, repetition_penalty=1.2, **common),
            SamplingParams(temperature=0.0, min_tokens=4, **common),
            SamplingParams(temperature=0.0, **common),
        ]
        outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], params, use_tqdm=False)
        assert options.get("num_gpu_blocks_override") is None or llm.llm_engine.stat_logger.stats.preemptions > 0
        return [[list(c.token_ids) for c in output.outputs] for output in outputs], count[0]


@needs_library
@pytest.mark.parametrize("options", [{}, {"num_gpu_blocks_override": 14}, {"max_num_batched_tokens": 24}], ids=str)
def test_recorded_steps_equal_eager_ones(options: dict[str, Any]) -> None:
    recorded, replays = run(**options)
    eager, none = run(enforce_eager=True, **options)
    assert recorded == eager
    assert replays >= 19
    assert none == 0


@needs_library
def test_a_step_too_large_for_the_buffers_runs_eagerly() -> None:
    with LLM("demo", max_model_len=400, skip_tokenizer_init=True) as llm:
        replay = replay_of(llm)
        assert isinstance(replay, HostReplay)
        taken: list[bool] = []
        takes = replay.takes
        replay.takes = lambda plan: (taken.append(takes(plan)), taken[-1])[1]  # type: ignore[method-assign]
        prompt = list(range(10, 10 + min(MAX_TOKENS, kernels().few) + 1))
        params = SamplingParams(temperature=0.0, max_tokens=3, detokenize=False, ignore_eos=True)
        llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
        assert taken == [False, True, True]


@needs_library
def test_recording_imports_no_compiler() -> None:
    """Torch's compiler takes a second to import, which nobody who starts an engine should wait for."""
    code = "import sys; from quire import LLM; LLM(max_model_len=64); sys.exit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_reference_ops_are_not_recorded() -> None:
    with LLM("demo", max_model_len=64, skip_tokenizer_init=True, ops={"*": "reference"}) as llm:
        assert isinstance(replay_of(llm), NoReplay)


def test_buffers_are_used_again_once_nobody_looks_at_them() -> None:
    buffers = Buffers()
    a = buffers.empty((4, 8), torch.float32)
    address = a.data_ptr()
    view = a[1:]
    del a
    other = buffers.empty((4, 8), torch.float32)
    assert other.data_ptr() != address, "a view still lives"
    del view
    b = buffers.empty((2, 8), torch.bfloat16)
    assert b.data_ptr() == address
    assert b.data_ptr() % 64 == 0
    assert len(buffers.all) == 2
