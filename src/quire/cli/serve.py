"""`quire serve`: the HTTP server.

Owns: the command's flags, the configuration file, and the exit status. The server itself is `quire.server`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from quire.cli import flags
from quire.config.args import EngineArgs, ServerArgs, specs, unknown_argument
from quire.types.errors import ClientError


@click.command(cls=flags.Command, context_settings=flags.CONTEXT)
@click.argument("model_name", metavar="[MODEL]", required=False)
@click.option("--config", "config_file", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="A YAML file of arguments, under the flags' names; flags rank above it.")  # fmt: skip
@flags.options_of(ServerArgs)
@flags.options_of(EngineArgs)
def command(model_name: str | None, config_file: Path | None, **values: Any) -> None:
    """Serve a model over HTTP, with OpenAI's interface."""
    begun = time.time()
    with flags.user_errors():
        stated = {} if config_file is None else read_config(config_file)
        given = {**stated, **flags.given(ServerArgs, values), **flags.given(EngineArgs, values)}
        if model_name is not None:
            if "model" in flags.given(EngineArgs, dict(values)):
                raise ClientError("give the model as an argument or as --model, not both", "model")
            given["model"] = model_name
        mine, theirs = specs(ServerArgs), specs(EngineArgs)
        server_args = ServerArgs(**{k: v for k, v in given.items() if k in mine})
        engine_args = EngineArgs(**{k: v for k, v in given.items() if k in theirs})
        from quire.server.run import serve

        status = serve(engine_args, server_args, begun)
    raise SystemExit(status)


def read_config(path: Path) -> dict[str, Any]:
    """The arguments in a YAML file, `-` and `_` being alike. Raises ClientError."""
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as e:
        raise ClientError(f"{path} cannot be read as YAML: {str(e).splitlines()[0]}", "config", str(path)) from e
    if not isinstance(found, dict):
        raise ClientError(f"{path} must hold names with values", "config", str(path))
    known = {**specs(ServerArgs), **specs(EngineArgs)}
    out = {str(name).replace("-", "_"): value for name, value in found.items()}
    if "model_tag" in out:
        out["model"] = out.pop("model_tag")
    for name, value in out.items():
        if name not in known:
            raise unknown_argument(name, known, value)
    return out
