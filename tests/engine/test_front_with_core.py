"""The front over the real core, runner and a tiny random model: what one side gives, the other takes."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_client import make_config
from tokenizer_zoo import trained

from quire.engine.async_engine import AsyncLLM
from quire.engine.llm_engine import LLMEngine
from quire.llm import LLM
from quire.types.errors import EngineError
from quire.types.params import BeamSearchParams, RequestOutputKind, SamplingParams

PROMPTS: list[Any] = ["The capital of France", "one two three four five six seven", [50, 60, 70], "x"]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def engine(folder: Path, depth: int = 1) -> LLMEngine:
    lead = min(depth - 1, 1)
    return LLMEngine(
        make_config(folder, load_format="dummy", num_gpu_blocks_override=48, threads=1, depth=depth, lead=lead)
    )


@pytest.fixture(params=[1, 2])
def llm(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LLM]:
    with LLM.from_engine(engine(tmp_path, request.param)) as llm:
        yield llm
        stats = llm.llm_engine.stat_logger.stats
        assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0) and not llm._done


def text_of(tokens: list[int]) -> str:
    return trained().decode(tokens)


def test_generate(llm: LLM) -> None:
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    for output in outputs:
        done = output.outputs[0]
        assert len(done.token_ids) == 24 and done.text == text_of(done.token_ids)
    alone = llm.generate(PROMPTS[2], GREEDY, use_tqdm=False)[0]
    assert alone.outputs[0].token_ids == outputs[2].outputs[0].token_ids


def test_stop_string_cuts_the_same_sequence(llm: LLM) -> None:
    (whole,) = llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)
    tokens = whole.outputs[0].token_ids
    texts = [text_of(tokens[: i + 1]) for i in range(24)]
    stop = text_of(tokens[10:11]).strip("\ufffd") or texts[10][-1:]
    params = GREEDY.clone()
    params.stop = [stop]
    (cut,) = llm.generate(PROMPTS[0], params, use_tqdm=False)
    at = next((i for i, t in enumerate(texts) if stop in t), None)
    if at is None:
        assert cut.outputs[0].token_ids == tokens
    else:
        assert cut.outputs[0].token_ids == tokens[: at + 1] and cut.outputs[0].stop_reason == stop
        assert cut.outputs[0].text == texts[at][: texts[at].index(stop)]


def test_logprobs_samples_and_beams(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=1, max_tokens=5, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    (output,) = llm.generate(PROMPTS[1], params, use_tqdm=False)
    lines = output.prompt_logprobs
    assert lines is not None and lines[0] is None
    assert [next(iter(x)) for x in lines[1:] if x] == output.prompt_token_ids[1:]
    for done in output.outputs:
        assert done.logprobs is not None and [next(iter(x)) for x in done.logprobs] == done.token_ids
        total = sum(x[t].logprob for x, t in zip(done.logprobs, done.token_ids, strict=True))
        assert done.cumulative_logprob == pytest.approx(total)
    (beams,) = llm.beam_search([PROMPTS[2]], BeamSearchParams(beam_width=3, max_tokens=4, ignore_eos=True))
    assert len(beams.sequences) == 3
    assert all(s.tokens[:3] == PROMPTS[2] and len(s.tokens) == 7 for s in beams.sequences)
    assert [s.cum_logprob for s in beams.sequences] == sorted((s.cum_logprob for s in beams.sequences), reverse=True)


def test_logprobs_of_named_tokens(llm: LLM) -> None:
    """They are the values that all logprobs of the position have; only the drawn token has a rank."""
    llm.llm_engine.inputs._max_logprobs = -1
    (every,) = llm.generate([[50, 60, 70]], SamplingParams(temperature=0, max_tokens=4, logprobs=-1), use_tqdm=False)
    named = SamplingParams(temperature=0, max_tokens=4, logprob_token_ids=[7, 9, 400])
    (some,) = llm.generate([[50, 60, 70]], named, use_tqdm=False)
    a, b = every.outputs[0], some.outputs[0]
    assert a.token_ids == b.token_ids and a.cumulative_logprob == pytest.approx(b.cumulative_logprob)
    assert a.logprobs is not None and b.logprobs is not None
    for token, full, line in zip(b.token_ids, a.logprobs, b.logprobs, strict=True):
        assert set(line) == {token, 7, 9, 400} and line[token].rank == 1
        for t, found in line.items():
            assert found.logprob == pytest.approx(full[t].logprob) and (t == token or found.rank is None)


def test_a_closed_engine_says_so(tmp_path: Path) -> None:
    llm = LLM.from_engine(engine(tmp_path))
    llm.close()
    llm.close()
    with pytest.raises(EngineError, match="shut down"):
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)


def test_ctrl_c(llm: LLM, monkeypatch: pytest.MonkeyPatch, default_ctrl_c: None) -> None:
    before = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    step, steps = llm.llm_engine.client.step, []

    def interrupted() -> Any:
        steps.append(1)
        if len(steps) == 5:
            signal.raise_signal(signal.SIGINT)
        return step()

    monkeypatch.setattr(llm.llm_engine.client, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert llm.llm_engine.stat_logger.stats.blocks_used == 0
    after = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert [o.outputs for o in after] == [o.outputs for o in before]


def test_failing_request_harms_no_other(llm: LLM) -> None:
    def bad(ids: list[int], logits: Any) -> Any:
        raise KeyError("mine")

    params = [SamplingParams(n=2, logits_processors=[bad]), GREEDY]
    failed, good = llm.generate(PROMPTS[:2], params, use_tqdm=False)
    assert [o.finish_reason for o in failed.outputs] == ["error"] * 2 and "mine" in str(failed.outputs[0].stop_reason)
    assert len(good.outputs[0].token_ids) == 24


@pytest.mark.parametrize("depth", [1, 2])
def test_streams_equal_batches(tmp_path: Path, depth: int) -> None:
    with LLM.from_engine(engine(tmp_path, depth)) as llm:
        batch = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    streams = AsyncLLM(engine=engine(tmp_path, depth))
    params = GREEDY.clone()
    params.output_kind = RequestOutputKind.DELTA

    async def one(prompt: Any) -> tuple[str, list[int]]:
        outputs = [o async for o in streams.generate(prompt, params)]
        assert len(outputs) > 5
        return "".join(o.outputs[0].text for o in outputs), [t for o in outputs for t in o.outputs[0].token_ids]

    async def main() -> None:
        got = await asyncio.gather(*map(one, PROMPTS))
        assert got == [(o.outputs[0].text, o.outputs[0].token_ids) for o in batch]

        def bad(ids: list[int], logits: Any) -> Any:
            raise KeyError("mine")

        with pytest.raises(EngineError, match="mine"):
            async for _ in streams.generate(PROMPTS[0], SamplingParams(logits_processors=[bad])):
                pass
        left = streams.generate(PROMPTS[0], GREEDY)
        await anext(left)
        await left.aclose()
        stats = await streams.stats()
        assert (stats.running, stats.blocks_used) == (0, 0)

    try:
        asyncio.run(main())
    finally:
        streams.shutdown()
