"""The `quire` command. Owns: the list of subcommands, imported only when one is run, so that `--version` is instant."""

from __future__ import annotations

import importlib

import click

from quire import __version__
from quire.cli.flags import CONTEXT

COMMANDS = {
    "generate": ("quire.cli.generate", "Complete prompts from the command line, a file or standard input."),
    "chat": ("quire.cli.chat", "Talk with a model, answers streaming."),
    "serve": ("quire.cli.serve", "Serve a model over HTTP, with OpenAI's interface."),
    "complete": ("quire.cli.complete", "Have a server continue a prompt."),
    "bench": ("quire.cli.bench", "Measure throughput, latency, start-up or a server; results as JSON."),
    "inspect": ("quire.cli.inspect", "Report what a model is, what it takes and whether it runs."),
    "env": ("quire.cli.env", "Report the machine, the libraries and the operations that would be chosen."),
}


class LazyGroup(click.Group):
    """A group whose commands are modules: the attribute `command` of each."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(COMMANDS[cmd_name][0]).command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings=CONTEXT)
@click.version_option(__version__, "--version", prog_name="quire", message="%(prog)s %(version)s")
def cli() -> None:
    """Run language models: offline, in batches, on the CPU or the GPU."""


def main() -> None:
    """The console script's entry point."""
    cli(prog_name="quire")
