"""What other packages add to quire, found by entry point: docs/plugins.md is the contract.

Owns: the groups of entry points, the version of the contract, which plugins may load, and how one is loaded. Knows
nothing of what a plugin adds: the registries of models, operations, parsers and processors do.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any

from quire.utils.logging import get_logger
from quire.utils.version import VERSION

log = get_logger(__name__)

# Raised when a plugin that keeps to docs/plugins.md might no longer work; OLDEST is raised when it would not.
API_VERSION = 1
OLDEST_API_VERSION = 1
DECLARED = "quire_api_version"  # where a plugin says, in its top package, which version it was written for

GROUPS: Mapping[str, str] = MappingProxyType(
    {
        "quire.models": "model classes",
        "quire.ops": "implementations of operations",
        "quire.logits_processors": "logits processors of the whole engine",
        "quire.tool_parsers": "parsers of tool calls",
        "quire.reasoning_parsers": "parsers of reasoning",
    }
)
NOT_YET: Mapping[str, str] = MappingProxyType(
    {
        "quire.quantization": "schemes from outside",
        "quire.executors": "executors from outside",
        "quire.modalities": "inputs other than text",
        "quire.drafters": "speculative decoding",
    }
)


class PluginError(Exception):
    """A plugin cannot be loaded: one line that names it and says why."""


def found(group: str) -> list[EntryPoint]:
    """The plugins of a group that may load, by name: all, or those that QUIRE_PLUGINS lists (by the name of the entry
    point or of the package that it is in)."""
    allowed = _allowed()
    points = sorted(entry_points(group=group), key=lambda point: (point.name, point.value))
    return [p for p in points if allowed is None or p.name in allowed or _package(p) in allowed]


def load(point: EntryPoint) -> Any:
    """What the entry point names. Raises `PluginError` for whatever goes wrong, the plugin's code being anybody's."""
    try:
        _check_version(point)
        return point.load()
    except PluginError:
        raise
    except (Exception, SystemExit) as error:
        raise PluginError(f"{describe(point)} cannot be imported: {_line(error)}") from error


def run(group: str, arguments: tuple[Any, ...] = ()) -> Iterator[str]:
    """Loads the plugins of a group, which are functions, and calls each; yields what went wrong with those that fail,
    which the log has as well. The others are unharmed."""
    for point in found(group):
        try:
            call(point, *arguments)
        except PluginError as error:
            yield skipped(error)


def call(point: EntryPoint, *arguments: Any) -> None:
    """Calls the function that the entry point names. Raises `PluginError`."""
    function: Callable[..., Any] = load(point)
    try:
        function(*arguments)
    except (Exception, SystemExit) as error:
        raise PluginError(f"{describe(point)} failed when it was called: {_line(error)}") from error


def skipped(error: PluginError) -> str:
    """Logs that a plugin is left out; the error's text."""
    log.warning("%s; it is left out", error)
    log.debug("the plugin's error", exc_info=error.__cause__)
    return str(error)


def check_groups() -> None:
    """Warns of plugins that quire cannot use, and of names in QUIRE_PLUGINS that nobody has."""
    points = [p for group in (*GROUPS, *NOT_YET) for p in entry_points(group=group)]
    known = {name for p in points for name in (p.name, _package(p))}
    for name in sorted((_allowed() or set()) - known):
        log.warning("QUIRE_PLUGINS lists %r, which no installed package has", name)
    for group, what in NOT_YET.items():
        for point in found(group):
            log.warning("%s is left out: %s are not yet in quire", describe(point), what)


def describe(point: EntryPoint) -> str:
    """A plugin in words: name, group and package."""
    version = "" if point.dist is None else f" of {point.dist.name} {point.dist.version}"
    return f"plugin {point.name!r}{version} ({point.group} = {point.value})"


def _package(point: EntryPoint) -> str:
    return "" if point.dist is None else point.dist.name


def _allowed() -> set[str] | None:
    given = os.environ.get("QUIRE_PLUGINS")
    return None if given is None else {name.strip() for name in given.split(",")} - {""}


def _check_version(point: EntryPoint) -> None:
    """Before the plugin's own modules are imported: those of another version may well not import."""
    declared = getattr(import_module(point.module.partition(".")[0]), DECLARED, None)
    if declared is None:
        return
    if type(declared) is not int or not OLDEST_API_VERSION <= declared <= API_VERSION:
        has = f"{API_VERSION}" if OLDEST_API_VERSION == API_VERSION else f"{OLDEST_API_VERSION} to {API_VERSION}"
        newer = type(declared) is int and declared > API_VERSION
        fix = "upgrade quire, or install an older plugin" if newer else "install a plugin for this quire"
        raise PluginError(
            f"{describe(point)} is made for version {declared!r} of quire's plugin contract; quire {VERSION} has "
            f"{has}: {fix}"
        )


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__
