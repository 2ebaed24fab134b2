"""From the schema to flags: `EngineArgs` as click options, and the sampling parameters of the command line.

Owns: how a field's type becomes an option, the grouping of `--help`, and `-` and `_` being alike in flags. Knows no
argument by name: what exists, and what it means, is `config/args.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from quire.config.args import GROUPS, EngineArgs, Spec, callable_allowed, specs
from quire.config.foreign import FOREIGN
from quire.types.errors import ClientError, EngineError

CONTEXT = {
    "token_normalize_func": lambda token: token.replace("_", "-"),
    "help_option_names": ["-h", "--help"],
    "max_content_width": 110,
}

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class Grouped(click.Option):
    """An option that knows its section of the help page."""

    def __init__(self, *args: Any, group: str = "Options", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


class Command(click.Command):
    """A command whose help shows its options by section, its own first."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as e:
            name = e.option_name.lstrip("-").replace("-", "_")
            if reason := FOREIGN.get(name):
                raise UserError(f"{e.option_name} has no counterpart in quire: {reason}") from e
            raise

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Options": []}
        for param in self.get_params(ctx):
            if isinstance(param, click.Argument):
                continue
            record = param.get_help_record(ctx)
            if record is not None:
                sections.setdefault(getattr(param, "group", "Options"), []).append(record)
        for name, records in sections.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)


class JsonObject(click.ParamType):
    """A JSON object on the command line."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            found = json.loads(value)
        except json.JSONDecodeError as e:
            self.fail(f"{value!r} is not JSON: {e}", param, ctx)
        if not isinstance(found, dict):
            self.fail(f"{value!r} must be a JSON object", param, ctx)
        return found


def option(name: str, hint: Any, spec: Spec, default: Any) -> Decorator:
    """The option of one field. Its value is None where the flag is not given, so that the schema's default rules."""
    text = str(hint)
    dashed = name.replace("_", "-")
    flag, kind, extra = f"--{dashed}", click.STRING, dict[str, Any]()
    if hint is bool or hint == (bool | None):
        flag, kind = f"--{dashed}/--no-{dashed}", click.BOOL
    elif spec.choices is not None:
        kind = click.Choice(spec.choices)
    elif callable_allowed(hint) or "dict[" in text:
        kind = JsonObject()
    elif "list[" in text:
        extra["multiple"] = True
    elif "int" in text and not spec.human:
        kind = click.INT
    elif hint in (float, float | None):
        kind = click.FLOAT
    if default not in (None, "", {}) and not isinstance(default, bool):
        extra["metavar"] = f"{kind.name.upper() if spec.choices is None else '|'.join(spec.choices)} [{default}]"
    description = spec.help + (f" No effect: {spec.harmless}." if spec.harmless else "")
    return click.option(
        flag,
        name,
        cls=Grouped,
        group=spec.group,
        type=kind,
        default=None,
        help=description,
        hidden=spec.later is not None,
        **extra,
    )


def options_of(cls: type, leave_out: tuple[str, ...] = ()) -> Decorator:
    """Options for every field of an arguments class, in the order of their groups."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        order = {group: i for i, group in enumerate(GROUPS)}
        items = [i for i in specs(cls).items() if i[0] not in leave_out]
        items.sort(key=lambda item: order.get(item[1][1].group, len(order)))
        for name, (hint, spec, default) in reversed(items):
            function = option(name, hint, spec, default)(function)
        return function

    return decorate


def given(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """Those of `values` that belong to `cls` and were given; they are taken out of `values`."""
    found: dict[str, Any] = {}
    for name in specs(cls):
        value = values.pop(name, None)
        if value is not None and value != ():
            found[name] = list(value) if isinstance(value, tuple) else value
    return found


def quiet() -> dict[str, Any]:
    """The log level of commands whose output is for a person: warnings, unless the environment says otherwise."""
    return {} if "QUIRE_LOG_LEVEL" in os.environ else {"log_level": "warning"}


def engine_kwargs(values: dict[str, Any], **defaults: Any) -> dict[str, Any]:
    """The engine's arguments out of a command's values (taken out of them), checked. `defaults` rank below flags and
    above the schema."""
    kwargs = {**defaults, **given(EngineArgs, values)}
    with user_errors():
        EngineArgs(**kwargs)
    return kwargs


# Flags of SamplingParams that make sense for a person at a terminal: name -> (type, help).
SAMPLING: dict[str, tuple[Any, str]] = {
    "n": (click.INT, "Outputs for each prompt."),
    "max_tokens": (click.INT, "Most tokens to generate for each output."),
    "min_tokens": (click.INT, "Fewest tokens before an output may end."),
    "temperature": (click.FLOAT, "0 is greedy; higher is more random."),
    "top_p": (click.FLOAT, "Draw from the most likely tokens that together have this probability."),
    "top_k": (click.INT, "Draw from this many most likely tokens."),
    "min_p": (click.FLOAT, "Draw from tokens at least this likely, relative to the most likely one."),
    "presence_penalty": (click.FLOAT, "Against tokens that have been generated."),
    "frequency_penalty": (click.FLOAT, "Against tokens, by how often they have been generated."),
    "repetition_penalty": (click.FLOAT, "Above 1: against tokens of the prompt and of the output."),
    "stop": (click.STRING, "A string that ends an output; may be repeated."),
    "ignore_eos": (click.BOOL, "Go on past the end token."),
    "logprobs": (click.INT, "Logprobs per position (with --json)."),
}


def sampling_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The sampling flags. The seed's is `--sampling-seed`, since `--seed` is the engine's."""
    function = click.option(
        "--sampling-seed", type=click.INT, cls=Grouped, group="Sampling", help="Seed of each request."
    )(function)
    for name, (kind, text) in reversed(SAMPLING.items()):
        dashed = name.replace("_", "-")
        flag = f"--{dashed}/--no-{dashed}" if kind is click.BOOL else f"--{dashed}"
        function = click.option(
            flag, name, type=kind, default=None, multiple=name == "stop", cls=Grouped, group="Sampling", help=text
        )(function)
    return function


def sampling_params(values: dict[str, Any], defaults: Any, **fallback: Any) -> Any:
    """`SamplingParams` out of a command's values (taken out of them), on top of the model's `defaults`; `fallback`
    is for what neither says."""
    from quire.types.params import SamplingParams

    found = {name: values.pop(name, None) for name in SAMPLING}
    found["seed"] = values.pop("sampling_seed", None)
    found["stop"] = list(found["stop"]) if found["stop"] else None
    plain = SamplingParams()
    stated = {f: getattr(defaults, f) for f in (*SAMPLING, "seed") if getattr(defaults, f) != getattr(plain, f)}
    chosen = {**fallback, **stated, **{k: v for k, v in found.items() if v is not None}}
    with user_errors():
        return SamplingParams(**chosen)


class UserError(click.ClickException):
    """The user's mistake: one line, and the exit status of a wrong usage."""

    exit_code = 2


@contextmanager
def user_errors() -> Iterator[None]:
    """The user's mistakes and the engine's failures end the command with one line, not with a traceback."""
    try:
        yield
    except ClientError as e:
        raise UserError(str(e)) from e
    except EngineError as e:
        raise click.ClickException(str(e)) from e
