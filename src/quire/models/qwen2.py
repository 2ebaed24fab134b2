"""Qwen2 and Qwen2.5 (arXiv:2407.10671): Llama with q, k, v biases and windows in some layers, both in `ModelArch`."""

from __future__ import annotations

from quire.models.llama import LlamaForCausalLM


class Qwen2ForCausalLM(LlamaForCausalLM):
    pass
