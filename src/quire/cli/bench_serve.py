"""`quire bench serve`: load on a server with OpenAI's interface, and what its clients see of it.

Owns: the load (Poisson arrivals or a fixed number at once; random tokens or conversations from a ShareGPT file), the
clocks, and the report. The clients are coroutines of this process: on a machine that serves as well, they take their
share of it, so a report names the clients' own processor time.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from quire.cli import flags
from quire.cli.remote import Remote
from quire.types.errors import ClientError, EngineError
from quire.utils.optional import require

CHARACTERS_A_TOKEN = 4  # to guess at the length of a recorded answer


@dataclass(slots=True)
class Work:
    """One request to be made."""

    prompt: str | list[int]
    tokens: int


@dataclass(slots=True)
class Seen:
    """What a client saw of its request. Times in seconds."""

    begin: float
    first: float | None = None
    last: float = 0.0
    gaps: list[float] = field(default_factory=list[float])
    prompt_tokens: int = 0
    tokens: int = 0
    error: str | None = None


@click.command("serve", cls=flags.Command, context_settings=flags.CONTEXT)
@click.option("--url", "--base-url", default="http://localhost:8000", show_default=True, help="Address of the server.")
@click.option("--api-key", help="Key to present.")
@click.option("--model", help="Name of the model; by default the server's first.")
@click.option(
    "--endpoint",
    type=click.Choice(["/v1/completions", "/v1/chat/completions"]),
    default="/v1/completions",
    show_default=True,
    help="Where to send requests.",
)
@click.option(
    "--dataset-name",
    type=click.Choice(["random", "sharegpt"]),
    default="random",
    show_default=True,
    help="Random token ids, or conversations from --dataset-path.",
)
@click.option(
    "--dataset-path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file in ShareGPT's format: a list of objects with `conversations`.",
)
@click.option("--num-prompts", type=click.IntRange(min=1), default=100, show_default=True, help="Requests to make.")
@click.option(
    "--request-rate",
    type=click.FloatRange(min=0, min_open=True),
    default=math.inf,
    show_default=True,
    help="Mean arrivals a second (Poisson).",
)
@click.option("--max-concurrency", type=click.IntRange(min=1), help="Most requests at once.")
@click.option(
    "--input-len",
    "--random-input-len",
    "input_len",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Tokens of each random prompt.",
)
@click.option(
    "--output-len",
    "--random-output-len",
    "output_len",
    type=click.IntRange(min=1),
    help="Tokens to generate; 128 by default, or as long as the recorded answers.",
)
@click.option(
    "--random-range-ratio",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Draw each length from [len * (1 - ratio), len * (1 + ratio)].",
)
@click.option(
    "--random-vocab",
    type=click.IntRange(min=16),
    default=2000,
    show_default=True,
    help="Random token ids are below this.",
)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="Temperature of the requests.")
@click.option("--ignore-eos/--no-ignore-eos", default=True, show_default=True, help="Go on past the end token.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the load.")
@click.option("--warmup", type=click.IntRange(min=0), default=1, show_default=True, help="Requests before the clock.")
@click.option("-o", "--output-json", "--save-result", "output_json", help="Also write the result to this file.")
@click.option(
    "--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the distributions (needs matplotlib)."
)
def command(url: str, api_key: str | None, output_json: str | None, plot: Path | None, **options: Any) -> None:
    """Requests on a running server: rates, and percentiles of latencies, as JSON."""
    with flags.user_errors():
        remote = Remote(url, api_key)
        options["model"] = options["model"] or remote.model()
        works = make_load(options)
        used = time.process_time()
        seconds, seen = asyncio.run(measure(remote, works, options))
        used = time.process_time() - used
        result = report(seen, seconds) | {"client_cpu_s": used, "url": url, "arguments": stated(options)}
    text = json.dumps(result, indent=2)
    if output_json:
        Path(output_json).write_text(text + "\n")
    click.echo(text)
    if plot is not None:
        draw(seen, plot)
    if result["failed"]:
        raise SystemExit(1)


def make_load(options: dict[str, Any]) -> list[Work]:
    """The requests to make. Raises ClientError for a file that does not hold conversations."""
    rng = random.Random(options["seed"])
    count = options["num_prompts"]
    if options["dataset_name"] == "sharegpt":
        if options["dataset_path"] is None:
            raise ClientError("--dataset-name=sharegpt needs --dataset-path", "dataset_path")
        return sharegpt(options["dataset_path"], count, options["output_len"], rng)

    def length(mean: int) -> int:
        spread = int(mean * options["random_range_ratio"])
        return max(1, rng.randint(mean - spread, mean + spread))

    ids = range(10, options["random_vocab"])
    out = options["output_len"] or 128
    works = [Work(rng.choices(ids, k=length(options["input_len"])), length(out)) for _ in range(count)]
    if options["endpoint"].endswith("chat/completions"):
        for work in works:  # a chat takes text; a number is about a token
            work.prompt = " ".join(map(str, work.prompt))
    return works


def sharegpt(path: Path, count: int, output_len: int | None, rng: random.Random) -> list[Work]:
    """First questions of recorded conversations, with about the lengths of their answers."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        pairs = [[turn["value"] for turn in entry["conversations"][:2]] for entry in entries]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ClientError(f"{path} is not in ShareGPT's format: {type(e).__name__}: {e}", "dataset_path") from e
    pairs = [pair for pair in pairs if len(pair) == 2 and all(isinstance(text, str) and text for text in pair)]
    if not pairs:
        raise ClientError(f"{path} holds no conversation with a question and an answer", "dataset_path")
    rng.shuffle(pairs)
    chosen = [pairs[i % len(pairs)] for i in range(count)]
    return [Work(ask, output_len or max(4, len(reply) // CHARACTERS_A_TOKEN)) for ask, reply in chosen]


async def measure(remote: Remote, works: Sequence[Work], options: dict[str, Any]) -> tuple[float, list[Seen]]:
    """Make the requests; (seconds from the first to the last token of all, what was seen)."""
    for work in works[: options["warmup"]]:
        await request(remote, Work(work.prompt, 2), options)
    gate = asyncio.Semaphore(options["max_concurrency"] or len(works))
    rng = random.Random(options["seed"] + 1)

    async def one(work: Work) -> Seen:
        async with gate:
            return await request(remote, work, options)

    begin = time.perf_counter()
    tasks: list[asyncio.Task[Seen]] = []
    due = begin
    for work in works:
        if options["request_rate"] != math.inf:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            due += rng.expovariate(options["request_rate"])
        tasks.append(asyncio.create_task(one(work)))
    seen = await asyncio.gather(*tasks)
    return time.perf_counter() - begin, seen


async def request(remote: Remote, work: Work, options: dict[str, Any]) -> Seen:
    """One request, from its sending to its end."""
    chat = options["endpoint"].endswith("chat/completions")
    what = {"messages": [{"role": "user", "content": work.prompt}]} if chat else {"prompt": work.prompt}
    body = {
        "model": options["model"],
        **what,
        "max_tokens": work.tokens,
        "temperature": options["temperature"],
        "ignore_eos": options["ignore_eos"],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    seen = Seen(time.perf_counter())
    try:
        async for event in remote.stream(options["endpoint"], body):
            now = time.perf_counter()
            if event["choices"]:
                if seen.first is None:
                    seen.first = now
                else:
                    seen.gaps.append(now - seen.last)
                seen.last = now
            if usage := event.get("usage"):
                seen.prompt_tokens, seen.tokens = usage["prompt_tokens"], usage["completion_tokens"]
    except EngineError as e:
        seen.error = str(e)
    return seen


def report(seen: Sequence[Seen], seconds: float) -> dict[str, Any]:
    """Rates, and the distributions in milliseconds."""
    good = [s for s in seen if s.error is None and s.first is not None]
    errors: dict[str, int] = {}
    for s in seen:
        if s.error is not None:
            errors[s.error] = errors.get(s.error, 0) + 1
    made, read = sum(s.tokens for s in good), sum(s.prompt_tokens for s in good)
    return {
        "benchmark": "serve",
        "completed": len(good),
        "failed": len(seen) - len(good),
        "errors": errors,
        "duration_s": seconds,
        "requests_per_s": len(good) / seconds,
        "prompt_tokens": read,
        "output_tokens": made,
        "output_tokens_per_s": made / seconds,
        "total_tokens_per_s": (made + read) / seconds,
        **{f"{name}_ms": distribution(values) for name, values in latencies(good).items()},
    }


def latencies(good: Sequence[Seen]) -> dict[str, list[float]]:
    """In seconds: to the first token, between tokens, a request's mean between tokens, to the last token."""
    return {
        "ttft": [s.first - s.begin for s in good if s.first is not None],
        "itl": [gap for s in good for gap in s.gaps],
        "tpot": [(s.last - s.first) / (s.tokens - 1) for s in good if s.first is not None and s.tokens > 1],
        "e2e": [s.last - s.begin for s in good],
    }


def distribution(values: Sequence[float]) -> dict[str, float] | None:
    """Mean and percentiles, in milliseconds."""
    if not values:
        return None
    ordered = sorted(1000 * value for value in values)

    def percentile(share: float) -> float:
        at = share * (len(ordered) - 1)
        low = int(at)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (at - low) * (ordered[high] - ordered[low])

    shares = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
    return {"mean": statistics.fmean(ordered), **{k: percentile(v) for k, v in shares.items()}, "max": ordered[-1]}


def draw(seen: Sequence[Seen], path: Path) -> None:
    """The distributions as curves: which share of all took at most so long."""
    try:
        drawing = require("matplotlib.figure", "--plot", "'quire[bench]'")
    except ImportError as e:
        raise click.ClickException(str(e)) from e
    figure = drawing.Figure(figsize=(9, 3), layout="constrained")
    names = {"ttft": "time to first token", "itl": "time between tokens", "e2e": "time to last token"}
    found = latencies([s for s in seen if s.error is None])
    for i, (name, title) in enumerate(names.items()):
        axes = figure.add_subplot(1, 3, i + 1)
        values = sorted(1000 * value for value in found[name])
        axes.plot(values, [(k + 1) / len(values) for k in range(len(values))], drawstyle="steps-post")
        axes.set(title=title, xlabel="ms", ylabel="share of all" if i == 0 else "", ylim=(0, 1), xlim=(0, None))
        axes.grid(alpha=0.3)
    figure.savefig(path)


def stated(options: dict[str, Any]) -> dict[str, Any]:
    """The options as JSON can hold them."""
    return {k: str(v) if isinstance(v, Path) or v == math.inf else v for k, v in options.items() if v is not None}
