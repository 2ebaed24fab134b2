"""The loop when a step goes wrong: who is harmed, and that the engine goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from quire import LLM, SamplingParams
from quire.types.plan import Plan

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
PROMPTS = ["The capital of France is", "Count from 3 to 9:", "The opposite of hot is"]


@pytest.fixture(params=[(1, 0), (2, 1)], ids=["depth1", "depth2"])
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    depth, lead = request.param
    with LLM("demo", max_model_len=128, max_num_seqs=4, depth=depth, lead=lead, log_level="critical") as llm:
        yield llm


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


def test_a_failed_step_ends_its_requests_and_nothing_else(llm: LLM) -> None:
    expected = texts(llm)
    break_step(llm, 4, RuntimeError("the device burns"))
    assert [reason for _, reason in texts(llm)] == ["error"] * 3
    llm.llm_engine.client.check()  # type: ignore[attr-defined]
    assert texts(llm) == expected


def test_requests_outside_the_failed_step_never_see_it() -> None:
    """One row: the others wait while the first one's step fails."""
    with LLM("demo", max_model_len=128, max_num_seqs=1, log_level="critical") as llm:
        expected = texts(llm)
        break_step(llm, 3, RuntimeError("the device burns"))
        outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        assert [output.outputs[0].finish_reason for output in outputs] == ["error", "length", "length"]
        assert [(output.outputs[0].text, "length") for output in outputs[1:]] == expected[1:]


@pytest.mark.parametrize("number", [1, 2, 5])
def test_ctrl_c_inside_a_step_leaves_the_engine_usable(llm: LLM, number: int) -> None:
    expected = texts(llm)
    break_step(llm, number, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        texts(llm)
    llm.llm_engine.client.check()  # type: ignore[attr-defined]
    assert llm.llm_engine.client.stats().blocks_used == 0
    assert texts(llm) == expected
