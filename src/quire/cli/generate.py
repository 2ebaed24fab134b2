"""`quire generate`: prompts in, completions out.

Owns: where prompts come from and how results are printed. The work is `LLM`'s.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from quire.cli import flags
from quire.config.args import EngineArgs
from quire.utils.logging import setup_logging


@click.command(cls=flags.Command, context_settings=flags.CONTEXT)
@click.argument("prompts", nargs=-1)
@click.option("-f", "--file", "files", multiple=True, help="Prompts from a file (- is standard input), one a line; "
              'from a .jsonl file, a string or {"prompt": ...} a line.')  # fmt: skip
@click.option("--chat/--no-chat", default=False, help="Give each prompt to the model as a user's message.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line: prompt, outputs, token ids.")
@click.option("--progress/--no-progress", default=None, help="Progress bar; by default where there is a terminal.")
@flags.sampling_options
@flags.options_of(EngineArgs)
def command(
    prompts: Sequence[str], files: Sequence[str], chat: bool, as_json: bool, progress: bool | None, **values: Any
) -> None:
    """Complete PROMPTS.

    Without prompts and --file, prompts are read from standard input, one a line. Results are printed in the order of
    the prompts; the last line, on standard error, has the speed.
    """
    kwargs = flags.engine_kwargs(values, **flags.quiet(), disable_log_stats=True)
    texts = gather(prompts, files)
    setup_logging(kwargs.get("log_level"))
    with flags.user_errors():
        from quire import LLM

        llm = LLM(**kwargs)
        # A terminal wants an answer, not sixteen tokens of one.
        params = flags.sampling_params(values, llm.get_default_sampling_params(), max_tokens=128)
        bar = sys.stderr.isatty() if progress is None else progress
        start = time.perf_counter()
        if chat:
            outputs = llm.chat([[{"role": "user", "content": t}] for t in texts], params, use_tqdm=bar)
        else:
            outputs = llm.generate(texts, params, use_tqdm=bar)
        seconds = time.perf_counter() - start
    for text, output in zip(texts, outputs, strict=True):
        click.echo(as_line(text, output) if as_json else as_text(text, output))
    click.echo(summary(outputs, seconds), err=True)


def gather(prompts: Sequence[str], files: Sequence[str]) -> list[str]:
    """The prompts of the command line, then those of the files. Errors: `UsageError` where there is none."""
    texts = list(prompts)
    sources = list(files)
    if not texts and not sources:
        if sys.stdin.isatty():
            raise click.UsageError("no prompt: give one, or --file, or pipe prompts in")
        sources = ["-"]
    for name in sources:
        if name == "-":
            texts += lines_of(sys.stdin, jsonl=False, name="standard input")
            continue
        try:
            with Path(name).open(encoding="utf-8") as stream:
                texts += lines_of(stream, jsonl=name.endswith(".jsonl"), name=name)
        except (OSError, UnicodeDecodeError) as e:
            raise click.UsageError(f"cannot read prompts from {name!r}: {e}") from e
    if not texts:
        raise click.UsageError(f"no prompt in {', '.join(sources)}")
    return texts


def lines_of(stream: Iterable[str], jsonl: bool, name: str) -> list[str]:
    """One prompt from each line that is not blank."""
    texts: list[str] = []
    for number, raw in enumerate(stream, 1):
        line = raw.rstrip("\r\n")
        if not line.strip():
            continue
        if jsonl:
            try:
                value = json.loads(line)
            except json.JSONDecodeError as e:
                raise click.UsageError(f"{name}, line {number} is not JSON: {e}") from e
            line = value.get("prompt") if isinstance(value, dict) else value
            if not isinstance(line, str):
                raise click.UsageError(f'{name}, line {number} is neither a string nor {{"prompt": "..."}}')
        texts.append(line)
    return texts


def as_text(prompt: str, output: Any) -> str:
    """A result for a person: the prompt after >, then the outputs, numbered where there are several."""
    many = len(output.outputs) > 1
    shown = [f"[{o.index}] {o.text.strip()}" if many else o.text.strip() for o in output.outputs]
    return "\n".join([f"> {prompt}", *shown, ""])


def as_line(prompt: str, output: Any) -> str:
    """A result for a program."""
    outputs = [
        {
            "index": o.index,
            "text": o.text,
            "token_ids": list(o.token_ids),
            "finish_reason": o.finish_reason,
            "cumulative_logprob": o.cumulative_logprob,
        }
        | ({} if o.logprobs is None else {"logprobs": [logprob_line(step) for step in o.logprobs]})
        for o in output.outputs
    ]
    return json.dumps({"prompt": prompt, "outputs": outputs}, ensure_ascii=False)


def logprob_line(step: Any) -> dict[str, Any]:
    """{token id: [logprob, rank, text]} of one position."""
    return {str(token): [p.logprob, p.rank, p.decoded_token] for token, p in step.items()}


def summary(outputs: Iterable[Any], seconds: float) -> str:
    """How much was done, and how fast."""
    outputs = list(outputs)
    prompt = sum(len(o.prompt_token_ids or ()) for o in outputs)
    made = sum(len(c.token_ids) for o in outputs for c in o.outputs)
    return (
        f"{len(outputs)} prompts, {prompt} prompt tokens, {made} generated tokens in {seconds:.2f} s: "
        f"{made / seconds:.1f} generated tokens/s"
    )
