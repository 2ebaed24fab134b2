"""Gemma 3, text only (arXiv:2503.19786): Gemma 2 with norms over each head of q and k; the layers with a window turn by
a base of their own, which is in `ModelArch`."""

from __future__ import annotations

from quire.layers.norm import OffsetRMSNorm
from quire.models.gemma2 import Gemma2Block, Gemma2ForCausalLM
from quire.models.llama import LlamaAttention


class Gemma3Attention(LlamaAttention):
    head_norm = OffsetRMSNorm


class Gemma3Block(Gemma2Block):
    attention = Gemma3Attention


class Gemma3ForCausalLM(Gemma2ForCausalLM):
    block = Gemma3Block
