"""LLM: vLLM's offline interface over a core that follows a script."""

from __future__ import annotations

import gc
import logging
import signal
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "engine"))

from fake_client import FakeClient, client_of, counting, make_config, make_engine
from tokenizer_zoo import trained

from quire.engine.llm_engine import LLMEngine
from quire.llm import LLM
from quire.types.errors import ClientError
from quire.types.params import BeamSearchParams, RequestOutputKind, SamplingParams
from quire.types.prompts import TokensPrompt
from quire.types.request import Request


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., LLM]:
    return lambda **args: LLM.from_engine(make_engine(tmp_path, **args))


def quiet(llm: LLM) -> None:
    """Nothing is left behind."""
    client = client_of(llm.llm_engine)
    assert not client.has_work and not llm.llm_engine.has_unfinished_requests()
    assert not llm._done and not llm._enqueued
    assert llm.llm_engine.stat_logger.stats.running == 0


def expected(prompt: list[int], n: int = 16, index: int = 0) -> list[int]:
    return counting(Request("x", prompt, SamplingParams(), 0), index)[:n]


def test_results_in_input_order(make: Callable[..., LLM]) -> None:
    """Requests of very different lengths end in another order than they came."""
    llm = make()
    prompts = [[5 + i] for i in range(8)]
    params = [SamplingParams(max_tokens=40 - 5 * i) for i in range(8)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    for prompt, p, output in zip(prompts, params, outputs, strict=True):
        assert output.prompt_token_ids == prompt and output.finished and output.prompt is None
        assert output.outputs[0].token_ids == expected(prompt, p.max_tokens or 0)
        assert output.outputs[0].text == trained().decode(output.outputs[0].token_ids)
        assert output.outputs[0].finish_reason == "length"
    assert not any(r.stream for r in client_of(llm.llm_engine).requests)
    quiet(llm)


def test_forms_of_prompts(make: Callable[..., LLM]) -> None:
    llm = make()
    tokens = trained().encode("The capital")
    one: list[Any] = ["The capital", tokens, {"prompt": "The capital"}, TokensPrompt(prompt_token_ids=tokens)]
    for prompts in [*one, one, tuple(one)]:
        outputs = llm.generate(prompts, use_tqdm=False)
        assert [o.prompt_token_ids for o in outputs] == [tokens] * (
            len(one) if isinstance(prompts, list | tuple) and prompts is not tokens else 1
        )
    assert llm.generate("The capital", use_tqdm=False)[0].prompt == "The capital"
    assert llm.generate(prompt_token_ids=[tokens, [5]], use_tqdm=False)[1].prompt_token_ids == [5]
    assert llm.generate([], use_tqdm=False) == []
    quiet(llm)


def test_parallel_samples(make: Callable[..., LLM]) -> None:
    (output,) = make().generate([[5, 6]], SamplingParams(n=3, max_tokens=4), use_tqdm=False)
    assert [o.token_ids for o in output.outputs] == [expected([5, 6], 4, i) for i in range(3)]
    assert [o.index for o in output.outputs] == [0, 1, 2]


@pytest.mark.parametrize("late", [0, 1, 3])
@pytest.mark.parametrize("chunk", [1, 4])
def test_stop_strings_at_any_depth(tmp_path: Path, late: int, chunk: int) -> None:
    words = trained().encode(" one two three four five six seven")
    llm = LLM.from_engine(make_engine(tmp_path, lambda r, i: words * 20, late, chunk))
    (output,) = llm.generate("x", SamplingParams(max_tokens=100, stop=["three"]), use_tqdm=False)
    done = output.outputs[0]
    assert done.text == " one two " and done.stop_reason == "three"
    assert trained().decode(done.token_ids).endswith("three")
    assert client_of(llm.llm_engine).ended == [("0", 0, len(done.token_ids))]
    quiet(llm)


@pytest.mark.parametrize(
    ("prompts", "kwargs", "words"),
    [
        ([[5], []], {}, "empty"),
        ([[5], [9999]], {}, "9999"),
        ([[5], "x"], {"sampling_params": [SamplingParams()]}, "1 entries for 2 prompts"),
        ([[5], "x"], {"priority": [1]}, "1 entries for 2 prompts"),
        ([[5]], {"lora_request": object()}, "lora_request"),
        ([[5]], {"sampling_params": {"n": 1}}, "SamplingParams"),
        ([[5]], {"tokenization_kwargs": {"padding": True}}, "padding"),
        ([[5]], {"mm_processor_kwargs": {"a": 1}}, "not supported yet"),
        ([[5]], {"prompt_token_ids": [[5]]}, "not both"),
        (None, {}, "prompts is missing"),
    ],
)
def test_one_bad_prompt_submits_none(make: Callable[..., LLM], prompts: Any, kwargs: Any, words: str) -> None:
    llm = make()
    with pytest.raises(ClientError, match=words):
        llm.generate(prompts, use_tqdm=False, **kwargs)
    assert client_of(llm.llm_engine).requests == []
    quiet(llm)


def test_core_that_refuses_the_second_request(make: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make()
    add = FakeClient.add

    def picky(self: FakeClient, request: Request) -> None:
        if request.prompt_token_ids == [6]:
            raise ClientError("too small")
        add(self, request)

    monkeypatch.setattr(FakeClient, "add", picky)
    with pytest.raises(ClientError, match="too small"):
        llm.generate([[5], [6]], use_tqdm=False)
    quiet(llm)


def test_ctrl_c_aborts_and_leaves_the_engine_usable(make: Callable[..., LLM], default_ctrl_c: None) -> None:
    llm = make()
    client = client_of(llm.llm_engine)
    finished_steps = []

    def interrupt(step: int) -> None:
        if step == 3:
            signal.raise_signal(signal.SIGINT)
        finished_steps.append(step)  # the signal does not tear the step apart

    client.on_step = interrupt
    kept = llm.enqueue([[9]], SamplingParams(max_tokens=30))
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[5], [6]], SamplingParams(max_tokens=None), use_tqdm=False)
    assert 3 in finished_steps and client.aborted == ["1", "2"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    (other,) = llm.wait_for_completion(use_tqdm=False)
    assert other.request_id == kept[0] and other.outputs[0].token_ids == expected([9], 30)
    assert llm.generate([[5]], use_tqdm=False)[0].outputs[0].token_ids == expected([5])
    quiet(llm)


def test_an_error_in_a_step_aborts(make: Callable[..., LLM]) -> None:
    llm = make()
    client = client_of(llm.llm_engine)

    def fail(step: int) -> None:
        if step == 2:
            raise OSError("disk")

    client.on_step = fail
    with pytest.raises(OSError, match="disk"):
        llm.generate([[5], [6]], use_tqdm=False)
    quiet(llm)
    assert llm.generate([[5]], use_tqdm=False)[0].finished


def test_enqueue_and_wait(make: Callable[..., LLM]) -> None:
    llm = make()
    first = llm.enqueue([[5], [6]], SamplingParams(max_tokens=30))
    second = llm.enqueue([7], SamplingParams(max_tokens=2))
    direct = llm.generate([[8]], SamplingParams(max_tokens=3), use_tqdm=False)  # the others go on meanwhile
    assert direct[0].outputs[0].token_ids == expected([8], 3)
    outputs = llm.wait_for_completion(use_tqdm=False)
    assert [o.request_id for o in outputs] == first + second
    assert [o.prompt_token_ids for o in outputs] == [[5], [6], [7]]
    assert llm.wait_for_completion(use_tqdm=False) == []
    llm.enqueue_chat([{"role": "user", "content": "hi"}])
    assert len(llm.wait_for_completion(use_tqdm=False)) == 1
    quiet(llm)


def test_chat(make: Callable[..., LLM]) -> None:
    llm = make()
    talk = [{"role": "user", "content": "hi"}]
    (output,) = llm.chat(talk, use_tqdm=False)
    assert output.prompt == "<s><user>hi<|end|>\n<assistant>"
    assert output.prompt_token_ids == trained().encode(output.prompt, add_special_tokens=False)
    two = llm.chat(
        [talk, talk], use_tqdm=False, chat_template="{{ messages[0].content }}{{ k }}", chat_template_kwargs={"k": 1}
    )
    assert [o.prompt for o in two] == ["hi1", "hi1"]
    with pytest.raises(ClientError, match="no messages"):
        llm.chat([])
    assert make(skip_tokenizer_init=True).generate([[5]], use_tqdm=False)[0].outputs[0].text == ""
    with pytest.raises(ClientError, match="tokenizer"):
        make(skip_tokenizer_init=True).chat(talk)


def test_beam_search(make: Callable[..., LLM]) -> None:
    llm = make()
    prompts: list[Any] = ["The capital", [5, 6], {"prompt_token_ids": [7]}]
    for limit in (None, 2):
        outputs = llm.beam_search(prompts, BeamSearchParams(beam_width=2, max_tokens=4), concurrency_limit=limit)
        assert [len(o.sequences) for o in outputs] == [2, 2, 2]
        best = outputs[1].sequences[0]
        assert best.tokens == [5, 6, *expected([5, 6], 4)] and best.cum_logprob == -1.0
        assert best.text == trained().decode(best.tokens)
    second = outputs[1].sequences[1]
    assert second.finish_reason == "stop" and 1 not in second.tokens
    for bad in (SamplingParams(), None):
        with pytest.raises(ClientError, match="BeamSearchParams"):
            llm.beam_search(prompts, bad)  # type: ignore[arg-type]
    quiet(llm)


class Bar:
    """What tqdm is asked for."""

    def __init__(self, total: int, desc: str, **kwargs: Any) -> None:
        self.total, self.desc, self.n, self.closed, self.postfix = total, desc, 0, False, ""

    def update(self, n: int) -> None:
        self.n += n

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        self.postfix = text

    def close(self) -> None:
        self.closed = True


def test_progress_bar(make: Callable[..., LLM], capsys: pytest.CaptureFixture[str]) -> None:
    bars: list[Bar] = []

    def bar(**kwargs: Any) -> Bar:
        bars.append(Bar(**kwargs))
        return bars[-1]

    llm = make()
    llm.generate([[5], [6]], use_tqdm=bar)
    assert (bars[0].total, bars[0].n, bars[0].closed, bars[0].desc) == (2, 2, True, "Processed prompts")
    assert "input: " in bars[0].postfix and "output: 0.00" not in bars[0].postfix
    assert capsys.readouterr().err == ""
    llm.generate([[5], [6]])
    shown = capsys.readouterr().err
    assert "Processed prompts" in shown and "2/2" in shown and "toks/s" in shown


def test_the_users_parameters_are_not_changed(make: Callable[..., LLM]) -> None:
    params = SamplingParams(max_tokens=3)
    make().generate([[5], [6]], params, use_tqdm=False)
    assert params == SamplingParams(max_tokens=3) and params.output_kind is RequestOutputKind.CUMULATIVE


def test_default_sampling_params(tmp_path: Path) -> None:
    config = make_config(tmp_path, override_generation_config={"temperature": 0.5, "max_new_tokens": 7})
    llm = LLM.from_engine(LLMEngine(config, FakeClient))
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.5, max_tokens=7)
    assert len(llm.generate([[5]], use_tqdm=False)[0].outputs[0].token_ids) == 7


def test_statistics(make: Callable[..., LLM], caplog: pytest.LogCaptureFixture) -> None:
    llm = make()
    stats = llm.llm_engine.stat_logger.stats
    assert (stats.blocks_total, stats.blocks_used, stats.blocks_free, stats.kv_cache_usage) == (10, 0, 10, 0.0)
    llm.generate([[5]], use_tqdm=False)
    metrics = {m.name: m for m in llm.get_metrics()}
    assert metrics["quire:generation_tokens"].value > 0 and metrics["quire:generation_tokens"].kind == "counter"
    assert metrics["quire:kv_cache_usage_perc"].kind == "gauge"
    assert llm.get_world_size() == 1 and llm.reset_prefix_cache() is True
    with pytest.raises(ClientError):
        llm.reset_prefix_cache(reset_running_requests=True)


@pytest.mark.parametrize("disabled", [False, True])
def test_periodic_log_line(tmp_path: Path, caplog: pytest.LogCaptureFixture, disabled: bool) -> None:
    """A line every ten seconds of work, none while idle."""
    clock = [0.0]
    config = make_config(tmp_path, disable_log_stats=disabled)
    llm = LLM.from_engine(LLMEngine(config, FakeClient, lambda: clock[0]))

    def tick(step: int) -> None:
        clock[0] += 1.0

    client_of(llm.llm_engine).on_step = tick
    with caplog.at_level(logging.INFO, "quire"):
        llm.generate([[5]], SamplingParams(max_tokens=35), use_tqdm=False)
        first = [r.getMessage() for r in caplog.records if "tokens/s" in r.getMessage()]
        clock[0] += 1000
        llm.generate([[5]], SamplingParams(max_tokens=5), use_tqdm=False)
        lines = [r.getMessage() for r in caplog.records if "tokens/s" in r.getMessage()]
    assert len(first) == (0 if disabled else 3) and lines == first
    if first:
        assert "generation 1.0 tokens/s" in first[0] and "running 1" in first[0] and "10.0% in use" in first[0]


def test_closing(make: Callable[..., LLM]) -> None:
    with make() as llm:
        tokenizer = llm.get_tokenizer()
        assert tokenizer.encode("one two") == trained().encode("one two")
        client = client_of(llm.llm_engine)
    assert client.closed


def test_arguments_are_those_of_the_engine(tmp_path: Path) -> None:
    with pytest.raises(ClientError, match="max_model_len"):
        LLM("demo", max_model_length=3)
    with pytest.raises(ClientError, match="no config"):
        LLM(str(tmp_path))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda llm: llm.generate(5), "a prompt must be text.*got int"),
        (lambda llm: llm.generate(b"abc"), "a prompt must be text.*got bytes"),
        (lambda llm: llm.generate("a", "x"), "must be SamplingParams, got str"),
        (lambda llm: llm.generate("a", {"temperature": 0}), "must be SamplingParams, got dict"),
        (lambda llm: llm.generate("a", priority=1), "priority must be a list"),
        (lambda llm: llm.generate("a", priority=["x"]), "priority must be an integer, got 'x'"),
        (lambda llm: llm.generate("a", tokenization_kwargs=3), "tokenization_kwargs must be a dict"),
        (lambda llm: llm.chat("hi"), "messages must be a list of dicts"),
        (lambda llm: llm.chat({"role": "user", "content": "hi"}), "messages must be a list of dicts"),
        (lambda llm: llm.chat([5]), "a message must be a dict"),
        (lambda llm: llm.chat([{"role": "user", "content": "a"}], mm_processor_kwargs={"a": 1}), "mm_processor_kwargs"),
        (
            lambda llm: llm.chat([{"role": "user", "content": "a"}], chat_template_content_format="xml"),
            "chat_template_content_format must be one of auto, string, openai, got 'xml'",
        ),
        (
            lambda llm: llm.chat([{"role": "user", "content": "a"}], chat_template="{% if %}"),
            "^chat template: syntax error in line 1",
        ),
        (
            lambda llm: llm.beam_search("a", BeamSearchParams(2, 2), concurrency_limit="a"),
            "concurrency_limit must be an integer",
        ),
    ],
)
def test_wrong_types_are_one_line(make: Callable[..., LLM], call: Callable[[LLM], Any], words: str) -> None:
    llm = make()
    with pytest.raises(ClientError, match=words) as e:
        call(llm)
    assert "\n" not in str(e.value)
    assert llm.generate([[5]], use_tqdm=False)[0].outputs[0].token_ids == expected([5])
    quiet(llm)


def test_methods_that_are_not_here_say_why(make: Callable[..., LLM]) -> None:
    llm = make()
    assert not hasattr(llm, "reward")
    with pytest.raises(AttributeError, match=r"LLM.reward is not in quire: .*token_classify"):
        llm.reward("a")
    with pytest.raises(ClientError, match="generates text: to embed with it, make the engine with runner='pooling'"):
        llm.embed([[5]])
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        llm.nothing()


def test_a_closed_engine_holds_no_memory_until_somebody_collects_garbage() -> None:
    """On a GPU the next engine would find it full."""
    gc.collect()
    gc.disable()
    try:
        llm = LLM("demo", skip_tokenizer_init=True, max_model_len=128)
        client: Any = llm.llm_engine.client
        runner = client._executor.worker._runner
        held = [weakref.ref(thing) for thing in (client._executor.worker, runner, runner._store, runner._model)]
        del runner
        llm.close()
        del llm, client
        assert [ref() for ref in held] == [None] * len(held)
    finally:
        gc.enable()
