"""The loop when a step goes wrong: who is harmed, and that the engine goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from quire import LLM, SamplingParams
from quire.types.errors import EngineError
from quire.types.params import StructuredOutputsParams
from quire.types.plan import Plan

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
PROMPTS = ["The capital of France is", "Count from 3 to 9:", "The opposite of hot and cold and wet is"]


@pytest.fixture(params=[(1, 0), (2, 1)], ids=["depth1", "depth2"])
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    depth, lead = request.param
    with LLM("demo", max_model_len=128, max_num_seqs=4, depth=depth, lead=lead, log_level="critical") as llm:
        yield llm


def break_steps(llm: LLM, guilty: Callable[[Plan], bool], error: Exception) -> list[Plan]:
    """Steps with `guilty` plans raise; answers those plans, as they come."""
    executor: Any = llm.llm_engine.client._executor  # type: ignore[attr-defined]
    worker, plain, failed = executor.worker, executor.worker.submit, []

    def submit(plan: Plan) -> Any:
        if guilty(plan):
            failed.append(plan)
            raise error
        return plain(plan)

    worker.submit = submit
    return failed


def break_step(llm: LLM, number: int, error: BaseException) -> None:
    """The step with this number from now on raises."""
    executor: Any = llm.llm_engine.client._executor  # type: ignore[attr-defined]
    worker, plain, count = executor.worker, executor.worker.submit, [0]

    def submit(plan: Plan) -> Any:
        count[0] += 1
        if count[0] == number:
            raise error
        return plain(plan)

    worker.submit = submit


def texts(llm: LLM) -> list[tuple[str, str | None]]:
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    return [(output.outputs[0].text, output.outputs[0].finish_reason) for output in outputs]


def test_a_failure_that_does_not_come_back_harms_nobody(llm: LLM) -> None:
    expected = texts(llm)
    for number in (1, 4, 9):
        break_step(llm, number, RuntimeError("a cosmic ray"))
        assert texts(llm) == expected
        llm.llm_engine.client.check()  # type: ignore[attr-defined]


@pytest.mark.parametrize("culprit", [0, 1, 2])
@pytest.mark.parametrize("at", [0, 12])
def test_the_request_that_breaks_steps_is_found(llm: LLM, culprit: int, at: int) -> None:
    """Whatever step the culprit takes part in from token `at` of it on fails."""
    expected = texts(llm)
    rows: dict[int, int] = {}

    def guilty(plan: Plan) -> bool:
        for row in plan.retired.tolist():
            rows.pop(row, None)
        rows.update({new.row: new.prompt_length for new in plan.new_rows})
        ends = zip(plan.rows.tolist(), (plan.starts + plan.counts).tolist(), strict=True)
        return any(rows[row] == lengths[culprit] and end > at for row, end in ends)

    tokenizer = llm.llm_engine.tokenizer
    assert tokenizer is not None
    lengths = [len(tokenizer.encode(prompt)) for prompt in PROMPTS]
    assert len(set(lengths)) == 3 and max(lengths) < 20
    failed = break_steps(llm, guilty, RuntimeError("the device burns"))
    got = texts(llm)
    assert [reason for _, reason in got] == ["error" if i == culprit else "length" for i in range(3)]
    assert [got[i] for i in range(3) if i != culprit] == [expected[i] for i in range(3) if i != culprit]
    assert 2 <= len(failed) <= 5
    llm.llm_engine.client.check()  # type: ignore[attr-defined]
    assert llm.llm_engine.client.stats().blocks_used == 0


def test_too_little_memory_is_answered_with_smaller_steps(llm: LLM) -> None:
    expected = texts(llm)
    failed = break_steps(llm, lambda plan: len(plan.rows) > 1, MemoryError())
    assert texts(llm) == expected and len(failed) <= 3


def test_a_device_that_fails_everybody_ends_the_engine(llm: LLM) -> None:
    break_steps(llm, lambda plan: True, RuntimeError("the device burns"))
    with pytest.raises(EngineError, match="the device burns"):
        texts(llm)


@pytest.mark.parametrize("number", [1, 2, 5])
def test_ctrl_c_inside_a_step_leaves_the_engine_usable(llm: LLM, number: int) -> None:
    expected = texts(llm)
    break_step(llm, number, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        texts(llm)
    llm.llm_engine.client.check()  # type: ignore[attr-defined]
    assert llm.llm_engine.client.stats().blocks_used == 0
    assert texts(llm) == expected


def test_only_its_own_request_waits_for_a_grammar(llm: LLM) -> None:
    engine = llm.llm_engine
    core: Any = engine.client
    executor, prepare = core._executor, core._executor.prepare
    grammars: list[Future[None]] = []

    def slowly(grammar: str, eos: tuple[int, ...]) -> Future[None]:
        prepare(grammar, eos).result()
        grammars.append(Future())
        return grammars[-1]

    executor.prepare = slowly
    constrained = SamplingParams(max_tokens=12, structured_outputs=StructuredOutputsParams(choice=["red", "green"]))
    for name in ("chosen", "left", "refused"):
        engine.add_request(name, PROMPTS[0], constrained)
    engine.add_request("free", PROMPTS[1], GREEDY)
    done: dict[str, Any] = {}

    def run(until: Callable[[], bool]) -> None:
        while not until():
            assert engine.has_work
            done.update({output.request_id: output.outputs[0] for output in engine.step() if output.finished})

    run(lambda: "free" in done)
    stats = core.stats()
    assert (stats.waiting, stats.deferred, stats.received, stats.running) == (3, 3, 4, 0)
    assert len(done["free"].token_ids) == 12 and all(core.alive(name) for name in ("chosen", "left", "refused"))
    engine.abort_request("left")
    grammars[0].set_result(None)
    grammars[2].set_exception(RuntimeError("no compiler"))
    run(lambda: {"chosen", "refused"} <= set(done))
    assert core.stats().received == 4, "each counts once, whatever became of it"
    assert done["chosen"].text in ("red", "green")
    assert done["refused"].finish_reason == "error" and "no compiler" in done["refused"].stop_reason
    engine.drain()
    core.check()
    assert core.stats().deferred == 0
