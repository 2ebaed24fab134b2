"""The commands around the engine: where prompts come from, what is printed, what a conversation keeps."""

from __future__ import annotations

import io
import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner

import quire
from quire.cli import bench, chat, env
from quire.cli.main import COMMANDS, cli
from quire.types.errors import ClientError
from quire.types.outputs import CompletionOutput, Logprob, RequestOutput
from quire.types.params import SamplingParams


class FakeLLM:
    """Answers every prompt with its own length, and remembers how it was called."""

    def __init__(self, log: list[Any], **kwargs: Any) -> None:
        self.log = log
        log.append(("init", kwargs))

    def get_default_sampling_params(self) -> SamplingParams:
        return SamplingParams(temperature=0.5)

    def generate(self, prompts: list[Any], params: Any, use_tqdm: bool = True) -> list[RequestOutput]:
        self.log.append(("generate", prompts, params, use_tqdm))
        each = params if isinstance(params, list) else [params] * len(prompts)
        return [self.output(p, q) for p, q in zip(prompts, each, strict=True)]

    def chat(self, messages: list[Any], params: Any, use_tqdm: bool = True) -> list[RequestOutput]:
        self.log.append(("chat", messages, params, use_tqdm))
        return [self.output(m[-1]["content"], params) for m in messages]

    def output(self, prompt: Any, params: SamplingParams) -> RequestOutput:
        ids = prompt["prompt_token_ids"] if isinstance(prompt, dict) else list(range(len(prompt)))
        text = f"length {len(ids)}"
        logprobs = [{5: Logprob(-0.5, 1, "x")}] if params.logprobs else None
        made = [
            CompletionOutput(i, text, [5] * params.max_tokens, logprobs=logprobs, finish_reason="length")
            for i in range(params.n)
        ]
        return RequestOutput("0", None, ids, outputs=made, finished=True)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    log: list[Any] = []
    monkeypatch.setattr(quire, "LLM", lambda **kwargs: FakeLLM(log, **kwargs), raising=False)
    return log


def run(*argv: str, stdin: str | None = None) -> Any:
    return CliRunner().invoke(cli, argv, input=stdin, catch_exceptions=False)


def test_version_and_commands() -> None:
    assert run("--version").output == f"quire {quire.__version__}\n"
    shown = run("--help").output
    assert all(name in shown for name in COMMANDS)
    assert "No such command 'serv'" in run("serv").output
    for name in COMMANDS:
        assert run(name, "--help").exit_code == 0


def test_generate_prints_each_prompt_with_its_output(calls: list[Any]) -> None:
    result = run("generate", "abc", "hello", "--max-tokens", "3", "--max_num_seqs", "4")
    assert result.stdout == "> abc\nlength 3\n\n> hello\nlength 5\n\n"
    assert "2 prompts, 8 prompt tokens, 6 generated tokens" in result.stderr
    assert calls[0][1] == {"log_level": "warning", "disable_log_stats": True, "max_num_seqs": 4}
    assert calls[1] == ("generate", ["abc", "hello"], SamplingParams(temperature=0.5, max_tokens=3), False)


def test_generate_json_and_several_outputs(calls: list[Any]) -> None:
    lines = run("generate", "abc", "--json", "--n", "2", "--logprobs", "1", "--max-tokens", "1").stdout.splitlines()
    (found,) = [json.loads(line) for line in lines]
    assert found["prompt"] == "abc"
    assert [o["index"] for o in found["outputs"]] == [0, 1]
    assert found["outputs"][0]["token_ids"] == [5]
    assert found["outputs"][0]["logprobs"] == [{"5": [-0.5, 1, "x"]}]
    shown = run("generate", "abc", "--n", "2").stdout
    assert "[0] length 3" in shown and "[1] length 3" in shown


def test_generate_reads_files_and_standard_input(calls: list[Any], tmp_path: Path) -> None:
    plain, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    plain.write_text("one\n\n  two\n")
    lines.write_text('{"prompt": "th\\nree"}\n"four"\n')
    run("generate", "zero", "-f", str(plain), "-f", str(lines))
    assert calls[-1][1] == ["zero", "one", "  two", "th\nree", "four"]
    run("generate", stdin="five\nsix\n")
    assert calls[-1][1] == ["five", "six"]
    run("generate", "--chat", "hi", "--progress")
    assert calls[-1][0] == "chat" and calls[-1][1] == [[{"role": "user", "content": "hi"}]] and calls[-1][3] is True


@pytest.mark.parametrize(
    ("argv", "stdin", "words"),
    [
        (["-f", "/no/such/file"], None, "cannot read prompts"),
        ([], "", "no prompt in"),
        (["x", "--temperature", "-1"], None, "temperature"),
        (["x", "--block-size", "0"], None, "block_size"),
    ],
)
def test_generate_mistakes_are_one_line(calls: list[Any], argv: list[str], stdin: str | None, words: str) -> None:
    result = run("generate", *argv, stdin=stdin)
    assert result.exit_code == 2
    assert words in result.output and "Traceback" not in result.output


def test_generate_reports_a_bad_line(calls: list[Any], tmp_path: Path) -> None:
    bad = tmp_path / "p.jsonl"
    bad.write_text('"fine"\n{"text": 1}\n')
    assert "line 2 is neither" in run("generate", "-f", str(bad)).output
    bad.write_text("{\n")
    assert "line 1 is not JSON" in run("generate", "-f", str(bad)).output


def test_an_error_of_the_engine_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**kwargs: Any) -> None:
        raise ClientError("model folder 'x' does not exist")

    monkeypatch.setattr(quire, "LLM", fail, raising=False)
    result = run("generate", "x")
    assert result.exit_code == 2 and result.output == "Error: model folder 'x' does not exist\n"


def test_bench_throughput(calls: list[Any], make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    config = make_checkpoint(vocab_size=50) / "config.json"
    result = run(
        *("bench", "throughput", "--num-prompts", "6", "--input-len", "10", "--output-len", "4", "-o", str(file)),
        *("--random-range-ratio", "0.5", "--model", str(config), "--load-format", "dummy"),
    )
    found = json.loads(result.stdout)
    assert json.loads(file.read_text()) == found
    _, prompts, params, bar = calls[-1]
    lengths = [len(p["prompt_token_ids"]) for p in prompts]
    assert bar is False and len(prompts) == 6 and set(lengths) <= set(range(5, 16)) and len(set(lengths)) > 1
    assert all(0 <= t < 50 for p in prompts for t in p["prompt_token_ids"])
    assert all(p.ignore_eos and not p.detokenize and 2 <= p.max_tokens <= 6 for p in params)
    assert found["prompt_tokens"] == sum(lengths) and found["output_tokens"] == sum(p.max_tokens for p in params)
    assert found["output_tokens_per_s"] == pytest.approx(found["output_tokens"] / found["elapsed_s"])
    assert calls[0][1]["skip_tokenizer_init"] is True  # the folder has no tokenizer
    assert found["arguments"]["load_format"] == "dummy"


def test_bench_latency_uses_new_prompts_for_each_run(calls: list[Any], make_checkpoint: Callable[..., Path]) -> None:
    argv = ["bench", "latency", "--num-iters", "3", "--model", str(make_checkpoint()), "--load-format", "dummy"]
    found = json.loads(run(*argv).stdout)
    assert found["num_iters"] == 3 and found["min_s"] <= found["median_s"] <= found["max_s"]
    prompts = [tuple(c[1][0]["prompt_token_ids"]) for c in calls if c[0] == "generate"]
    assert len(set(prompts)) == 4  # one to warm up


@pytest.mark.parametrize("rate", ["0", "-1"])
def test_bench_serve_needs_a_rate(rate: str) -> None:
    result = run("bench", "serve", "--request-rate", rate)
    assert result.exit_code == 2 and "--request-rate" in result.output


def test_bench_says_when_outputs_are_cut_short() -> None:
    llm = SimpleNamespace(generate=lambda prompts, params, use_tqdm: [FakeLLM([]).output("ab", SamplingParams())])
    with pytest.raises(click.ClickException, match="16 tokens came back, not 99"):
        bench.run(llm, [bench.random_prompt(random.Random(0), 9, 2)], [99])


def test_env_reports_without_torch_and_with_reasons() -> None:
    found = json.loads(run("env", "--json", "--device", "cpu").stdout)
    assert found["quire"] == quire.__version__ and found["cpu"]["physical_cores"] >= 1
    assert (found["libraries"]["torch"] and found["gpus"]) or found["no_gpu_reason"]
    chosen = {c["op"]: c for c in found["operations"]["chosen"]}
    assert chosen["attention"]["chosen"] in chosen["attention"]["candidates"]
    candidates = {"native": None, "triton": "no GPU", "reference": None}
    one = {"op": "attention", "chosen": "native", "candidates": candidates}
    shown = env.as_text(found | {"operations": {"device": "cpu", "dtype": "float32", "chosen": [one]}})
    assert "attention: native" in shown and "not triton: no GPU" in shown and "not reference: lower priority" in shown


def test_light_commands_import_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['quire', '--version']\n"
        "from quire.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"quire {quire.__version__}\n"


class FakeEngine:
    """Streams the words it was given; the tokenizer counts characters."""

    def __init__(self, answers: list[str]) -> None:
        self.answers, self.requests, self.aborted, self.drained = answers, list[Any](), list[str](), 0
        self.tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: [len(text)])
        self.config = SimpleNamespace(model=SimpleNamespace(chat_template=None))
        self.words: list[str] = []

    def add_request(self, request_id: str, prompt: Any, params: Any) -> None:
        if prompt["prompt_token_ids"][0] > 200:
            raise ClientError("prompt too long")
        self.requests.append((request_id, prompt, params))
        self.words = self.answers.pop(0).split(" ")

    def step(self) -> list[RequestOutput]:
        word = self.words.pop(0)
        last = not self.words
        return [RequestOutput("x", None, [], outputs=[CompletionOutput(0, word + " " * (not last), [])], finished=last)]

    def abort_request(self, request_id: str) -> None:
        self.aborted.append(request_id)

    def drain(self) -> None:
        self.drained += 1


@pytest.fixture
def conversation(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[chat.Conversation, FakeEngine]]:
    from quire.engine import chat as templates

    def render(tokenizer: Any, messages: Any, chat_template: str | None) -> str:
        return "".join(m["content"] for m in messages)

    monkeypatch.setattr(templates, "render_chat", render)

    def make(*answers: str, system: str | None = None) -> tuple[chat.Conversation, FakeEngine]:
        engine = FakeEngine(list(answers))
        return chat.Conversation(engine, SamplingParams(), system), engine  # pyright: ignore[reportArgumentType]

    return make


Make = Callable[..., tuple[chat.Conversation, FakeEngine]]


def test_a_conversation_streams_and_remembers(conversation: Make) -> None:
    talk, engine = conversation("good day to you", "bye", system="be kind")
    assert list(talk.say("hello")) == ["good ", "day ", "to ", "you"]
    assert list(talk.say("leave")) == ["bye"]
    assert [m["role"] for m in talk.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert talk.messages[2]["content"] == "good day to you"
    assert engine.requests[1][1] == {"prompt_token_ids": [len("be kind" + "hello" + "good day to you" + "leave")]}
    assert engine.requests[0][0] != engine.requests[1][0]
    talk.clear()
    assert talk.messages == [{"role": "system", "content": "be kind"}]


def test_an_ended_answer_is_aborted_and_kept_as_far_as_it_came(conversation: Make) -> None:
    talk, engine = conversation("one two three", "next")
    stream = talk.say("count")
    assert next(stream) == "one "
    stream.close()
    assert engine.aborted == [engine.requests[0][0]] and engine.drained == 1
    assert talk.messages[-1] == {"role": "assistant", "content": "one "}
    assert list(talk.say("again")) == ["next"]
    assert len(engine.aborted) == 1


def test_ctrl_c_ends_an_answer_between_two_steps(conversation: Make, capsys: pytest.CaptureFixture[str]) -> None:
    talk, engine = conversation("one two three", "next")
    step = engine.step

    def interrupted() -> list[RequestOutput]:
        signal.raise_signal(signal.SIGINT)
        return step()

    engine.step = interrupted
    before = signal.getsignal(signal.SIGINT)
    chat.answer(talk, "count")
    assert capsys.readouterr().out == "one  [ended]\n"
    assert talk.messages[-1]["content"] == "one " and len(engine.aborted) == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_a_refused_message_leaves_the_conversation_as_it_was(conversation: Make) -> None:
    talk, _ = conversation("fine")
    with pytest.raises(ClientError, match="too long"):
        next(talk.say("x" * 300))
    assert talk.messages == []
    assert list(talk.say("short")) == ["fine"]


def test_the_loop(conversation: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    talk, engine = conversation("one", "two")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"hi\n\n/help\n/clear\n{'x' * 300}\nyou\n/exit\nnever\n"))
    chat.loop(talk, "demo")
    shown = capsys.readouterr()
    assert shown.out == f"one\n{chat.HELP}\ntwo\n"
    assert "too long" in shown.err
    assert [m["content"] for m in talk.messages] == ["you", "two"]
    assert len(engine.requests) == 2
