"""quire's own models, by architecture name; and what of the registry goes to another process.

Owns: the list. `ModelRegistry` itself is in `plugins/models.py`, below the configuration.
"""

from __future__ import annotations

import dataclasses

from quire.config.schema import Config
from quire.plugins.models import ModelRegistry, Registry, travelling_name

__all__ = ["ModelRegistry", "Registry", "travelling", "whole_of"]

# Ends of the names of models without a head for tokens, and of those with one whose body they are.
_HEADLESS = ("ForSequenceClassification", "ForTokenClassification", "ForProcessRewardModel", "ForRewardModel", "Model")
_HEADS = ("ForCausalLM", "LMHeadModel")


def whole_of(architecture: str) -> str | None:
    """The registered architecture whose body `architecture` has: itself, or that of the same family which generates;
    None where there is none."""
    known = ModelRegistry.get_supported_archs()
    if architecture in known:
        return architecture
    if architecture.endswith(_HEADS):
        return None
    end = next((end for end in _HEADLESS if architecture.endswith(end)), "")
    stem = architecture.removesuffix(end)
    return next((stem + head for head in _HEADS if stem + head in known), None)


def travelling(config: Config) -> Config:
    """`config` for another process, with the models and logits processors of this one as names that can be imported
    there. Raises `ClientError` for a class that cannot travel."""
    model = config.model
    processors = tuple(
        travelling_name(p, "a logits processor", "quire.logits_processors") if isinstance(p, type) else p
        for p in model.logits_processors
    )
    # What came from another process goes on to the next.
    registered = {**model.registered, **ModelRegistry.carried(model.arch.architecture)}
    return dataclasses.replace(
        config, model=dataclasses.replace(model, logits_processors=processors, registered=registered)
    )


_BUILT_IN = {
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
}

ModelRegistry.register_built_in({arch: f"quire.models.{target}" for arch, target in _BUILT_IN.items()})
