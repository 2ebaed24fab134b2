"""The tensors of a checkpoint under the names that a model's own code has for them.

Owns: `Names`, which renames and, where the code keeps several tensors as one (experts), puts them together, one
parameter at a time. The rules are Transformers'. Knows no files: tensors come as (name, read) pairs, and go as such.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

Pair = tuple[str, Callable[[], Tensor]]


class Names:
    """Made from the model as its code built it, before anything in it is replaced."""

    def __init__(self, model: Any) -> None:
        self._shapes: dict[str, Tensor] = dict(model.state_dict())
        self._parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._prefix: str = model.base_model_prefix
        rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        self._ignored = [re.compile(pattern) for pattern in ignored]
        self._config, self._model_buffers = model.config, dict(model.named_buffers())

    def _new_name(self, name: str) -> tuple[str, str | None]:
        args = (self._prefix, self._shapes)
        new, pattern = rename_source_key(name, self._renamings, self._converters, *args)
        if new not in self._shapes and name in self._shapes:
            new, pattern = rename_source_key(name, [], [], *args)
        return new, pattern

    def rename(self, name: str) -> str | None:
        """The parameter that the tensor is as it stands; None where it is part of one, or none."""
        new, pattern = self._new_name(name)
        return new if pattern is None and new in self._parameters else None

    def translate(self, tensors: Iterator[Pair]) -> Iterator[Pair]:
        """The parameters, as their tensors come; buffers are filled on the way."""
        groups: dict[str, tuple[Any, list[int]]] = {}
        for name, read in tensors:
            new, pattern = self._new_name(name)
            if pattern is not None and new in self._shapes:
                yield from self._gather(groups, new, pattern, name, read())
            elif new in self._model_buffers and new not in self._parameters:
                self._model_buffers[new].copy_(read())
            elif new in self._shapes or not any(pattern.search(name) for pattern in self._ignored):
                yield new, read
        for target, (converter, _) in list(groups.items()):  # nothing that tells how many tensors belong to it
            yield from self._converted(target, converter)

    def _gather(
        self, groups: dict[str, tuple[Any, list[int]]], target: str, pattern: str, name: str, tensor: Tensor
    ) -> Iterator[Pair]:
        if target not in groups:
            rule = next(rule for rule in self._converters if pattern in rule.source_patterns)
            groups[target] = deepcopy(rule), [0]
        converter, (count,) = groups[target]
        # Transformers asks for the tensors in their natural order, experts by number.
        converter.add_tensor(target, name, pattern, _Named(name, tensor))
        groups[target][1][0] = count + tensor.numel()
        many = len(converter.target_patterns) > 1
        if many or groups[target][1][0] == self._shapes[target].numel():
            del groups[target]
            yield from self._converted(target, converter)

    def _converted(self, target: str, converter: Any) -> Iterator[Pair]:
        for pattern, tensors in converter.collected_tensors.items():
            converter.collected_tensors[pattern] = sorted(tensors, key=lambda each: each.key)
        for name, tensor in converter.convert(target, config=self._config).items():
            whole = tensor[0] if isinstance(tensor, list) else tensor
            yield name, lambda whole=whole: whole


class _Named:
    """A tensor of a checkpoint, to be called for."""

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.key = [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
        self._tensor = tensor

    def __call__(self) -> Tensor:
        return self._tensor
