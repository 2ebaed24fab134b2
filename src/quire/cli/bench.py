"""`quire bench`: throughput, latency and start-up, as JSON (`bench_serve` adds servers).

Owns: the workloads (random token ids, so that no tokenizer matters) and what is reported of them. A model folder will
do, or a config.json with `--load-format dummy`. Every result carries what it was measured with.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from quire import __version__
from quire.cli import flags
from quire.cli.bench_serve import command as serve
from quire.config.args import EngineArgs
from quire.utils.logging import setup_logging


@click.group(context_settings=flags.CONTEXT)
def command() -> None:
    """Measure throughput, latency, start-up or a server; results as JSON."""


command.add_command(serve)


def shared(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that all three have."""
    function = flags.options_of(EngineArgs)(function)
    return click.option("-o", "--output-json", help="Also write the result to this file.")(function)


def sizes(prompts: int, input_len: int, output_len: int) -> flags.Decorator:
    """The options of a workload."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for name, default, text in (
            ("--output-len", output_len, "Tokens to generate for each."),
            ("--input-len", input_len, "Tokens of each prompt."),
            ("--num-prompts", prompts, "Prompts submitted together."),
        ):
            kind = click.IntRange(min=1)
            function = click.option(name, type=kind, default=default, show_default=True, help=text)(function)
        return function

    return decorate


@command.command("throughput", cls=flags.Command, context_settings=flags.CONTEXT)
@sizes(64, 128, 128)
@click.option("--random-range-ratio", type=click.FloatRange(0, 1), default=0.0, show_default=True,
              help="Draw each length from [len * (1 - ratio), len * (1 + ratio)].")  # fmt: skip
@shared
def throughput(
    num_prompts: int, input_len: int, output_len: int, random_range_ratio: float, output_json: str | None, **values: Any
) -> None:
    """Many prompts in one call: requests and tokens per second."""
    llm, kwargs, vocab = make_llm(values)
    draw = random.Random(kwargs.get("seed") or 0)

    def length(mean: int) -> int:
        spread = int(mean * random_range_ratio)
        return max(1, draw.randint(mean - spread, mean + spread))

    prompts = [random_prompt(draw, vocab, length(input_len)) for _ in range(num_prompts)]
    wanted = [length(output_len) for _ in prompts]
    with flags.user_errors():
        # What is made on first use is not part of a rate; the prompt is a new one, lest the cache knows the next.
        run(llm, [random_prompt(draw, vocab, input_len)], [1])
        seconds, prompt_tokens, output_tokens = run(llm, prompts, wanted)
    finish(
        {
            "benchmark": "throughput",
            "num_prompts": num_prompts,
            "elapsed_s": seconds,
            "requests_per_s": num_prompts / seconds,
            "prompt_tokens": prompt_tokens,
            "output_tokens": output_tokens,
            "total_tokens_per_s": (prompt_tokens + output_tokens) / seconds,
            "output_tokens_per_s": output_tokens / seconds,
        },
        kwargs,
        output_json,
    )


@command.command("latency", cls=flags.Command, context_settings=flags.CONTEXT)
@sizes(1, 32, 128)
@click.option("--num-iters", type=click.IntRange(min=1), default=5, show_default=True, help="Measured runs.")
@click.option("--num-iters-warmup", type=click.IntRange(min=0), default=1, show_default=True, help="Runs before.")
@shared
def latency(
    num_prompts: int,
    input_len: int,
    output_len: int,
    num_iters: int,
    num_iters_warmup: int,
    output_json: str | None,
    **values: Any,
) -> None:
    """One batch from start to end: seconds, over several runs with different prompts."""
    llm, kwargs, vocab = make_llm(values)
    draw = random.Random(kwargs.get("seed") or 0)
    seconds: list[float] = []
    made = num_prompts * output_len
    with flags.user_errors():
        for i in range(num_iters_warmup + num_iters):
            # New prompts for each run: the prefix cache would answer the old ones.
            prompts = [random_prompt(draw, vocab, input_len) for _ in range(num_prompts)]
            elapsed, *_ = run(llm, prompts, [output_len] * num_prompts)
            if i >= num_iters_warmup:
                seconds.append(elapsed)
    mean = statistics.fmean(seconds)
    finish(
        {
            "benchmark": "latency",
            "batch_size": num_prompts,
            "input_len": input_len,
            "output_len": output_len,
            **summary(seconds),
            "output_tokens_per_s": made / mean,
            "seconds_per_output_token": mean / output_len,
        },
        kwargs,
        output_json,
    )


STARTUP = """
import json, sys, time
import quire
imported = time.time()
llm = quire.LLM(**json.loads(sys.argv[1]))
made = time.time()
prompt = {"prompt_token_ids": [1, 2, 3]}
llm.generate([prompt], quire.SamplingParams(temperature=0.0, max_tokens=1, detokenize=False), use_tqdm=False)
print(json.dumps({"imported": imported, "made": made, "first_token": time.time()}))
"""


@command.command("startup", cls=flags.Command, context_settings=flags.CONTEXT)
@click.option("--num-iters", type=click.IntRange(min=1), default=3, show_default=True, help="Processes to start.")
@shared
def startup(num_iters: int, output_json: str | None, **values: Any) -> None:
    """A new process from its start to its first token: seconds."""
    kwargs = flags.engine_kwargs(values, disable_log_stats=True)
    with flags.user_errors():
        prepared(kwargs)
    phases: dict[str, list[float]] = {"imported": [], "made": [], "first_token": []}
    for _ in range(num_iters):
        start = time.time()
        done = subprocess.run(
            [sys.executable, "-c", STARTUP, json.dumps(kwargs)], stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            raise click.ClickException(f"the measured process failed with status {done.returncode}")
        times = json.loads(done.stdout.splitlines()[-1])
        for name, found in phases.items():
            found.append(times[name] - start)
    result: dict[str, Any] = {"benchmark": "startup", "num_iters": num_iters}
    names = {"imported": "import_quire", "made": "engine_ready", "first_token": "first_token"}
    for name, found in phases.items():
        result |= {f"{names[name]}_s": statistics.median(found), f"{names[name]}_min_s": min(found)}
    finish(result, kwargs, output_json)


def prepared(kwargs: dict[str, Any]) -> int:
    """Leaves out the tokenizer where the checkpoint has none, and checks the arguments before torch is imported; the
    size of the vocabulary."""
    from quire.config.resolve import resolve

    config = resolve(EngineArgs(**kwargs))
    if not kwargs.get("tokenizer") and not any(config.model.path.glob("tokenizer*")):
        kwargs.setdefault("skip_tokenizer_init", True)
    return config.model.arch.vocab_size


def make_llm(values: dict[str, Any]) -> tuple[Any, dict[str, Any], int]:
    """The engine, the arguments that it was made with, and the size of its vocabulary."""
    kwargs = flags.engine_kwargs(values, **flags.quiet(), disable_log_stats=True)
    setup_logging(kwargs.get("log_level"))
    with flags.user_errors():
        vocab = prepared(kwargs)
        from quire import LLM

        return LLM(**kwargs), kwargs, vocab


def random_prompt(draw: random.Random, vocab: int, length: int) -> dict[str, list[int]]:
    """A prompt of random token ids."""
    return {"prompt_token_ids": draw.choices(range(vocab), k=length)}


def run(llm: Any, prompts: Sequence[Any], lengths: Sequence[int]) -> tuple[float, int, int]:
    """(seconds, prompt tokens, generated tokens) of one call, each output exactly as long as asked."""
    from quire import SamplingParams

    params = [SamplingParams(temperature=1.0, ignore_eos=True, max_tokens=n, detokenize=False) for n in lengths]
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    made = sum(len(o.outputs[0].token_ids) for o in outputs)
    if made != sum(lengths):
        raise click.ClickException(
            f"{made} tokens came back, not {sum(lengths)}: is input + output within max_model_len?"
        )
    return seconds, sum(len(p["prompt_token_ids"]) for p in prompts), made


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Mean, median and extremes of several runs."""
    return {
        "num_iters": len(seconds),
        "mean_s": statistics.fmean(seconds),
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
    }


def finish(result: dict[str, Any], kwargs: dict[str, Any], path: str | None) -> None:
    """Print the result with its circumstances, and write it where asked."""
    from quire.utils import devices, optional

    machine = devices.probe()
    stated = {k: v for k, v in kwargs.items() if k not in ("log_level", "disable_log_stats", "hf_token")}
    result |= {
        "arguments": stated,
        "quire": __version__,
        "torch": optional.version("torch"),
        "device": machine.gpus[0].name if machine.gpus else f"{devices.cpu_name()} ({machine.cores} cores)",
    }
    text = json.dumps(result, indent=2)
    if path:
        Path(path).write_text(text + "\n")
    click.echo(text)
