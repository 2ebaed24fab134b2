"""Chunks beside decoding rows are as long as the measured steps allow."""

from __future__ import annotations

import random
from typing import Any

import pytest

from quire import LLM, SamplingParams
from quire.engine.pace import FIRST, LEAST, Pace
from quire.types.plan import Plan


@pytest.mark.parametrize(("decode", "slope"), [(0.005, 25e-6), (0.001, 2e-6), (0.009, 20e-6)])
def test_steps_come_to_take_what_was_asked(decode: float, slope: float) -> None:
    pace, draw, target = Pace(0.012), random.Random(1), 0.012
    assert pace.tokens() == FIRST
    for step in range(60):
        tokens = pace.tokens() if step % 3 else 0
        seconds = (decode + slope * tokens) * draw.uniform(0.97, 1.03)
        pace.took(tokens, 20, 2.0 if step == 30 else seconds)
    took = decode + slope * pace.tokens()
    assert 0.8 * target < took < 1.1 * target


def test_a_target_that_cannot_be_met_still_lets_prompts_in() -> None:
    pace = Pace(0.001)
    for _ in range(20):
        pace.took(0, 20, 0.005)
        pace.took(pace.tokens(), 20, 0.008)
    assert pace.tokens() == LEAST


def prompts_of_steps(lengths: list[int], target: float, steps_between: int) -> list[tuple[int, bool]]:
    """(tokens of prompts, whether other rows decode) of each step with prompts."""
    options: dict[str, Any] = {"max_num_batched_tokens": 400, "max_model_len": 512, "device": "cpu"}
    with LLM("demo", target_step_ms=target * 1e3, skip_tokenizer_init=True, **options) as llm:
        executor: Any = llm.llm_engine.client._executor  # type: ignore[attr-defined]
        plans: list[Plan] = []
        plain = executor.submit

        def submit(plan: Plan) -> Any:
            plans.append(plan)
            return plain(plan)

        executor.submit = submit
        params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, detokenize=False)
        for i, length in enumerate(lengths):
            llm.llm_engine.add_request(str(i), {"prompt_token_ids": [5 + i] * length}, params)
            for _ in range(steps_between):
                llm.llm_engine.step()
        llm.llm_engine.drain()
    return [(len(p.tokens), bool((p.counts == 1).any())) for p in plans if len(p.tokens)]


@pytest.mark.parametrize("target", [0.0, 1e-6])
def test_chunks_beside_decodes_are_short_and_those_alone_are_not(target: float) -> None:
    """A target that no step meets: prompts come in the shortest chunks while others decode, and whole when none do."""
    chunks = prompts_of_steps([300, 350, 20, 390], target, 4)
    assert chunks[0] == (300, False)
    assert max(size for size, decodes in chunks if decodes) == (LEAST if target else 390)


def test_a_long_queue_drains_in_spite_of_the_target() -> None:
    chunks = prompts_of_steps([300, *[400] * 9], 1e-6, 0)
    beside = [size for size, decodes in chunks if decodes]
    assert beside[0] >= 9 * 400 // 8 - 100 > LEAST
    assert beside == sorted(beside, reverse=True) and beside[-1] <= LEAST
