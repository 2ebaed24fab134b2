"""Operations and the choice among their implementations.

Owns: `Op` (a signature whose meaning is its plain PyTorch reference), the registry of faster implementations, and
`Binder`, which chooses once at load for one device, dtype and set of shapes. Knows nothing of models or steps.

An implementation declares `supports(case) -> reason why not | None`; the first that supports the case is bound, by
falling priority, the reference last. Plugins: entry points of the group `quire.ops`, each a function that is called
with the registry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch

from quire import plugins
from quire.types.errors import ClientError

REFERENCE = "reference"


@dataclass(frozen=True)
class Case:
    """What an implementation may ask about before it is chosen. `shapes` are facts that stay fixed after load, by
    the names that the op's module documents (say `head_dim`, `num_heads`)."""

    device: torch.device
    dtype: torch.dtype
    shapes: Mapping[str, Any] = field(default_factory=dict)


Supports = Callable[[Case], "str | None"]


@dataclass(frozen=True)
class Implementation:
    """`target` is the function, or "module:function" where importing it is dear or may fail."""

    name: str
    target: Callable[..., Any] | str
    supports: Supports
    priority: int

    def refusal(self, case: Case) -> str | None:
        """Why it cannot serve `case`; a module that is not installed is a reason too."""
        try:
            reason = self.supports(case)
            if reason is None:
                self.load()
            return reason
        except ImportError as error:
            return f"cannot be imported: {error}"

    def load(self) -> Callable[..., Any]:
        if callable(self.target):
            return self.target
        module, _, attribute = self.target.partition(":")
        return getattr(import_module(module), attribute)


class Op:
    """A signature with a reference and faster implementations."""

    def __init__(self, name: str, reference: Callable[..., Any]) -> None:
        self.name = name
        self.reference = reference
        self._implementations = [Implementation(REFERENCE, reference, lambda case: None, -1)]

    def register(self, name: str, target: Callable[..., Any] | str, supports: Supports, priority: int = 0) -> None:
        """Adds an implementation (higher priority is asked first); a name may be registered once."""
        if any(known.name == name for known in self._implementations):
            raise ClientError(f"op {self.name!r} already has an implementation named {name!r}", "name", name)
        self._implementations.append(Implementation(name, target, supports, priority))
        self._implementations.sort(key=lambda known: -known.priority)

    @property
    def implementations(self) -> tuple[Implementation, ...]:
        return tuple(self._implementations)


@dataclass(frozen=True)
class Choice:
    """What was bound and why not the others: `candidates` are (name, reason why not | None)."""

    op: str
    case: Case
    chosen: str
    candidates: tuple[tuple[str, str | None], ...]


class OpRegistry:
    """All ops of the process, by name. Filled when the modules of `quire.ops` are imported and by plugins."""

    def __init__(self) -> None:
        self._ops: dict[str, Op] = {}
        self._plugins_loaded = False
        self.failures: list[str] = []  # of plugins

    def op(self, name: str, reference: Callable[..., Any]) -> Op:
        assert name not in self._ops, f"op {name!r} is defined twice"
        self._ops[name] = Op(name, reference)
        return self._ops[name]

    def __getitem__(self, name: str) -> Op:
        return self._ops[name]

    def names(self) -> list[str]:
        return sorted(self._ops)

    def load_plugins(self) -> None:
        """Lets the plugins of this environment register, once."""
        if self._plugins_loaded:
            return
        self._plugins_loaded = True
        self.failures += plugins.run("quire.ops", (self,))


REGISTRY = OpRegistry()


class Binder:
    """Chooses implementations for one engine and remembers what it chose, for `report()`.

    `forced`: op name -> implementation name that must be used; "*" stands for all ops that are not named.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, forced: Mapping[str, str] | None = None) -> None:
        REGISTRY.load_plugins()
        self.device = device
        self.dtype = dtype
        self._forced = dict(forced or {})
        self._choices: dict[tuple[str, tuple[tuple[str, Any], ...]], tuple[Choice, Callable[..., Any]]] = {}
        for name in self._forced:
            if name != "*" and name not in REGISTRY.names():
                raise ClientError(f"no op named {name!r}; there are {', '.join(REGISTRY.names())}", "ops", name)

    def bind(self, op: Op, **shapes: Any) -> Callable[..., Any]:
        """The implementation of `op` for these shapes. Raises `ClientError` where the forced one refuses."""
        key = (op.name, tuple(sorted(shapes.items())))
        if key not in self._choices:
            self._choices[key] = self._choose(op, Case(self.device, self.dtype, shapes))
        return self._choices[key][1]

    def report(self) -> list[Choice]:
        """Each choice made so far, in the order of binding."""
        return [choice for choice, _ in self._choices.values()]

    def _choose(self, op: Op, case: Case) -> tuple[Choice, Callable[..., Any]]:
        reasons = [(known, known.refusal(case)) for known in op.implementations]
        candidates = tuple((known.name, reason) for known, reason in reasons)
        wanted = self._forced.get(op.name, self._forced.get("*"))
        for known, reason in reasons:
            if reason is None and wanted in (None, known.name):
                return Choice(op.name, case, known.name, candidates), known.load()
        listed = "; ".join([*(f"{name}: {reason or 'supported'}" for name, reason in candidates), *REGISTRY.failures])
        raise ClientError(f"{op.name} cannot be served by {wanted!r} here. Candidates: {listed}", "ops", wanted)
