"""What the user sees does not depend on how many plans are in flight: ids, text, finish reasons, logprobs, usage."""

from __future__ import annotations

from typing import Any

import pytest

from quire import LLM, SamplingParams
from quire.types.params import BeamSearchParams

PROMPTS = [
    "The capital of France is",
    "Count from 3 to 9:",
    "The opposite of hot is",
    "Once upon a time there was a small red fox who lived near the river and liked to count the stones",
    "Spell the word 'apple':",
    "12 + 7 =",
]
COMMON: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True}
PARAMS = [
    SamplingParams(temperature=0.0, **COMMON),
    SamplingParams(temperature=1.0, seed=5, n=3, **COMMON),
    SamplingParams(temperature=0.8, top_p=0.9, stop=[".", " the"], **COMMON),
    SamplingParams(temperature=0.0, logprobs=3, prompt_logprobs=2, **COMMON),
    SamplingParams(temperature=1.2, top_k=20, repetition_penalty=1.3, seed=1, stop=["e"], logprobs=1, **COMMON),
    SamplingParams(temperature=0.0, max_tokens=7),
]


def shown(depth: int, lead: int) -> list[Any]:
    """Everything visible of one run in a pool that makes sequences wait and fall."""
    options = {"depth": depth, "lead": lead, "dtype": "float32", "max_model_len": 128, "block_size": 4}
    with LLM("demo", max_num_batched_tokens=32, num_gpu_blocks_override=44, **options) as llm:
        outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        beams = llm.beam_search([PROMPTS[0]], BeamSearchParams(beam_width=3, max_tokens=9))
        stats = llm.llm_engine.stat_logger.stats
        assert stats.preemptions > 0
        assert (stats.blocks_used, stats.running, stats.waiting) == (0, 0, 0)
        visible = sum(len(c.token_ids) for o in outputs for c in o.outputs)
    seen: list[Any] = [
        (c.text, list(c.token_ids), c.finish_reason, c.stop_reason, _plain(c.logprobs), _plain(o.prompt_logprobs))
        for o in outputs
        for c in o.outputs
    ]
    return [*seen, [beam.tokens for beam in beams[0].sequences], visible]


def _plain(lines: Any) -> Any:
    """Logprobs by token; batches of other shapes round a little otherwise."""
    return lines and [
        line and {token: pytest.approx(entry.logprob, abs=1e-4) for token, entry in line.items()} for line in lines
    ]


@pytest.fixture(scope="module")
def synchronous() -> list[Any]:
    return shown(1, 0)


@pytest.mark.parametrize(("depth", "lead"), [(2, 0), (2, 1), (4, 0), (4, 1)])
def test_depth_is_invisible(synchronous: list[Any], depth: int, lead: int) -> None:
    for there, here in zip(shown(depth, lead), synchronous, strict=True):
        assert _exact(there) == here


def _exact(value: Any) -> Any:
    """The same, with plain numbers for what is compared approximately."""
    if isinstance(value, list | tuple):
        return type(value)(_exact(v) for v in value)
    if isinstance(value, dict):
        return {key: approx.expected for key, approx in value.items()}
    return value
