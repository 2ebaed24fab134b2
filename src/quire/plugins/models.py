"""Which class implements which architecture: `ModelRegistry`, filled by quire itself, by plugins and by calls.

Owns: the map from architecture names (config.json's `architectures`) to classes, who registered what, and the form in
which a registration travels to another process. Knows no model: quire's own are listed in `models/registry.py`.

Plugins: entry points of the group `quire.models`. One whose target is written like a class (`pkg.model:Zebra`) is the
class of the architecture that the entry point is named after, imported when that is first asked for; any other is a
function without arguments that calls `ModelRegistry.register_model`.
"""

from __future__ import annotations

import difflib
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint
from operator import attrgetter
from typing import Any

from quire import plugins
from quire.types.errors import ClientError

GROUP = "quire.models"
QUIRE, CALL = "quire", "ModelRegistry.register_model"

Reader = Callable[[dict[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class _Model:
    """`target`: a class, "module:Class" or an entry point. `origin`: `QUIRE`, `CALL`, or the plugin in words."""

    target: Any
    origin: str
    config: Reader | str | None = None

    @property
    def rank(self) -> int:
        return {QUIRE: 0, CALL: 2}.get(self.origin, 1)


class Registry:
    """Architecture name -> implementation. What a program registers ranks above plugins, those above quire's own."""

    def __init__(self, origin: str = CALL) -> None:
        self._models: dict[str, _Model] = {}
        self._origin = origin  # of what is registered now
        self._failures: list[str] = []
        self._lock = threading.RLock()  # a plugin registers while it is loaded
        self._plugins_loaded = False

    def register_model(self, arch: str, model: type[Any] | str, config: Reader | str | None = None) -> None:
        """Makes `model` the implementation of `arch`; the last registration wins.

        `model`: a class whose instances follow `models.base.CausalLM`, or "module:Class", imported when it is needed.
        `config`: where config.json does not use Llama's names, a function (or "module:function") from the dict to one
        that does. Raises `ClientError`.
        """
        if not isinstance(arch, str) or not arch:
            raise ClientError(f"an architecture is named by a string, not {arch!r}", "arch", arch)
        if isinstance(model, str) and not _is_name(model):
            raise ClientError(f"model {model!r} must be written 'module:Class'", "model_cls", model)
        if not isinstance(model, str | type):
            raise ClientError(
                f"the model of {arch} must be a class or 'module:Class', not {model!r}", "model_cls", model
            )
        if config is not None and not callable(config) and not (isinstance(config, str) and _is_name(config)):
            raise ClientError(f"the config of {arch} must be a function or 'module:function'", "config", config)
        self._register(arch, _Model(model, self._origin, config))

    def register_built_in(self, models: Mapping[str, str]) -> None:
        """quire's own models, by "module:Class"."""
        for arch, target in models.items():
            self._register(arch, _Model(target, QUIRE))

    def get_supported_archs(self) -> list[str]:
        """All architecture names that can be loaded, sorted."""
        self._load_plugins()
        return sorted(self._models)

    def origin(self, arch: str) -> str | None:
        """Who brought the implementation of `arch`; None where there is none."""
        self._load_plugins()
        return self._models[arch].origin if arch in self._models else None

    def read_config(self, raw: dict[str, Any]) -> dict[str, Any]:
        """config.json in Llama's names, where its architecture was registered with a function for that; else as it is.
        Raises `ClientError`."""
        self._load_plugins()
        names: Any = raw.get("architectures")
        arch = names[0] if isinstance(names, list) and names else None
        model = self._models.get(arch) if isinstance(arch, str) else None
        if model is None or model.config is None:
            return raw
        read = _imported(model.config, f"the config of {arch}") if isinstance(model.config, str) else model.config
        try:
            return dict(read(dict(raw)))
        except ClientError:
            raise
        except Exception as error:
            text = f"the function that {arch} was registered with cannot read this config.json: "
            raise ClientError(f"{text}{type(error).__name__}: {error}", "model", arch) from error

    def resolve(self, archs: str | Iterable[str], carried: Mapping[str, str] | None = None) -> type[Any]:
        """The class of the first known name; `carried` is what another process's registry carried here. Raises
        `ClientError` that names the closest ones, or the plugin that failed."""
        self._load_plugins()
        names = [archs] if isinstance(archs, str) else list(archs)
        for name in names:
            if carried and name in carried:
                return _imported(carried[name], f"architecture {name}")
            if name in self._models:
                return self._class(name)
        known = sorted(self._models)
        near = [match for name in names for match in difflib.get_close_matches(name, known, 3, 0.5)]
        raise ClientError(
            f"no implementation of {', '.join(names) or 'a model without architectures'}: "
            f"{'the closest are' if near else 'quire has'} {', '.join(near or known)}; others can be added with "
            f"ModelRegistry.register_model or by a plugin{''.join(f'; {text}' for text in self._failures)}",
            "model",
            names,
        )

    def carried(self, arch: str) -> dict[str, str]:
        """What this program registered, as names by which another process finds it; plugins are found there as here.
        Raises `ClientError` where the class of `arch` cannot travel."""
        self._load_plugins()
        out: dict[str, str] = {}
        for name, model in self._models.items():
            if model.origin == CALL:
                try:
                    out[name] = travelling_name(model.target, f"the class of {name}", GROUP)
                except ClientError:
                    if name == arch:
                        raise
        return out

    def _register(self, arch: str, model: _Model) -> None:
        with self._lock:
            old = self._models.get(arch)
            if old is None or old.rank <= model.rank:
                self._models[arch] = model

    def _class(self, name: str) -> type[Any]:
        target = self._models[name].target
        if isinstance(target, EntryPoint):
            try:
                target = plugins.load(target)
            except plugins.PluginError as error:
                raise ClientError(
                    f"architecture {name} comes from a plugin that fails: {error}", "model", name
                ) from error
        if isinstance(target, str):
            target = _imported(target, f"architecture {name}")
        if not isinstance(target, type):
            raise ClientError(f"architecture {name} is registered as {target!r}, which is no class", "model", name)
        return target

    def _load_plugins(self) -> None:
        with self._lock:
            if self._plugins_loaded:
                return
            self._plugins_loaded = True
            plugins.check_groups()
            for point in plugins.found(GROUP):
                self._origin, before = plugins.describe(point), self._origin
                try:
                    if point.attr[:1].isupper():
                        self._register(point.name, _Model(point, self._origin))
                    else:
                        plugins.call(point)
                except plugins.PluginError as error:
                    self._failures.append(plugins.skipped(error))
                finally:
                    self._origin = before


def travelling_name(thing: Any, what: str, group: str) -> str:
    """ "module:Name", by which another process finds a class. Raises `ClientError` that says how to make it travel."""
    if isinstance(thing, str):
        module, _, name = thing.partition(":")
    else:
        module, name = thing.__module__, thing.__qualname__
    if module == "__main__":
        why = "it is defined in the program itself (__main__), which no other process imports"
    elif "<" in name:
        why = f"{name} is defined inside a function"
    elif not isinstance(thing, str) and not _can_import(module):
        why = f"its module {module!r} is not found on sys.path"
    elif not isinstance(thing, str) and _attribute(module, name) is not thing:
        why = f"{module} has no {name}, or another one"
    else:
        return f"{module}:{name}"
    raise ClientError(
        f"{what} cannot reach the engine's other processes: {why}. Put it in a module that can be imported and give "
        f'"module:Class", or make it a plugin (an entry point of the group {group})',
        "model_cls",
        name,
    )


def _can_import(module: str) -> bool:
    """By name, on the path that a process of this one gets; being there already is no proof of that."""
    top = module.partition(".")[0]
    return any(finder.find_spec(top, None) is not None for finder in sys.meta_path)


def _attribute(module: str, name: str) -> Any:
    return attrgetter(name)(sys.modules[module]) if hasattr(sys.modules.get(module), name.partition(".")[0]) else None


def _is_name(text: str) -> bool:
    module, _, attribute = text.partition(":")
    return bool(module and attribute)


def _imported(name: str, what: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        return attrgetter(attribute)(import_module(module))
    except Exception as error:  # somebody else's module
        text = f"{what} is registered as {name!r}, which cannot be imported: {type(error).__name__}: {error}"
        raise ClientError(text, "model", name) from error


ModelRegistry = Registry()
