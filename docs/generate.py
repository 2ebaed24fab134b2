"""Write the pages that derive from the source, and check the links of all pages.

python docs/generate.py           write docs/configuration.md and docs/cli.md
python docs/generate.py --check   write nothing; fail where a page is out of date or a link leads nowhere
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import click

from quire.cli.flags import CONTEXT
from quire.cli.main import cli
from quire.config.args import GROUPS, EngineArgs, ServerArgs, Spec, specs
from quire.config.foreign import FOREIGN
from quire.utils.environment import ENVIRONMENT

ROOT = Path(__file__).resolve().parent.parent
NOTE = "<!-- Written by docs/generate.py from the source. Do not edit; run `make docs`. -->"


def configuration() -> str:
    """The page of arguments, out of the schema."""
    lines = [
        NOTE,
        "# Configuration",
        "",
        "The arguments of `LLM(...)`, of `AsyncLLM`'s `EngineArgs`, and, with dashes or underscores, the flags of the",
        "`quire` command. The names are vLLM's. Sampling is a request's matter: see `SamplingParams`.",
        "",
        "Values that are `auto` or not given are decided once, when the engine is made; `log_level=debug` shows each",
        "decision with its reason. `None` means the default everywhere.",
        "",
    ]
    by_group: dict[str, list[str]] = {group: [] for group in GROUPS}
    for name, (hint, spec, default) in [*specs(EngineArgs).items(), *specs(ServerArgs).items()]:
        by_group[spec.group].append(f"| `{name}` | {kind(hint, spec)} | {shown(default)} | {described(spec)} |")
    for group, rows in by_group.items():
        lines += [f"## {group}", "", "| argument | type | default | |", "|---|---|---|---|", *rows, ""]
    lines += [
        "## vLLM's other arguments",
        "",
        "These have no counterpart; giving one is an error that says what to do instead.",
        "",
        "| argument | instead |",
        "|---|---|",
        *(f"| `{name}` | {reason} |" for name, reason in FOREIGN.items()),
        "",
        "## Environment variables",
        "",
        "All that quire reads of its own (never more than five), beside those of the libraries under it, such as",
        "`OMP_NUM_THREADS`, `CUDA_VISIBLE_DEVICES`, `HF_HOME`, `HF_HUB_OFFLINE` and `HF_TOKEN`.",
        "",
        "| variable | |",
        "|---|---|",
        *(f"| `{name}` | {text} |" for name, text in ENVIRONMENT.items()),
    ]
    return "\n".join(lines) + "\n"


def kind(hint: object, spec: Spec) -> str:
    """A type, as a reader wants it."""
    if spec.choices:
        return ", ".join(f"`{c}`" for c in spec.choices)
    text = str(hint) if not isinstance(hint, type) else hint.__name__
    text = re.sub(r"[\w.]*Callable\[[^]]*?\.\.\.[^]]*\]", "function", text).replace("typing.", "")
    text = text.replace(" | None", "").replace("dict[str, Any]", "dict").replace("list[Any]", "list")
    return text.replace(" | ", " or ")


def shown(default: object) -> str:
    return "" if default in (None, "", {}) else f"`{default}`"


def described(spec: Spec) -> str:
    text = spec.help
    if spec.harmless:
        text += f" No effect: {spec.harmless}."
    return text.replace("|", "\\|")


def command_line() -> str:
    """The page of commands: `--help` of each, without the engine's arguments, which have a page of their own."""
    lines = [
        NOTE,
        "# The command line",
        "",
        "Every command that makes an engine also takes the flags of [configuration.md](configuration.md)",
        "(`--max-num-seqs` or `--max_num_seqs`).",
        "",
    ]
    pages: list[tuple[str, click.Command]] = [("quire", cli)]
    root = click.Context(cli, info_name="quire")
    for name in cli.list_commands(root):
        command = cli.get_command(root, name)
        assert command is not None
        pages.append((f"quire {name}", command))
        if isinstance(command, click.Group):
            pages += [(f"quire {name} {sub}", part) for sub, part in command.commands.items()]
    engine = set(specs(EngineArgs))
    for title, command in pages:
        command.params = [p for p in command.params if p.name not in engine]
        context = click.Context(
            command, info_name=title, **{**CONTEXT, "terminal_width": 100, "max_content_width": 100}
        )
        lines += [f"## {title}", "", "```text", command.get_help(context), "```", ""]
    return "\n".join(lines)


def broken_links() -> list[str]:
    """Relative links of the repository's Markdown files that lead nowhere."""
    found: list[str] = []
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                found.append(f"{page.relative_to(ROOT)}: {target}")
    return found


def main() -> int:
    check = "--check" in sys.argv[1:]
    problems: list[str] = []
    for name, text in (("configuration.md", configuration()), ("cli.md", command_line())):
        page = ROOT / "docs" / name
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            if check:
                problems.append(f"docs/{name} is out of date: run `make docs`")
            else:
                page.write_text(text, encoding="utf-8")
                print(f"docs/{name} written")
    problems += [f"broken link in {link}" for link in broken_links()]
    for problem in problems:
        print(problem, file=sys.stderr)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
