"""Which of quire's classes has the body of an architecture that has another head, or none. Owns: that rule, by names.

Imports no torch.
"""

from __future__ import annotations

from quire.models.registry import ModelRegistry

HEADS = ("ForCausalLM", "LMHeadModel")
_HEADLESS = ("ForSequenceClassification", "ForTokenClassification", "ForProcessRewardModel", "ForRewardModel")
_HEADLESS += ("TextModel", "Model")


def body_architecture(architecture: str) -> str:
    """The registered architecture with that body: `LlamaForCausalLM` for `LlamaModel` and
    `LlamaForSequenceClassification`. `architecture` itself where it is registered, or where none is known."""
    known = ModelRegistry.get_supported_archs()
    if architecture in known or architecture.endswith(HEADS):
        return architecture
    ends = [end for end in _HEADLESS if architecture.endswith(end)]
    names = [architecture.removesuffix(end) + head for end in ends for head in HEADS]
    return next((name for name in names if name in known), architecture)
