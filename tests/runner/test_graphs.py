"""Decode steps through the buffers that graphs read give what eager ones give. On a CPU a "graph" runs its function
again; what a real one does to the device is for `benchmarks/gpu`."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest

from quire import LLM, SamplingParams
from quire.ops.sampling import DRAW_STEP
from quire.runner.graphs import Graphs, decode_sizes, token_sizes
from quire.runner.record import PlainRecorder

PROMPTS = [[(7 * i + 3 * j) % 2000 + 10 for j in range(n)] for i, n in enumerate((1, 3, 90, 17, 33, 5))]


def run(graphs: bool, captured: int = 200, **options: Any) -> tuple[list[Any], set[Any], int]:
    """What is visible, the sizes that were captured, how many steps brought their pages along."""
    fixed: dict[str, Any] = {"dtype": "float32", "max_model_len": 160, "device": "cpu", "enforce_eager": True}
    with LLM("demo", skip_tokenizer_init=True, **fixed, **options) as llm:
        client: Any = llm.llm_engine.client
        worker = client._executor.worker
        runner, carried = worker._runner, 0
        replay: Any = None
        if graphs:
            replay = Graphs(
                runner._model,
                runner._table,
                runner._store,
                worker.ops,
                worker.device,
                200,
                2,
                captured,
                PlainRecorder(),
            )
            plain = replay._places

            def places(plan: Any) -> bool:
                nonlocal carried
                carried += (yes := plain(plan))
                return yes

            replay._places = places
            replay._run_ragged = Mock(wraps=replay._run_ragged)
            replay.prepare()
            runner._replay = replay
            runner._draw_step = worker.ops.bind(DRAW_STEP)
        common: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True, "detokenize": False}
        params = [
            SamplingParams(temperature=0.0, **common),
            SamplingParams(temperature=0.9, seed=3, n=2, **{**common, "max_tokens": 30}),
            SamplingParams(temperature=0.0, logprobs=2, **common),
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
        assert replay is None or replay._run_ragged.call_count >= 1
        return visible, set(replay._forwards) if replay else set(), carried


@pytest.mark.parametrize("ops", [{"*": "reference"}, {}], ids=["reference", "native"])
@pytest.mark.parametrize("options", [{}, {"num_gpu_blocks_override": 14}, {"depth": 2, "lead": 1}], ids=str)
def test_replayed_steps_equal_eager_ones(options: dict[str, Any], ops: dict[str, str]) -> None:
    replayed, captured, carried = run(True, ops=ops, **options)
    eager, _, _ = run(False, ops=ops, **options)
    assert replayed == eager
    assert {("decode", 4, 4), ("decode", 8, 8)} <= captured, "sizes in between are served by the next larger graph"
    assert carried >= 15


def test_steps_beyond_the_largest_graph_use_the_same_buffers() -> None:
    eager, _, _ = run(False)
    for most in (0, 48):
        replayed, captured, _ = run(True, captured=most)
        assert replayed == eager
        assert all(tokens <= most for kind, tokens, _ in captured if kind == "ragged")


def test_sizes() -> None:
    for most in (1, 3, 8, 100, 256, 1000, 1024):
        found = decode_sizes(most)
        assert found == sorted(set(found)) and found[-1] == most
        for count in range(1, most + 1):
            served = next(size for size in found if size >= count)
            assert served - count < max(8, count // 4)
    assert token_sizes(100) == [16, 32, 64] and token_sizes(10) == []
    assert token_sizes(1 << 20)[-1] == 2048
