"""quire's own models, by architecture name; and what of the registry goes to another process.

Owns: the list. `ModelRegistry` itself is in `plugins/models.py`, below the configuration.
"""

from __future__ import annotations

import dataclasses

from quire.config.schema import Config
from quire.plugins.models import ModelRegistry, Registry, travelling_name

__all__ = ["ModelRegistry", "Registry", "travelling"]


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
    "MixtralForCausalLM": "mixtral:MixtralForCausalLM",
    "Qwen2MoeForCausalLM": "qwen_moe:Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM": "qwen_moe:Qwen3MoeForCausalLM",
}

ModelRegistry.register_built_in({arch: f"quire.models.{target}" for arch, target in _BUILT_IN.items()})
