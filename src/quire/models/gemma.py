"""Gemma 1 (arXiv:2403.08295): Llama with scaled embeddings, and norms whose weights are their distance from 1."""

from __future__ import annotations

from quire.config.arch import ModelArch
from quire.layers.norm import OffsetRMSNorm
from quire.models.base import Decoder
from quire.models.llama import LlamaBlock, LlamaForCausalLM


class GemmaBlock(LlamaBlock):
    norm = OffsetRMSNorm


class GemmaDecoder(Decoder):
    def make_norm(self, arch: ModelArch) -> OffsetRMSNorm:
        return OffsetRMSNorm(arch.hidden_size, arch.norm_eps)

    def embedding_scale(self, arch: ModelArch) -> float:
        return arch.hidden_size**0.5


class GemmaForCausalLM(LlamaForCausalLM):
    block = GemmaBlock
    decoder = GemmaDecoder
