"""Decode steps through the buffers that graphs read give what eager ones give. On a CPU a "graph" runs its function
again; what a real one does to the device is for `benchmarks/gpu`."""

from __future__ import annotations

from typing import Any

import pytest

from quire import LLM, SamplingParams
from quire.runner.graphs import Graphs, PlainRecorder, sizes

PROMPTS = [[(7 * i + 3 * j) % 2000 + 10 for j in range(n)] for i, n in enumerate((1, 3, 90, 17, 33, 5))]


def run(graphs: bool, **options: Any) -> tuple[list[Any], list[int], int]:
    """What is visible, the sizes that were captured, how many steps brought their pages along."""
    fixed: dict[str, Any] = {"dtype": "float32", "max_model_len": 160, "device": "cpu", "enforce_eager": True}
    with LLM("demo", skip_tokenizer_init=True, **fixed, **options) as llm:
        client: Any = llm.llm_engine.client
        worker = client._executor.worker
        runner, carried = worker._runner, 0
        replay: Any = None
        if graphs:
            replay = Graphs(
                runner._model, runner._table, runner._store, worker.ops, worker.device, 8, 2, PlainRecorder()
            )
            plain = replay.carries

            def carries(plan: Any) -> bool:
                nonlocal carried
                carried += (yes := plain(plan))
                return yes

            replay.carries = carries
            runner._replay = replay
        common: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True, "detokenize": False}
        params = [
            SamplingParams(temperature=0.0, **common),
            SamplingParams(temperature=0.9, seed=3, n=2, **{**common, "max_tokens": 30}),
            SamplingParams(temperature=0.0, logprobs=2, prompt_logprobs=1, **common),
            SamplingParams(temperature=1.0, top_k=9, seed=1, repetition_penalty=1.2, **common),
            SamplingParams(temperature=0.0, min_tokens=4, **{**common, "max_tokens": 7}),
            SamplingParams(temperature=0.0, **{**common, "max_tokens": 23}),
        ]
        outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], params, use_tqdm=False)
        preempted = llm.llm_engine.stat_logger.stats.preemptions
        assert options.get("num_gpu_blocks_override") is None or preempted > 0
        visible = [
            [(list(c.token_ids), [sorted(line) for line in c.logprobs or ()]) for c in output.outputs]
            for output in outputs
        ]
        return visible, sorted(replay._forwards) if replay else [], carried


@pytest.mark.parametrize("ops", [{"*": "reference"}, {}], ids=["reference", "native"])
@pytest.mark.parametrize("options", [{}, {"num_gpu_blocks_override": 14}, {"depth": 2, "lead": 1}], ids=str)
def test_replayed_steps_equal_eager_ones(options: dict[str, Any], ops: dict[str, str]) -> None:
    replayed, captured, carried = run(True, ops=ops, **options)
    eager, none, _ = run(False, ops=ops, **options)
    assert replayed == eager
    assert not none and {4, 8} <= set(captured), "sizes in between are served by the next larger graph"
    assert carried >= 15


def test_sizes() -> None:
    for most in (1, 3, 8, 100, 256, 1000, 1024):
        found = sizes(most)
        assert found == sorted(set(found)) and found[-1] == most
        for count in range(1, most + 1):
            served = next(size for size in found if size >= count)
            assert served - count < max(8, count // 4)
