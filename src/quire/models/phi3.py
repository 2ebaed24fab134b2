"""Phi-3 and Phi-4 (arXiv:2404.14219): Llama with packed projections; windows and LongRoPE are in `ModelArch`."""

from __future__ import annotations

from quire.models.llama import LlamaAttention, LlamaBlock, LlamaForCausalLM


class Phi3Attention(LlamaAttention):
    packed = True


class Phi3Block(LlamaBlock):
    attention = Phi3Attention


class Phi3ForCausalLM(LlamaForCausalLM):
    block = Phi3Block
