"""Flags derive from the schema: every argument has one, `-` and `_` are alike, mistakes are one line."""

from __future__ import annotations

from typing import Any

import click
import pytest
from click.testing import CliRunner

from quire.cli import flags
from quire.config.args import EngineArgs, ServerArgs, specs
from quire.types.params import SamplingParams


def parse(*argv: str) -> dict[str, Any]:
    """What the flags mean: the engine's arguments that they give."""
    found: dict[str, Any] = {}

    @click.command(cls=flags.Command, context_settings=flags.CONTEXT)
    @flags.options_of(EngineArgs)
    @flags.options_of(ServerArgs)
    def command(**values: Any) -> None:
        found.update(flags.given(ServerArgs, values))
        found.update(flags.engine_kwargs(values))

    result = CliRunner().invoke(command, argv, catch_exceptions=False)
    if result.exit_code:
        raise click.UsageError(result.output)
    return found


@pytest.mark.parametrize("name", [*specs(EngineArgs), *specs(ServerArgs)])
def test_every_argument_has_a_flag_and_underscores_are_alike(name: str) -> None:
    cls = EngineArgs if name in specs(EngineArgs) else ServerArgs
    hint, spec, default = specs(cls)[name]
    if spec.later:
        with pytest.raises(click.UsageError, match="not supported"):
            argv = {bool: [], int: ["2"], float: ["2"]}.get(type(default))
            text = str(hint)
            parse(f"--{name}", *(argv if argv is not None else ['{"a": 1}' if "dict" in text else "2"]))
        return
    if isinstance(default, bool) or hint == (bool | None):
        for flag, value in ((f"--{name}", True), (f"--{name.replace('_', '-')}", True), (f"--no-{name}", False)):
            assert parse(flag) == {name: value}
        return
    sample: Any = (
        spec.choices[-1] if spec.choices else 1 if "int" in str(hint) else 0.5 if hint in (float, float | None) else "x"
    )
    text = str(sample)
    if "dict[" in str(hint):
        sample, text = {"a": 1}, '{"a": 1}'
    expected = [sample] if "list[" in str(hint) else text if spec.human else sample
    for flag in (f"--{name}", f"--{name.replace('_', '-')}"):
        assert parse(flag, text) == {name: expected}
        assert parse(f"{flag}={text}") == {name: expected}


def test_flags_of_the_guide() -> None:
    found = parse(
        *("--port", "8000", "--max-num-seqs", "256", "--tensor-parallel-size", "2"),
        *("--gpu-memory-utilization", "0.95", "--block_size", "32", "--log-level", "debug"),
        *("--model_impl", "auto", "--swap-space", "20"),
    )
    assert found == {
        "port": 8000,
        "max_num_seqs": 256,
        "tensor_parallel_size": 2,
        "gpu_memory_utilization": 0.95,
        "block_size": 32,
        "log_level": "debug",
        "model_impl": "auto",
        "swap_space": 20.0,
    }


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--max_num_seq", "3"], "'--max-num-seqs'"),
        (["--max-num-seqs", "many"], "not a valid integer"),
        (["--max-num-seqs", "0"], "max_num_seqs=0 must be at least 1"),
        (["--dtype", "float61"], "float16"),
        (["--hf-overrides", "{"], "not JSON"),
        (["--hf-overrides", "[1]"], "JSON object"),
        (["--max-model-len", "8x"], "max_model_len='8x'"),
    ],
)
def test_mistakes(argv: list[str], words: str) -> None:
    with pytest.raises(click.UsageError) as caught:
        parse(*argv)
    assert words in str(caught.value)


def test_choices_may_be_written_with_dashes() -> None:
    assert parse("--logprobs-mode", "processed-logits") == {"logprobs_mode": "processed_logits"}


def test_help_has_the_sections_and_hides_what_is_not_there_yet() -> None:
    @click.command(cls=flags.Command, context_settings=flags.CONTEXT)
    @flags.options_of(EngineArgs)
    def command(**values: Any) -> None: ...

    text = CliRunner().invoke(command, ["-h"]).output
    assert "KV cache:" in text and "--max-num-seqs" in text
    assert "--speculative-config" not in text


def sampling(argv: list[str], defaults: SamplingParams | None = None, **fallback: Any) -> SamplingParams:
    found: list[SamplingParams] = []

    @click.command(context_settings=flags.CONTEXT)
    @flags.sampling_options
    def command(**values: Any) -> None:
        found.append(flags.sampling_params(values, defaults or SamplingParams(), **fallback))
        assert not values

    result = CliRunner().invoke(command, argv, catch_exceptions=False)
    if result.exit_code:
        raise click.UsageError(result.output)
    return found[0]


def test_sampling_flags_go_before_the_model_s_defaults() -> None:
    defaults = SamplingParams(temperature=0.6, top_p=0.9)
    assert sampling([], defaults, max_tokens=128) == SamplingParams(temperature=0.6, top_p=0.9, max_tokens=128)
    found = sampling(["--temperature", "0.2", "--max_tokens", "7"], defaults, max_tokens=128)
    assert found == SamplingParams(temperature=0.2, top_p=0.9, max_tokens=7)
    found = sampling(["--stop", "a", "--stop", "b", "--sampling-seed", "3", "--ignore-eos", "--n", "2"])
    assert found == SamplingParams(stop=["a", "b"], seed=3, ignore_eos=True, n=2)


def test_sampling_mistakes_are_one_line() -> None:
    with pytest.raises(click.UsageError, match="temperature"):
        sampling(["--temperature", "9"])


def test_flags_of_vllm_without_a_counterpart_say_why() -> None:
    from click.testing import CliRunner

    from quire.cli.main import cli

    result = CliRunner().invoke(cli, ["generate", "hi", "--best_of", "3"])
    assert result.exit_code == 2 and "--best-of has no counterpart in quire: ask for n" in result.stderr
    result = CliRunner().invoke(cli, ["generate", "hi", "--modell", "demo"])
    assert result.exit_code == 2 and "No such option" in result.stderr
