"""Decode steps through the buffers that graphs read give what eager ones give. On a CPU a "graph" runs its function
again; what a real one does to the device is for `benchmarks/gpu`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from quire import LLM, SamplingParams
from quire.ops.sampling import DRAW_STEP
from quire.runner.graphs import Graphs, decode_sizes, token_sizes
from quire.runner.record import PlainRecorder

PROMPTS = [[(7 * i + 3 * j) % 2000 + 10 for j in range(n)] for i, n in enumerate((1, 3, 90, 17, 33, 5, 9, 11, 2, 20))]


def run(
    graphs: bool,
    captured: int = 200,
    prepare: bool | Callable[[Graphs], None] = True,
    recorder: Callable[[], PlainRecorder] | None = None,
    **options: Any,
) -> tuple[list[Any], set[Any], int]:
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
                (recorder or PlainRecorder)(),
            )
            plain = replay._places

            def places(plan: Any) -> bool:
                nonlocal carried
                carried += (yes := plain(plan))
                return yes

            replay._places = places
            replay._run_ragged = Mock(wraps=replay._run_ragged)
            if callable(prepare):
                prepare(replay)
            elif prepare:
                replay.prepare()
            runner._replay = replay
            runner._draw_step = worker.ops.bind(DRAW_STEP)
        common: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True, "detokenize": False}
        few = {**common, "max_tokens": 19}
        params = [
            SamplingParams(temperature=0.0, **common),
            SamplingParams(temperature=0.9, seed=3, n=2, **{**common, "max_tokens": 30}),
            SamplingParams(temperature=0.0, logprobs=2, **common),
            SamplingParams(temperature=1.0, top_k=9, seed=1, repetition_penalty=1.2, **common),
            SamplingParams(temperature=0.0, min_tokens=4, **{**common, "max_tokens": 7}),
            SamplingParams(temperature=0.0, **{**common, "max_tokens": 23}),
            SamplingParams(temperature=0.8, min_p=0.02, seed=4, logprobs=3, **{**common, "max_tokens": 21}),
            SamplingParams(
                temperature=0.0,
                logit_bias={40: 3.0, 99: -50.0},
                frequency_penalty=0.4,
                presence_penalty=-0.2,
                **{**common, "max_tokens": 25},
            ),
            SamplingParams(
                temperature=0.9, top_p=0.7, seed=8, allowed_token_ids=list(range(3, 900, 2)), logprobs=0, **few
            ),
            SamplingParams(temperature=0.7, seed=9, top_k=4, **few),
        ]
        params[-1].bad_words_token_ids = [[i, j] for i in range(0, 2600, 7) for j in (16, 19, 223)] + [[33], [2, 1, 1]]
        outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], params, use_tqdm=False)
        preempted = llm.llm_engine.stat_logger.stats.preemptions
        assert options.get("num_gpu_blocks_override") is None or preempted > 0
        visible = [
            [
                (
                    list(c.token_ids),
                    [
                        sorted((token, known.logprob > -1e30) for token, known in line.items())
                        for line in c.logprobs or ()
                    ],
                )
                for c in output.outputs
            ]
            for output in outputs
        ]
        assert replay is None or replay._run_ragged.call_count >= 1
        return visible, set(replay._forwards) if replay else set(), carried


@pytest.mark.parametrize("ops", [{"*": "reference"}, {}], ids=["reference", "native"])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_gpu_blocks_override": 14}, {"depth": 2, "lead": 1, "logprobs_mode": "processed_logprobs"}],
    ids=str,
)
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


def test_all_sizes_can_be_prepared_while_there_is_nothing_to_do() -> None:
    """One at a time; steps then find what they need, and give what they would have given."""
    recorded: list[int] = []

    class Counting(PlainRecorder):
        def __call__(self, function: Any) -> Any:
            captured, out = super().__call__(function)
            recorded.append(out.shape[0])
            return captured, out

    def prepare(graphs: Graphs) -> None:
        while graphs.prepare_next():
            pass
        recorded.append(0)

    replayed, captured, _ = run(True, prepare=prepare, recorder=Counting)
    assert replayed == run(False)[0]
    sizes = {("decode", size, size) for size in decode_sizes(200)}
    sizes |= {("ragged", tokens, rows) for tokens in token_sizes(200) for rows in (16, 64, 200) if rows <= tokens}
    assert captured >= sizes
    late = recorded[recorded.index(0) + 1 :]
    assert 0 < len(recorded) - len(late) >= 3 * len(decode_sizes(200)), "with their draws"
    assert len(late) <= 6, "draws that are not common"


def test_a_size_that_cannot_be_prepared_is_left() -> None:
    class Broken(PlainRecorder):
        def __call__(self, function: Any) -> Any:
            raise RuntimeError("no")

    def prepare(graphs: Graphs) -> None:
        graphs._record = Broken()
        assert not graphs.prepare_next() and not graphs.prepare_next()
        graphs._record = PlainRecorder()

    assert run(True, prepare=prepare)[0] == run(False)[0]


def test_sizes() -> None:
    for most in (1, 3, 8, 100, 256, 1000, 1024):
        found = decode_sizes(most)
        assert found == sorted(set(found)) and found[-1] == most
        for count in range(1, most + 1):
            served = next(size for size in found if size >= count)
            assert served - count < max(8, count // 4)
    assert token_sizes(100) == [16, 32, 64] and token_sizes(10) == []
    assert token_sizes(1 << 20)[-1] == 2048


def forked(graphs: bool, **options: Any) -> list[Any]:
    """Prompts whose last chunks fit pages that are there, with several samples of each: forks without new pages."""
    fixed: dict[str, Any] = {"dtype": "float32", "max_model_len": 160, "device": "cpu", "enforce_eager": True}
    with LLM("demo", skip_tokenizer_init=True, max_num_batched_tokens=40, **fixed, **options) as llm:
        client: Any = llm.llm_engine.client
        worker = client._executor.worker
        runner = worker._runner
        if graphs:
            model, table, store = runner._model, runner._table, runner._store
            runner._replay = Graphs(model, table, store, worker.ops, worker.device, 40, 2, 40, PlainRecorder())
            runner._draw_step = worker.ops.bind(DRAW_STEP)
        common: dict[str, Any] = {"ignore_eos": True, "detokenize": False, "max_tokens": 12}
        params = [SamplingParams(n=1 + i % 3, temperature=1.0, seed=i, **common) for i in range(10)]
        prompts: Any = [{"prompt_token_ids": [(5 * i + j) % 900 + 9 for j in range(33 + 5 * i)]} for i in range(10)]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return [[list(c.token_ids) for c in output.outputs] for output in outputs]


@pytest.mark.parametrize("options", [{}, {"depth": 2, "lead": 1}], ids=str)
def test_forks_without_new_pages(options: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    assert forked(True, **options) == forked(False, **options)
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")], "no step failed"


class Full(PlainRecorder):
    """Memory suffices for no graph of more than so many tokens."""

    def __init__(self, most: int) -> None:
        self.most = most

    def __call__(self, function: Any) -> Any:
        captured, out = super().__call__(function)
        if out.shape[0] > self.most:
            raise torch.OutOfMemoryError("there is none")
        return captured, out


def test_a_step_that_no_graph_can_be_made_for_runs_from_python(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.PlainRecorder", lambda: Full(4))
    replayed, captured, _ = run(True, prepare=False)
    monkeypatch.undo()
    eager, _, _ = run(False)
    assert replayed == eager
    assert captured and max(rows for _, _, rows in captured) <= 4
    assert "no memory for a graph" in caplog.text and "failed" not in caplog.text
