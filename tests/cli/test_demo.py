"""The commands and the examples with the bundled model, whole."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from quire.cli.main import cli

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--num-gpu-blocks-override", "64", "--max-model-len", "256"]


def run(*argv: str, stdin: str | None = None) -> Any:
    result = CliRunner().invoke(cli, [*argv, *SMALL], input=stdin, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def test_generate() -> None:
    result = run(
        "generate", "--temperature", "0", "--max-tokens", "4", "The capital of France is", "Count from 3 to 9:"
    )
    assert "> The capital of France is\nParis" in result.stdout
    assert "> Count from 3 to 9:\n3," in result.stdout
    assert "2 prompts" in result.stderr


def test_generate_chat_as_json() -> None:
    argv = ["generate", "--chat", "--json", "--temperature", "0", "--logprobs", "2"]
    lines = run(*argv, stdin="What is 17 + 25?\nWhat is the capital of Japan?\n").stdout.splitlines()
    sums, capital = [json.loads(line)["outputs"][0] for line in lines]
    assert "42" in sums["text"] and "Tokyo" in capital["text"]
    assert sums["finish_reason"] == "stop" and len(sums["logprobs"]) == len(sums["token_ids"])


def test_chat_streams_and_remembers() -> None:
    argv = ["chat", "--temperature", "0", "--message", "What is 2 + 3?", "--message", "What is the capital of Italy?"]
    lines = run(*argv).stdout.splitlines()
    assert lines[0] == "> What is 2 + 3?" and "5" in lines[1]
    assert lines[2] == "> What is the capital of Italy?" and "Rome" in lines[3]


def test_bench_with_random_weights(make_checkpoint: Callable[..., Path]) -> None:
    argv = ["bench", "throughput", "--num-prompts", "4", "--input-len", "8", "--output-len", "5"]
    result = run(*argv, "--model", str(make_checkpoint() / "config.json"), "--load-format", "dummy")
    found = json.loads(result.stdout)
    assert (found["prompt_tokens"], found["output_tokens"]) == (32, 20)
    assert found["output_tokens_per_s"] > 0


def test_a_model_that_does_not_work_is_one_line(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint(architectures=["NobodyForCausalLM"])
    argv = ["generate", "x", "--model", str(folder), "--load-format", "dummy", "--skip-tokenizer-init"]
    result = CliRunner().invoke(cli, argv)
    assert result.exit_code == 2
    assert result.output.startswith("Error: ") and result.output.count("\n") == 1
    assert "NobodyForCausalLM" in result.output and "ForCausalLM" in result.output.split("closest")[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "examples").glob("*.py")))
def test_examples_run(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "examples" / name)],
        env={"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1", "QUIRE_LOG_LEVEL": "warning"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
