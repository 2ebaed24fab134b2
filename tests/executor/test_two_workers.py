"""Two workers are one engine: the bundled model's answers from two processes equal those from none."""

from __future__ import annotations

from typing import Any

import pytest

from quire.llm import LLM
from quire.types.outputs import RequestOutput
from quire.types.params import SamplingParams, StructuredOutputsParams

PROMPTS = ["The capital of France is", "2 + 3 =", "Count: 1 2 3", "The opposite of hot is", "Once upon a time", "Yes?"]
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=12, logprobs=2, prompt_logprobs=1),
    SamplingParams(temperature=0.9, seed=4, max_tokens=12, presence_penalty=0.5, bad_words=["5"]),
    SamplingParams(temperature=0.8, seed=5, n=3, max_tokens=9, top_k=20, top_p=0.9),
    SamplingParams(temperature=1.3, max_tokens=14, min_tokens=14, logit_bias={20: 2.0}),
    SamplingParams(temperature=0.0, max_tokens=30, stop=["."], frequency_penalty=0.4),
    SamplingParams(temperature=0, max_tokens=9, structured_outputs=StructuredOutputsParams(regex="(yes|no) [0-9]+")),
]


def answers(**args: Any) -> list[RequestOutput]:
    """With few blocks and a small budget, so that prompts are chunked and sequences preempted."""
    # in float32, since who shares a step with whom is a matter of time, and decides in bfloat16 what is rounded when
    fixed: dict[str, Any] = {"dtype": "float32", "max_model_len": 64, "num_gpu_blocks_override": 20, "block_size": 4}
    llm = LLM("demo", max_num_batched_tokens=16, **fixed, **args)
    try:
        return llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    finally:
        llm.llm_engine.shutdown()


def test_two_workers_equal_one() -> None:
    one = answers()
    two = answers(tensor_parallel_size=2, distributed_executor_backend="mp")
    assert len({tuple(c.token_ids) for o in one for c in o.outputs}) >= 6
    for a, b in zip(one, two, strict=True):
        assert [c.token_ids for c in a.outputs] == [c.token_ids for c in b.outputs]
        assert [(c.text, c.finish_reason) for c in a.outputs] == [(c.text, c.finish_reason) for c in b.outputs]
    for line_a, line_b in zip(one[0].outputs[0].logprobs or [], two[0].outputs[0].logprobs or [], strict=True):
        assert line_a.keys() == line_b.keys()
        assert [p.logprob for p in line_a.values()] == pytest.approx([p.logprob for p in line_b.values()], abs=1e-5)
    assert one[0].prompt_logprobs is not None and two[0].prompt_logprobs is not None
    assert len(one[0].prompt_logprobs) == len(two[0].prompt_logprobs) == len(one[0].prompt_token_ids or [])
