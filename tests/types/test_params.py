"""Sampling parameters: vLLM's defaults, ranges and rules, and messages that name the parameter and the value."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest

from quire.types.errors import ClientError, EngineError, QuireError, ValidationError
from quire.types.params import (
    BeamSearchParams,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)
from quire.types.plan import decode, encode
from quire.types.request import Request


@pytest.mark.parametrize(
    ("bad", "parameter"),
    [
        ({"n": 0}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": True}, "n"),
        ({"n": 16385}, "n"),
        ({"n": 2, "temperature": 0}, "n"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": math.inf}, "repetition_penalty"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.1}, "min_p"),
        ({"seed": "x"}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": ["a"], "detokenize": False}, "stop"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids"),
        ({"stop_token_ids": "12"}, "stop_token_ids"),
        ({"bad_words": [""]}, "bad_words"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"logprobs": -2}, "logprobs"),
        ({"prompt_logprobs": 1.5}, "prompt_logprobs"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {1: "x"}}, "logit_bias"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"output_kind": 1}, "output_kind"),
        ({"stream_interval": 0}, "stream_interval"),
        ({"logits_processors": [3]}, "logits_processors"),
        ({"logits_processors": 3}, "logits_processors"),
        ({"logits_processors": print}, "logits_processors"),
        ({"stop": 3}, "stop"),
        ({"bad_words": 3}, "bad_words"),
        ({"logit_bias": [1, 2]}, "logit_bias"),
        ({"extra_args": [1]}, "extra_args"),
        ({"logprob_token_ids": []}, "logprob_token_ids"),
        ({"logprob_token_ids": list(range(129))}, "logprob_token_ids"),
        ({"logprob_token_ids": [1, 2], "logprobs": 1}, "logprobs"),
        ({"temprature": 1}, "temprature"),
        ({"best_of": 2}, "best_of"),
    ],
)
def test_refused(bad: dict[str, Any], parameter: str) -> None:
    with pytest.raises(ClientError) as e:
        SamplingParams(**bad)
    assert e.value.parameter == parameter
    assert parameter in str(e.value) and "\n" not in str(e.value)
    assert isinstance(e.value, ValueError) and isinstance(e.value, QuireError)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SamplingParams(temprature=1), "did you mean temperature?"),  # type: ignore[call-arg]
        (lambda: SamplingParams(use_beam_search=True), "LLM.beam_search"),  # type: ignore[call-arg]
        (lambda: SamplingParams(nothing_like_it=True), "leave it out"),  # type: ignore[call-arg]
        (lambda: BeamSearchParams(beam_width=2), "BeamSearchParams needs max_tokens"),  # type: ignore[call-arg]
        (lambda: BeamSearchParams(2, max_token=3), "did you mean max_tokens?"),  # type: ignore[call-arg]
    ],
)
def test_fields_that_do_not_exist_or_are_missing(make: Any, words: str) -> None:
    with pytest.raises(ClientError) as e:
        make()
    assert words in str(e.value) and "\n" not in str(e.value)


def test_logprobs_of_named_tokens() -> None:
    assert SamplingParams(logprob_token_ids=[5, 3, 5]).num_logprobs == 2
    p = SamplingParams(logprob_token_ids=(5, 3), logprobs=2)  # type: ignore[arg-type]
    assert p.logprob_token_ids == [5, 3] and p.num_logprobs == 2


def test_defaults_and_normal_forms() -> None:
    p = SamplingParams()
    assert (p.n, p.temperature, p.top_p, p.top_k, p.max_tokens, p.min_tokens) == (1, 1.0, 1.0, 0, 16, 0)
    assert p.output_kind is RequestOutputKind.CUMULATIVE and p.num_logprobs is None and not p.needs_history
    p = SamplingParams(stop="x", stop_token_ids=[3, 3, 2], logit_bias={"5": 200, 6: -1}, logprobs=True, seed=-1)  # type: ignore
    assert p.stop == ["x"] and p.stop_token_ids == [3, 2] and p.logit_bias == {5: 100.0, 6: -1.0}
    assert p.logprobs == 1 and p.seed is None
    assert SamplingParams(top_k=-1).top_k == 0
    assert SamplingParams(max_tokens=None).max_tokens is None
    assert SamplingParams(prompt_logprobs=0).skip_reading_prefix_cache is True


def test_greedy_drops_the_filters() -> None:
    p = SamplingParams(temperature=0, top_p=0.5, top_k=3, min_p=0.1)
    assert p.greedy and (p.top_p, p.top_k, p.min_p) == (1.0, 0, 0.0)
    assert not SamplingParams(temperature=0.01).greedy


def test_tiny_temperature_is_raised(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "quire"):
        assert SamplingParams(temperature=0.001).temperature == 0.01
    assert "0.001" in caplog.text


@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"bad_words": ["x"]},
        {"bad_words_token_ids": [[1]]},
        {"prompt_logprobs": 0},
        {"logits_processors": [lambda ids, logits: logits]},
    ],
)
def test_what_needs_the_history(fields: dict[str, Any]) -> None:
    assert SamplingParams(**fields).needs_history


def test_from_optional_takes_none_for_the_default() -> None:
    p = SamplingParams.from_optional(n=None, temperature=0.5, max_tokens=None, stop=None)
    assert p == SamplingParams(temperature=0.5, max_tokens=None)


def test_clone_shares_nothing_that_changes() -> None:
    p = SamplingParams(stop=["a"], logit_bias={1: 1.0}, stop_token_ids=[1], bad_words=["b"], extra_args={"a": 1})
    q = p.clone()
    assert q == p
    q.stop.append("c")  # type: ignore[union-attr]
    q.logit_bias[2] = 2.0  # type: ignore[index]
    q.stop_token_ids.append(2)  # type: ignore[union-attr]
    q.extra_args["b"] = 2  # type: ignore[index]
    q.n = 3
    assert (p.stop, p.logit_bias, p.stop_token_ids, p.extra_args, p.n) == (["a"], {1: 1.0}, [1], {"a": 1}, 1)


def test_normalizing_again_checks_what_was_assigned() -> None:
    p = SamplingParams(temperature=0.7, stop="a")
    before = p.clone()
    p.normalize()
    assert p == before
    p.max_tokens = 0
    with pytest.raises(ClientError, match="max_tokens"):
        p.normalize()


def test_stop_tokens_include_the_end_tokens() -> None:
    assert SamplingParams(stop_token_ids=[5], eos_token_ids=(1, 2)).all_stop_token_ids == {1, 2, 5}


def test_travels_as_bytes() -> None:
    params = SamplingParams(
        n=2, stop="x", logit_bias={3: 1.0}, seed=5, structured_outputs=StructuredOutputsParams(regex="a+")
    )
    for p in (params, BeamSearchParams(beam_width=2, max_tokens=3)):
        request = Request("a", [1, 2], p, seed=2**64 - 1, eos_token_ids=(2,))
        assert decode(encode(request), Request) == request


def test_beam_search() -> None:
    p = BeamSearchParams(beam_width=4, max_tokens=8)
    assert (p.ignore_eos, p.temperature, p.length_penalty, p.skip_special_tokens) == (False, 0.0, 1.0, True)
    for bad in ({"beam_width": 0, "max_tokens": 1}, {"beam_width": 1, "max_tokens": 0}):
        with pytest.raises(ClientError):
            BeamSearchParams(**bad)
    with pytest.raises(ClientError, match="length_penalty"):
        BeamSearchParams(1, 1, length_penalty=math.inf)


def test_structured_outputs_take_one_constraint() -> None:
    StructuredOutputsParams(choice=["a", "b"])
    for bad in ({}, {"regex": "a", "choice": ["b"]}):
        with pytest.raises(ClientError, match="exactly one"):
            StructuredOutputsParams(**bad)


def test_errors() -> None:
    assert ValidationError is ClientError
    assert issubclass(EngineError, RuntimeError) and not issubclass(EngineError, ValueError)
