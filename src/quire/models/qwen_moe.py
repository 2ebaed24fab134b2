"""Qwen2-MoE (arXiv:2407.10671) and Qwen3-MoE (arXiv:2505.09388): Qwen2 and Qwen3 with mixtures of experts in the layers
that `ModelArch` names; Qwen2's have an expert for every token beside them."""

from __future__ import annotations

from torch import nn

from quire.config.arch import ModelArch
from quire.layers.moe import MoE
from quire.models.llama import LlamaBlock, LlamaForCausalLM
from quire.models.qwen3 import Qwen3Attention


class Qwen2MoeBlock(LlamaBlock):
    def make_mlp(self, arch: ModelArch, layer: int) -> nn.Module:
        assert arch.experts is not None
        return MoE(arch) if arch.experts.layers[layer] else super().make_mlp(arch, layer)


class Qwen2MoeForCausalLM(LlamaForCausalLM):
    block = Qwen2MoeBlock


class Qwen3MoeBlock(Qwen2MoeBlock):
    attention = Qwen3Attention


class Qwen3MoeForCausalLM(LlamaForCausalLM):
    block = Qwen3MoeBlock
