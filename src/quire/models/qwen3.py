"""Qwen3, dense (arXiv:2505.09388): Qwen2 with RMSNorm over each head of q and k."""

from __future__ import annotations

from quire.layers.norm import RMSNorm
from quire.models.llama import LlamaAttention, LlamaBlock, LlamaForCausalLM


class Qwen3Attention(LlamaAttention):
    head_norm = RMSNorm


class Qwen3Block(LlamaBlock):
    attention = Qwen3Attention


class Qwen3ForCausalLM(LlamaForCausalLM):
    block = Qwen3Block
