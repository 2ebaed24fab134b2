"""The output side: text, stop strings, logprobs, gathering and what each kind of output carries."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fake_client import block
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_zoo import trained

from quire.engine.detokenizer import Detokenizer
from quire.engine.outputs import End, OutputProcessor, find_stop
from quire.types.errors import ClientError
from quire.types.outputs import RequestOutput
from quire.types.params import BeamSearchParams, RequestOutputKind, SamplingParams
from quire.types.plan import PromptLogprobs
from quire.types.request import Delta, FinishReason, Request

DELTA, CUMULATIVE, FINAL = RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE, RequestOutputKind.FINAL_ONLY
EOS = 1


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def ids(text: str) -> list[int]:
    return trained().encode(text, add_special_tokens=False)


def processor(clock: Clock | None = None) -> OutputProcessor:
    return OutputProcessor(Detokenizer(trained()), clock or Clock())


def request(id: str = "a", stream: bool = True, prompt: list[int] | None = None, **params: Any) -> Request:
    prompt = ids("The capital") if prompt is None else prompt
    sampling = SamplingParams(**{"max_tokens": 500, **params})
    return Request(id, prompt, sampling, seed=0, eos_token_ids=(EOS,), stream=stream)


def run(
    tokens: list[int], finish: FinishReason | None = FinishReason.LENGTH, cut: int = 1, **params: Any
) -> tuple[list[RequestOutput], list[End]]:
    """One sequence through a processor, `cut` tokens in each delta; later deltas come even after an end."""
    p, outputs, ends = processor(), [], []
    p.add(request(**params))
    for i in range(0, len(tokens), cut):
        last = i + cut >= len(tokens)
        out, end = p.process([Delta("a", 0, tokens[i : i + cut], finish=finish if last else None)])
        outputs += out
        ends += end
    return outputs, ends


@pytest.mark.parametrize("cut", [1, 2, 100])
@pytest.mark.parametrize("kind", [CUMULATIVE, DELTA, FINAL])
def test_text_and_tokens(kind: RequestOutputKind, cut: int) -> None:
    text = " of France is 🙂 Paris"
    tokens = ids(text)
    outputs, ends = run(tokens, cut=cut, output_kind=kind)
    assert not ends
    assert [o.finished for o in outputs] == [False] * (len(outputs) - 1) + [True]
    parts = [o.outputs[0] for o in outputs]
    if kind is DELTA:
        assert "".join(p.text for p in parts) == text
        assert [t for p in parts for t in p.token_ids] == tokens
    else:
        assert parts[-1].text == text and parts[-1].token_ids == tokens
        assert all(text.startswith(p.text) for p in parts)
    assert len(outputs) == (1 if kind is FINAL else -(-len(tokens) // cut))
    assert parts[-1].finish_reason == "length" and parts[-1].stop_reason is None and parts[-1].finished()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("include", [True, False])
def test_end_token_is_counted_but_not_shown(stream: bool, include: bool) -> None:
    p = processor()
    p.add(request(stream=stream, output_kind=FINAL, skip_special_tokens=False, include_stop_str_in_output=include))
    tokens = [*ids(" Paris"), EOS]
    (out,), _ = p.process([Delta("a", 0, tokens, finish=FinishReason.STOP)])
    done = out.outputs[0]
    assert done.token_ids == tokens and done.text == (" Paris</s>" if include else " Paris")
    assert (done.finish_reason, done.stop_reason) == ("stop", None)


def test_stop_token_is_the_stop_reason() -> None:
    p = processor()
    p.add(request(output_kind=FINAL, stream=False, stop_token_ids=[77]))
    (out,), _ = p.process([Delta("a", 0, [*ids(" x"), 77], finish=FinishReason.STOP, stop_token=77)])
    assert (out.outputs[0].finish_reason, out.outputs[0].stop_reason) == ("stop", 77)
    assert out.outputs[0].text == " x"


def test_stop_string_ends_at_its_token() -> None:
    """Later tokens, already on their way, are not visible; the core is told where the sequence ended."""
    before, rest = ids("one two\n###"), ids(" three four")
    outputs, ends = run(before + rest, stop=["\n###"])
    done = outputs[-1].outputs[0]
    assert done.text == "one two" and (done.finish_reason, done.stop_reason) == ("stop", "\n###")
    assert done.token_ids == before and ends == [End("a", 0, len(before))]
    assert len([o for o in outputs if o.finished]) == 1


def test_stop_string_in_the_middle_of_a_delta() -> None:
    tokens = ids("one two three four five six")
    at = next(i for i in range(len(tokens)) if "three" in trained().decode(tokens[: i + 1])) + 1
    for cut in (1, 3, 100):
        outputs, ends = run(tokens, cut=cut, stop="three", logprobs=None)
        assert outputs[-1].outputs[0].token_ids == tokens[:at] and outputs[-1].outputs[0].text == "one two "
        # a delta that says itself that the sequence ended needs no answer
        assert ends == ([] if cut == 100 else [End("a", 0, at)])


def test_stop_string_included() -> None:
    outputs, _ = run(ids("one two three"), stop=["wo"], include_stop_str_in_output=True, output_kind=DELTA)
    assert "".join(o.outputs[0].text for o in outputs if o.outputs) == "one two"


@given(st.text("ab", max_size=25), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3), st.data())
@settings(max_examples=200, deadline=None)
def test_stop_strings_do_not_depend_on_tokens(text: str, stops: list[str], data: st.DataObject) -> None:
    """Whatever the tokens and deltas: what is sent in pieces is the text before the stop string complete first."""
    want, reason = text, None
    for end in range(1, len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            reason = max(found, key=len)
            want = text[: end - len(reason)]
            break
    tokens: list[int] = []
    for i in range(0, len(text), 3):  # another division into tokens than the tokenizer's own
        tokens += ids(text[i : i + 3])
    if not tokens:
        return
    cut = data.draw(st.integers(1, 5))
    outputs, _ = run(tokens, cut=cut, stop=stops, output_kind=DELTA)
    assert "".join(o.outputs[0].text for o in outputs) == want
    assert outputs[-1].outputs[0].stop_reason == reason
    outputs, _ = run(tokens, cut=cut, stop=stops, output_kind=CUMULATIVE)
    assert outputs[-1].outputs[0].text == want
    assert all(want.startswith(o.outputs[0].text) for o in outputs)


def test_find_stop_earliest_end_then_longest() -> None:
    assert find_stop("xabcd", 0, ["abcd", "bc"]) == (2, "bc")
    assert find_stop("xabc", 0, ["c", "abc"]) == (1, "abc")
    assert find_stop("abab", 2, ["ab"]) == (2, "ab")
    assert find_stop("abx", 2, ["ab"]) is None


def test_text_that_may_become_a_stop_string_is_held_back() -> None:
    outputs, _ = run(ids("abcdefgh"), stop=["zzzz"], output_kind=CUMULATIVE)
    assert outputs[0].outputs[0].text == "" and outputs[-1].outputs[0].text == "abcdefgh"
    whole = ""
    for output in outputs[:-1]:
        whole += "".join(trained().decode([output.outputs[0].token_ids[-1]]))
        assert output.outputs[0].text == whole[: max(0, len(whole) - 3)]


def test_stop_strings_wait_for_min_tokens() -> None:
    tokens = ids("aaaaaaaa")
    assert len(tokens) > 2
    outputs, ends = run(tokens, stop=["a"], min_tokens=2)
    done = outputs[-1].outputs[0]
    assert len(done.token_ids) == 3 and ends == [End("a", 0, 3)]


def test_stop_string_completed_by_the_last_character_of_a_broken_end() -> None:
    """What was held back in the decoder is searched too when the sequence ends."""
    half = ids("x🙂")[:-1]
    outputs, _ = run(half, stop=["\ufffd"])
    assert (outputs[-1].outputs[0].text, outputs[-1].outputs[0].stop_reason) == ("x", "\ufffd")


def test_logprobs() -> None:
    tokens = ids("one two")
    p = processor()
    p.add(request(logprobs=2, output_kind=DELTA))
    got = []
    for t in tokens:
        out, _ = p.process([Delta("a", 0, [t], logprobs=[block([t], 2)])])
        got += out[0].outputs[0].logprobs
        total = out[0].outputs[0].cumulative_logprob
    for t, line in zip(tokens, got, strict=True):
        assert list(line) == [t, t + 1]  # the token itself is among its likeliest, and comes once
        assert line[t].rank == 3 and line[t + 1].rank == 2
        assert line[t].logprob == pytest.approx(-t / 100) and line[t].decoded_token == trained().decode([t])
    assert total == pytest.approx(-sum(tokens) / 100)


def test_logprobs_are_cut_with_the_tokens() -> None:
    tokens = ids("one two three four")
    p = processor()
    p.add(request(logprobs=0, stop="two", output_kind=FINAL))
    logprobs = [block([t], 0) for t in tokens]
    (out,), _ = p.process([Delta("a", 0, tokens, logprobs=logprobs)])
    done = out.outputs[0]
    assert len(done.logprobs or []) == len(done.token_ids) < len(tokens)
    assert done.cumulative_logprob == pytest.approx(-sum(done.token_ids) / 100)


def test_without_logprobs_there_is_no_sum() -> None:
    outputs, _ = run(ids("one two"))
    assert outputs[-1].outputs[0].logprobs is None and outputs[-1].outputs[0].cumulative_logprob is None


def test_prompt_logprobs_in_chunks() -> None:
    prompt = ids("one two three four")
    p = processor()
    p.add(request(prompt_logprobs=1, prompt=prompt, output_kind=DELTA))
    middle = len(prompt) // 2
    out, _ = p.process([Delta("a", 0, [], prompt_logprobs=[PromptLogprobs(0, 1, block(prompt[1:middle], 1))])])
    assert out == []
    rest = [PromptLogprobs(0, middle, block(prompt[middle:], 1))]
    (out,), _ = p.process([Delta("a", 0, [5], prompt_logprobs=rest)])
    lines = out.prompt_logprobs
    assert lines is not None and len(lines) == len(prompt) and lines[0] is None
    assert [next(iter(line)) for line in lines[1:] if line] == prompt[1:]
    (out,), _ = p.process([Delta("a", 0, [6], finish=FinishReason.LENGTH)])
    assert out.prompt_logprobs is None  # a stream reports them once


@pytest.mark.parametrize("kind", [CUMULATIVE, DELTA, FINAL])
def test_parallel_samples_are_gathered_in_order(kind: RequestOutputKind) -> None:
    p = processor()
    p.add(request(n=3, output_kind=kind))
    texts = ["", "", ""]
    outputs: list[RequestOutput] = []
    words = {2: ids("two"), 0: ids("zero"), 1: ids("one")}
    for index in (2, 0, 1):
        out, _ = p.process([Delta("a", index, [t]) for t in words[index]])
        outputs += out
    for index in (1, 2, 0):
        out, _ = p.process([Delta("a", index, ids(" end"), finish=FinishReason.LENGTH)])
        outputs += out
    for output in outputs:
        assert [o.index for o in output.outputs] == sorted(o.index for o in output.outputs)
        for o in output.outputs:
            texts[o.index] = texts[o.index] + o.text if kind is DELTA else o.text
    assert texts == ["zero end", "one end", "two end"]
    assert [o.finished for o in outputs].count(True) == 1 and outputs[-1].finished
    if kind is FINAL:
        assert len(outputs) == 1
    if kind is not DELTA:
        assert [o.index for o in outputs[-1].outputs] == [0, 1, 2]
        assert {o.finish_reason for o in outputs[-1].outputs} == {"length"}


def test_stream_interval() -> None:
    outputs, _ = run([50] * 10, stream_interval=4, output_kind=DELTA)
    assert [len(o.outputs[0].token_ids) for o in outputs] == [1, 4, 4, 1]


def test_abort_answers_what_there_is() -> None:
    p = processor()
    p.add(request(stream=True))
    p.process([Delta("a", 0, ids("one"))])
    (out,) = p.abort(["a", "unknown"])
    assert out.finished and out.outputs[0].finish_reason == "abort" and out.outputs[0].text == "one"
    assert p.process([Delta("a", 0, ids(" two"))]) == ([], []) and p.unfinished == 0


def test_a_failed_sequence_names_its_error() -> None:
    p = processor()
    p.add(request())
    (out,), _ = p.process([Delta("a", 0, [], finish=FinishReason.ERROR, error="ZeroDivisionError: x")])
    assert out.outputs[0].finish_reason == "error" and out.outputs[0].stop_reason == "ZeroDivisionError: x"


def test_metrics_and_cached_tokens() -> None:
    clock = Clock()
    p = processor(clock)
    p.add(request(), prompt="The capital", name="shown")
    clock.now = 102.0
    (out,), _ = p.process([Delta("a", 0, [50], cached_tokens=16)])
    clock.now = 105.0
    (out,), _ = p.process([Delta("a", 0, [51], finish=FinishReason.LENGTH)])
    m = out.metrics
    assert m is not None and m.num_generation_tokens == 2
    times = (m.arrival_time, m.first_token_time, m.last_token_time, m.finished_time, m.first_token_latency)
    assert times == (100.0, 102.0, 105.0, 105.0, 2.0)
    assert (out.num_cached_tokens, out.prompt, out.request_id) == (16, "The capital", "shown")


def test_same_id_twice() -> None:
    p = processor()
    p.add(request())
    with pytest.raises(ClientError, match="'a'"):
        p.add(request())


def test_detokenize_off_and_no_tokenizer() -> None:
    outputs, _ = run(ids("one"), detokenize=False, logprobs=None)
    assert outputs[-1].outputs[0].text == "" and outputs[-1].outputs[0].token_ids == ids("one")
    p = OutputProcessor(None, Clock())
    p.add(request(logprobs=0, stream=False))
    (out,), _ = p.process([Delta("a", 0, [5], finish=FinishReason.LENGTH, logprobs=[block([5], 0)])])
    assert out.outputs[0].text == "" and out.outputs[0].logprobs[0][5].decoded_token is None  # type: ignore[index]


@pytest.mark.parametrize("given_end", [True, False])
def test_beams(given_end: bool) -> None:
    """The end token belongs to no beam's tokens, whether the core sends it or not; fewer beams than asked will do."""
    p = processor()
    params = BeamSearchParams(beam_width=3, max_tokens=4)
    prompt = ids("The capital")
    p.add(Request("b", prompt, params, seed=0, eos_token_ids=(EOS,), stream=False))
    words = [ids(" of"), ids(" is")]
    deltas = [
        Delta("b", 0, words[0] + [EOS] * given_end, finish=FinishReason.STOP, cumulative_logprob=-1.5),
        Delta("b", 1, words[1], finish=FinishReason.LENGTH, cumulative_logprob=-2.5),
    ]
    (out,), _ = p.process(deltas)
    assert out.finished and [o.cumulative_logprob for o in out.outputs] == [-1.5, -2.5]
    assert [o.token_ids for o in out.outputs] == words
    assert [o.text for o in out.outputs] == ["The capital of", "The capital is"]


def test_long_streams_cost_the_same_for_each_token() -> None:
    """Neither text nor tokens are copied at each step of a DELTA stream."""
    import time

    def seconds(n: int) -> float:
        p = processor()
        p.add(request(output_kind=DELTA, stop=["never"], max_tokens=None))
        token = ids("a" * 3)[0]
        begin = time.process_time()
        for _ in range(n):
            p.process([Delta("a", 0, [token])])
        return time.process_time() - begin

    seconds(100)
    assert seconds(20000) < 40 * seconds(1000) + 0.01


def test_numpy_values_become_plain() -> None:
    p = processor()
    p.add(request(logprobs=0))
    (out,), _ = p.process([Delta("a", 0, [5], logprobs=[block([5], 0)])])
    ((key, value),) = (out.outputs[0].logprobs or [{}])[0].items()
    assert type(key) is int and type(value.logprob) is float and not isinstance(value.rank, np.integer)
