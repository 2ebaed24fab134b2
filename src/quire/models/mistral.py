"""Mistral (arXiv:2310.06825): Llama with a sliding window, which `ModelArch.sliding_windows` carries."""

from __future__ import annotations

from quire.models.llama import LlamaForCausalLM


class MistralForCausalLM(LlamaForCausalLM):
    pass
