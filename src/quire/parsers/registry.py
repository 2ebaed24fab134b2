"""Parsers by name: built-ins, those registered by call, and plugins by entry point. Owns the two maps of names."""

from __future__ import annotations

import difflib
from importlib import import_module
from importlib.metadata import EntryPoint
from typing import Any

from quire import plugins
from quire.types.errors import ClientError


class Parsers:
    """Name -> class, or "module:Class", imported when first asked for. `group`: the plugins' entry points; `parameter`:
    the argument that names a parser, for errors."""

    def __init__(self, group: str, parameter: str, built_in: dict[str, str]) -> None:
        self._group = group
        self._parameter = parameter
        self._targets: dict[str, type[Any] | str | EntryPoint] = dict(built_in)
        self._plugins_found = False

    def register(self, name: str, target: type[Any] | str) -> None:
        """Makes `target` (a class, or "module:Class") the parser `name`; the last registration wins."""
        if isinstance(target, str) and ":" not in target:
            raise ClientError(f"parser {target!r} must be written 'module:Class'", self._parameter, target)
        self._targets[name] = target

    def names(self) -> list[str]:
        self._find_plugins()
        return sorted(self._targets)

    def find(self, name: str) -> type[Any]:
        """Raises `ClientError` that names the closest ones."""
        self._find_plugins()
        target = self._targets.get(name)
        if target is None:
            near = difflib.get_close_matches(name, self._targets, 3, 0.5)
            known = f"did you mean {' or '.join(near)}?" if near else f"quire has {', '.join(self.names())}"
            raise ClientError(f"no {self._parameter} is named {name!r}: {known}", self._parameter, name)
        if isinstance(target, type):
            return target
        try:
            self._targets[name] = made = _imported(target)
        except plugins.PluginError as e:
            raise ClientError(
                f"{self._parameter} {name!r} comes from a plugin that fails: {e}", self._parameter, name
            ) from e
        except Exception as e:  # somebody else's module
            text = f"{self._parameter} {name!r} is registered as {target!r}: {type(e).__name__}: {e}"
            raise ClientError(text, self._parameter, name) from e
        return made

    def _find_plugins(self) -> None:
        if not self._plugins_found:
            self._plugins_found = True
            for point in plugins.found(self._group):
                self._targets.setdefault(point.name, point)


def _imported(target: str | EntryPoint) -> type[Any]:
    if isinstance(target, EntryPoint):
        return plugins.load(target)
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)
