"""Chunks beside decoding rows are as long as the measured steps allow."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

from quire import LLM, SamplingParams
from quire.engine import wire
from quire.engine.pace import FIRST, LEAST, Pace
from quire.engine.serve import _Loop
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


def test_a_plan_waits_for_requests_while_the_device_is_at_work() -> None:
    options: dict[str, Any] = {"max_model_len": 512, "device": "cpu", "depth": 2, "lead": 1}
    with LLM("demo", target_step_ms=50.0, skip_tokenizer_init=True, **options) as llm:
        core: Any = llm.llm_engine.client
        params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, detokenize=False)
        assert core.spare() == 0.0
        llm.llm_engine.add_request("a", {"prompt_token_ids": [5] * 20}, params)
        for _ in range(5):
            llm.llm_engine.step()
        assert core.spare() == 0.0, "the step is over"
        (plan, pending), done = core._inflight[-1], False
        core._inflight[-1] = plan, SimpleNamespace(result=pending.result, done=lambda: done)
        core._pace._decodes, core._pace._slope = 60.0, 1.0
        assert 40 < core.spare() < 0.85 * 60, "as long as such steps take, but for what may be wrong with that"
        core._pace._decodes = 0.001
        assert core.spare() <= 0.0
        core._pace._decodes, done = 60.0, True
        assert core.spare() == 0.0
        core._inflight[-1], core._pace._decodes = (plan, pending), 0.01
        llm.llm_engine.drain()


def test_what_is_to_come_is_prepared_until_a_message_comes() -> None:
    waiting, prepared, polls = [0, 0, 1, 1], [], []

    class Socket:
        def recv_multipart(self, flags: int) -> list[bytes]:
            if polls.count(None) > 1:
                raise zmq.Again
            polls.append(None)
            return [b"front", wire.encode(wire.Abort(["x"]))]

        def poll(self, timeout: int | None = None) -> int:
            polls.append(timeout)
            return waiting.pop(0)

    def idle() -> bool:
        prepared.append(1)
        return True

    core: Any = SimpleNamespace(has_work=False, idle=idle, spare=lambda: 0.0, abort=lambda names: None)
    assert _Loop(core, Socket())._take_in()  # type: ignore[arg-type]
    assert len(prepared) == 2 and polls[:4] == [0, 0, 0, None]


def test_messages_are_taken_in_as_long_as_there_is_time() -> None:
    """One comes while the core could still wait; what comes when it cannot is for the next time."""
    arriving: list[Any] = [zmq.Again(), [b"front", wire.encode(wire.Abort(["x"]))], zmq.Again(), zmq.Again()]
    spare, polls, aborted = [0.004, 0.003, 0.0005], [], []

    class Socket:
        def recv_multipart(self, flags: int) -> list[bytes]:
            if isinstance(item := arriving.pop(0), Exception):
                raise item
            return item

        def poll(self, timeout: int) -> None:
            polls.append(timeout)

    core: Any = SimpleNamespace(has_work=True, spare=lambda: spare.pop(0), abort=aborted.extend)
    assert _Loop(core, Socket())._take_in()  # type: ignore[arg-type]
    assert aborted == ["x"] and polls == [1, 1] and not spare and not arriving
