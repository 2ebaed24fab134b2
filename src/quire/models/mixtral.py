"""Mixtral (arXiv:2401.04088): Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from torch import nn

from quire.config.arch import ModelArch
from quire.layers.moe import MoE
from quire.models.llama import LlamaBlock, LlamaForCausalLM


class MixtralBlock(LlamaBlock):
    def make_mlp(self, arch: ModelArch, layer: int) -> nn.Module:
        return MoE(arch, "block_sparse_moe", ("w1", "w3", "w2"))


class MixtralForCausalLM(LlamaForCausalLM):
    block = MixtralBlock
