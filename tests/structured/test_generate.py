"""Structured outputs end to end, with the demo model: what comes out is what was asked for, however it is scheduled."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from quire import LLM, BeamSearchParams, ClientError, SamplingParams, StructuredOutputsParams
from quire.outputs import RequestOutput
from quire.parsers.enforce import tool_constraint
from quire.parsers.tools import tool_parser
from tests.parsers.cases import ADD, TOOLS, WEATHER

SMALL: dict[str, Any] = dict(
    dtype="float32", threads=1, log_level="warning", max_model_len=512, kv_cache_memory_bytes="64M",
    max_num_seqs=16, max_num_batched_tokens=256, seed=1,
)  # fmt: skip
HOME: dict[str, Any] = {
    "type": "object",
    "properties": {"zip": {"pattern": "^[0-9]{5}$", "type": "string"}},
    "required": ["zip"],
    "additionalProperties": False,
}
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
        "home": {"anyOf": [{"type": "null"}, HOME]},
    },
    "required": ["name", "age", "tags", "home"],
    "additionalProperties": False,
}  # fmt: skip
ASK = "Describe a person as JSON: "


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(**SMALL) as llm:
        yield llm


def run(llm: LLM, prompts: Any, *params: SamplingParams) -> list[RequestOutput]:
    return llm.generate(prompts, list(params) if len(params) > 1 else params[0], use_tqdm=False)


def constrained(constraint: Any, **fields: Any) -> SamplingParams:
    return SamplingParams(structured_outputs=constraint, **{"max_tokens": 200, **fields})


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 2.0])
def test_json_schema(llm: LLM, temperature: float) -> None:
    """Valid at any temperature, beside rows that are free."""
    params = [constrained({"json": PERSON}, temperature=temperature, seed=seed) for seed in range(6)]
    free = SamplingParams(temperature=temperature, max_tokens=20, seed=9, ignore_eos=True)
    outputs = run(llm, [ASK] * 6 + ["The capital of"], *params, free)
    for output in outputs[:6]:
        jsonschema.validate(json.loads(output.outputs[0].text), PERSON)
        assert output.outputs[0].finish_reason == "stop"
    (alone,) = run(llm, "The capital of", free)
    assert outputs[6].outputs[0].token_ids == alone.outputs[0].token_ids


def test_other_kinds(llm: LLM) -> None:
    kinds = [
        ({"regex": r"[a-f]{2,5}-\d{3}"}, lambda t: re.fullmatch(r"[a-f]{2,5}-\d{3}", t)),
        ({"choice": ["London", "Paris", "Rome"]}, lambda t: t in ("London", "Paris", "Rome")),
        ({"grammar": 'start: ("ab" | "c")~3 "."'}, lambda t: re.fullmatch(r"(ab|c){3}\.", t)),
        ({"grammar": 'root ::= [0-9]+ "+" [0-9]'}, lambda t: re.fullmatch(r"\d+\+\d", t) or len(t) > 50),
    ]
    for constraint, right in kinds:
        for output in run(llm, "x" * 3, constrained(constraint, n=4, seed=3, temperature=1.5))[0].outputs:
            assert right(output.text), (constraint, output.text)
    params = constrained({"json_object": True}, temperature=0.8, n=8, seed=1)
    outputs = run(llm, 'Answer {"ok": true}. ', params)[0].outputs
    whole = [o for o in outputs if o.finish_reason == "stop"]
    assert whole and all(isinstance(json.loads(o.text), dict) for o in whole)


def test_the_capital_of_france(llm: LLM) -> None:
    (output,) = run(llm, "The capital of France is", constrained({"choice": [" Berlin", " Paris"]}, temperature=0))
    assert output.outputs[0].text == " Paris" and output.outputs[0].stop_reason is None


def test_the_end_of_a_text(llm: LLM) -> None:
    """A complete text ends its sequence, whatever else was asked for; one that may go on goes on."""
    both = constrained({"choice": ["a", "b"]}, min_tokens=8, ignore_eos=True, temperature=0.7, seed=1)
    done = run(llm, "x", both)[0].outputs[0]
    assert done.text in ("a", "b") and done.finish_reason == "stop" and len(done.token_ids) == 2
    long = run(llm, "x", constrained({"regex": "a+"}, ignore_eos=True, max_tokens=12, seed=1))[0].outputs[0]
    assert long.finish_reason == "length" and set(long.text) == {"a"}
    least = run(llm, "x", constrained({"regex": "(a|b)+"}, min_tokens=6, seed=1))[0].outputs[0]
    assert len(least.token_ids) >= 6
    stop = run(llm, "x", constrained({"regex": "abc+d"}, stop=["c"], max_tokens=20))[0].outputs[0]
    assert stop.text == "ab" and stop.stop_reason == "c"


def test_same_however_scheduled(llm: LLM) -> None:
    """Depth, preemption, chunked prompts, prefix hits, eager steps and processes change nothing that is drawn."""
    prompts = [ASK + "x " * (5 * i) for i in range(8)]
    params = [constrained({"json": PERSON}, temperature=1.0, seed=i, n=2) for i in range(8)]
    expected = [[o.token_ids for o in r.outputs] for r in run(llm, prompts, *params)]
    assert [[o.token_ids for o in r.outputs] for r in run(llm, prompts, *params)] == expected, "prefixes cached"
    ways: list[dict[str, Any]] = [
        dict(depth=2, lead=1),
        dict(num_gpu_blocks_override=40, kv_cache_memory_bytes=None, depth=2, lead=1, max_num_batched_tokens=24),
        dict(enforce_eager=True),
    ]
    for way in ways:
        with LLM(**{**SMALL, **way}) as other:
            assert [[o.token_ids for o in r.outputs] for r in run(other, prompts, *params)] == expected, way
            if "num_gpu_blocks_override" in way:
                assert other.llm_engine.client.stats().preemptions > 0


@pytest.mark.slow
def test_in_worker_processes(llm: LLM) -> None:
    params = constrained({"json": PERSON}, temperature=1.0, seed=5)
    (expected,) = run(llm, ASK, params)
    with LLM(**SMALL, distributed_executor_backend="mp") as other:
        (output,) = run(other, ASK, params)
    assert output.outputs[0].token_ids == expected.outputs[0].token_ids


def test_bad_constraints_are_refused(llm: LLM) -> None:
    with pytest.raises(ClientError, match="unclosed group"):
        run(llm, ["a", "b"], SamplingParams(), constrained({"regex": "(a"}))
    with pytest.raises(ClientError, match="beam search takes no structured_outputs"):
        llm.beam_search("a", BeamSearchParams(2, 4, structured_outputs=StructuredOutputsParams(regex="a")))
    with pytest.raises(ClientError, match="needs exactly one of"):
        SamplingParams(structured_outputs={})  # type: ignore[arg-type]
    with pytest.raises(ClientError, match="list of strings"):
        StructuredOutputsParams(choice=[])
    assert not llm.llm_engine.has_unfinished_requests()


def test_a_grammar_that_fails_on_its_way_fails_its_request_alone(llm: LLM) -> None:
    """Nothing but what allowed_token_ids forbids may come: that request ends with an error, its neighbour does not."""
    broken = constrained({"choice": ["Paris"]}, allowed_token_ids=[5])
    outputs = run(llm, ["x", "x"], broken, constrained({"choice": ["Rome"]}))
    assert outputs[0].outputs[0].finish_reason == "error"
    assert outputs[1].outputs[0].text == "Rome"


def test_reasoning_comes_first() -> None:
    """With a reasoning parser the constraint begins behind the reasoning; here that ends with a full stop."""
    with LLM(**SMALL, reasoning_parser="tags:<<,.") as llm:
        params = constrained({"regex": "[0-9]{4}"}, temperature=0, max_tokens=60)
        text = run(llm, "The capital of France is", params)[0].outputs[0].text
        assert re.fullmatch(r"[^.]*Paris[^.]*\.[0-9]{4}", text), text
        (closed,) = run(llm, "The capital of France is Paris.", params)
        assert re.fullmatch("[0-9]{4}", closed.outputs[0].text), "the prompt has closed the reasoning"
        several = run(llm, "The capital of France is", constrained({"regex": "[0-9]{4}"}, n=3, seed=2, max_tokens=90))
        assert all(re.fullmatch(r"[^.]*\.[0-9]{4}", o.text) for o in several[0].outputs if o.finish_reason == "stop")
    with LLM(**SMALL, structured_outputs_config={"reasoning_parser": "qwen3", "enable_in_reasoning": True}) as llm:
        assert run(llm, "x", constrained({"choice": ["a"]}))[0].outputs[0].text == "a"


def test_tool_calls(llm: LLM) -> None:
    """The demo model calls tools in Hermes' format: on its own, when it must, and by the tool's schema."""
    hermes = tool_parser("hermes")
    asked: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    (free,) = llm.chat(asked, SamplingParams(temperature=0, max_tokens=80), use_tqdm=False, tools=[WEATHER])
    assert [c.name for c in hermes.parse(free.outputs[0].text, [WEATHER]).calls] == ["get_weather"]
    for choice in ("required", {"type": "function", "function": {"name": "add"}}):
        for seed in range(4):
            params = constrained(tool_constraint(hermes, TOOLS, choice, parallel=False), temperature=1.0, seed=seed)
            (output,) = llm.chat(asked, params, use_tqdm=False, tools=TOOLS)
            parsed = hermes.parse(output.outputs[0].text, TOOLS)
            if output.outputs[0].finish_reason == "stop":
                assert parsed.content is None and len(parsed.calls) == 1
                tool = next(t for t in TOOLS if t["function"]["name"] == parsed.calls[0].name)
                schema = tool["function"].get("parameters", {})
                jsonschema.validate(json.loads(parsed.calls[0].arguments), schema)
                assert choice == "required" or parsed.calls[0].name == ADD["function"]["name"]
