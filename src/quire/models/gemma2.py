"""Gemma 2 (arXiv:2408.00118): Gemma with a norm before and behind each half of a block; soft caps and windows are in
`ModelArch`. Owns: the arithmetic only. Shape legend: T tokens, D hidden.
"""

from __future__ import annotations

from torch import Tensor

from quire.config.arch import ModelArch
from quire.layers.rotary import Rotary
from quire.layers.step import Step
from quire.models.gemma import GemmaBlock, GemmaForCausalLM


class Gemma2Block(GemmaBlock):
    def __init__(self, arch: ModelArch, layer: int, rotary: Rotary | None) -> None:
        super().__init__(arch, layer, rotary)
        self.pre_feedforward_layernorm = self.norm(arch.hidden_size, arch.norm_eps)
        self.post_feedforward_layernorm = self.norm(arch.hidden_size, arch.norm_eps)

    def forward(
        self, x_TD: Tensor, residual_TD: Tensor | None, positions_T: Tensor, step: Step
    ) -> tuple[Tensor, Tensor]:
        x_TD, residual_TD = self.input_layernorm(x_TD, residual_TD)
        x_TD, _ = self.post_attention_layernorm(self.self_attn(x_TD, positions_T, step))
        x_TD, total_TD = self.pre_feedforward_layernorm(x_TD, residual_TD)
        return self.post_feedforward_layernorm(self.mlp(x_TD))[0], total_TD


class Gemma2ForCausalLM(GemmaForCausalLM):
    block = Gemma2Block
