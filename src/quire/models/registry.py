"""Which class implements which architecture: `ModelRegistry`.

Owns: the map from architecture names (config.json's `architectures`) to classes, built-ins and plugins alike. Classes
given as "module:Class" are imported when first asked for. Plugins: entry points of the group `quire.models`, each a
function without arguments that calls `ModelRegistry.register_model`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from quire.types.errors import ClientError


class Registry:
    """Architecture name -> class or "module:Class"."""

    def __init__(self) -> None:
        self._models: dict[str, type[Any] | str] = {}
        self._plugins_loaded = False

    def register_model(self, arch: str, model: type[Any] | str) -> None:
        """Makes `model` the implementation of `arch`; the last registration wins. `model` is a class whose instances
        follow `models.base.CausalLM`, or "module:Class"."""
        if isinstance(model, str) and ":" not in model:
            raise ClientError(f"model {model!r} must be written 'module:Class'", "model_cls", model)
        self._models[arch] = model

    def get_supported_archs(self) -> list[str]:
        """All architecture names that can be loaded, sorted."""
        self._load_plugins()
        return sorted(self._models)

    def resolve(self, archs: str | Iterable[str]) -> type[Any]:
        """The class of the first known name. Raises `ClientError` that names the closest ones."""
        self._load_plugins()
        names = [archs] if isinstance(archs, str) else list(archs)
        for name in names:
            if name in self._models:
                return self._load(name)
        known = sorted(self._models)
        near = [match for name in names for match in difflib.get_close_matches(name, known, 3, 0.5)]
        raise ClientError(
            f"no implementation of {', '.join(names) or 'a model without architectures'}: "
            f"{'the closest are' if near else 'quire has'} {', '.join(near or known)}; others can be added with "
            "ModelRegistry.register_model",
            "model",
            names,
        )

    def _load(self, name: str) -> type[Any]:
        target = self._models[name]
        if isinstance(target, str):
            module, _, attribute = target.partition(":")
            try:
                target = getattr(import_module(module), attribute)
            except (ImportError, AttributeError) as error:
                raise ClientError(f"architecture {name} is registered as {target!r}: {error}", "model", name) from error
            self._models[name] = target
        assert not isinstance(target, str)
        return target

    def _load_plugins(self) -> None:
        if self._plugins_loaded:
            return
        self._plugins_loaded = True
        for point in entry_points(group="quire.models"):
            point.load()()


ModelRegistry = Registry()

for _arch, _target in {
    "LlamaForCausalLM": "llama:LlamaForCausalLM",
    "MistralForCausalLM": "mistral:MistralForCausalLM",
    "Qwen2ForCausalLM": "qwen2:Qwen2ForCausalLM",
    "Qwen3ForCausalLM": "qwen3:Qwen3ForCausalLM",
    "OPTForCausalLM": "opt:OPTForCausalLM",
    "GPT2LMHeadModel": "gpt2:GPT2LMHeadModel",
    "FalconForCausalLM": "falcon:FalconForCausalLM",
    "RWForCausalLM": "falcon:FalconForCausalLM",
    "MptForCausalLM": "mpt:MptForCausalLM",
    "MPTForCausalLM": "mpt:MptForCausalLM",
    "Phi3ForCausalLM": "phi3:Phi3ForCausalLM",
    "GemmaForCausalLM": "gemma:GemmaForCausalLM",
    "Gemma2ForCausalLM": "gemma2:Gemma2ForCausalLM",
    "Gemma3ForCausalLM": "gemma3:Gemma3ForCausalLM",
    "MixtralForCausalLM": "mixtral:MixtralForCausalLM",
    "Qwen2MoeForCausalLM": "qwen_moe:Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM": "qwen_moe:Qwen3MoeForCausalLM",
}.items():
    ModelRegistry.register_model(_arch, f"quire.models.{_target}")
