"""Engine-wide logits processors: their protocol, how they are found, and whether they can serve a request.

Knows no torch: front ends ask as well, which have none. Processors come from the entry points of the group
`quire.logits_processors` and from names "module:Class" in the configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from quire import plugins
from quire.types.errors import ClientError, EngineError
from quire.types.params import SamplingParams

if TYPE_CHECKING:
    from torch import Tensor

ENTRY_POINTS = "quire.logits_processors"
History = Callable[[int], tuple[list[int], list[int]]]  # device row -> (prompt ids, output ids)


class LogitsProcessor(Protocol):
    """An engine-wide processor, made once in each worker as `cls(vocab_size, device)`. A device row is a small integer
    that names a live sequence until it is retired.

    Processors run after logit_bias, allowed_token_ids, bad_words and min_tokens, before penalties and temperature.
    """

    @classmethod
    def validate(cls, params: SamplingParams) -> None:
        """Raises `ValueError` for a request that it cannot serve (its own parameters are in `params.extra_args`). Asked
        of the class, where requests come in: that may be another process than where its objects are."""
        ...

    def add(self, row: int, params: SamplingParams) -> bool:
        """A sequence enters (again, after preemption): whether this processor takes part in it."""
        ...

    def fork(self, source: int, destination: int) -> None:
        """`destination` becomes a copy of `source`."""
        ...

    def retire(self, row: int) -> None:
        """The row is dead; its number will be used again."""
        ...

    def apply(self, logits_GV: Tensor, rows: Sequence[int], history: History) -> Tensor:
        """New logits (G, V) float32 of the rows that take part, one line for each of `rows`. May work in place. Where
        it raises, it is called again for each row alone, so that only the row at fault fails. `history(row)` costs a
        wait for the device."""
        ...


def has_processors(names: Iterable[str | type]) -> bool:
    """Whether `processor_classes` would find any."""
    return any(True for _ in names) or bool(plugins.found(ENTRY_POINTS))


def processor_classes(names: Iterable[str | type]) -> list[tuple[str, Any]]:
    """(name, class) of those of the environment's entry points, then of those named ("module:Class", "module.Class" or
    a class). A plugin that cannot be imported is left out, with a warning; raises `ClientError` where one that was
    asked for cannot."""
    classes: list[tuple[str, Any]] = []
    for point in plugins.found(ENTRY_POINTS):
        try:
            classes.append((point.name, plugins.load(point)))
        except plugins.PluginError as error:
            plugins.skipped(error)
    for name in names:
        if not isinstance(name, str | type):
            text = f'logits_processors must be classes, or names "module:Class", got {name!r}'
            raise ClientError(text, "logits_processors", name)
        try:
            classes.append((str(name), _find(name)))
        except Exception as error:
            text = f"logits processor {str(name)!r} cannot be imported: {one_line(error)}"
            raise ClientError(text, "logits_processors", name) from error
    return classes


def validate(classes: Iterable[tuple[str, Any]], params: SamplingParams) -> None:
    """Asks each class. Raises `ClientError` for a request that one cannot serve, `EngineError` where it fails."""
    for name, cls in classes:
        try:
            cls.validate(params)
        except ValueError as error:
            raise ClientError(f"{error} (says logits processor {name})", "extra_args", params.extra_args) from error
        except Exception as error:
            raise EngineError(f"logits processor {name} failed in validate: {one_line(error)}") from error


def _find(name: str | type) -> Any:
    if isinstance(name, type):
        return name
    module, colon, attribute = name.partition(":")
    if not colon:
        module, _, attribute = name.rpartition(".")
    return getattr(import_module(module), attribute)


def one_line(error: BaseException) -> str:
    """The error's type and the first line of its text."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
