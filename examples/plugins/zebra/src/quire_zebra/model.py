"""Zebra: a decoder with parallel blocks. Attention and a squared-ReLU MLP read the same norm, and what each adds to the
residual is weighed channel by channel with learned numbers; every other layer sees only a window (`layer_types`).

Shape legend: T tokens, D hidden.
"""

from __future__ import annotations

from torch import Tensor, nn

from quire.config.arch import ModelArch
from quire.layers.linear import Linear
from quire.layers.mlp import Activation
from quire.layers.norm import RMSNorm
from quire.layers.rotary import Rotary
from quire.layers.slots import NORM, SlotModule
from quire.layers.step import Step
from quire.models.base import CausalLM, Decoder
from quire.models.llama import LlamaAttention


class Weigh(SlotModule):
    """One learned number for each channel. A slot is a parameter that the loader fills from the checkpoint."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.add_slot("weight", (size,), init=NORM)

    def forward(self, x_TD: Tensor) -> Tensor:
        return x_TD * self.weight


class ZebraBlock(nn.Module):
    def __init__(self, arch: ModelArch, layer: int, rotary: Rotary | None) -> None:
        super().__init__()
        d, f = arch.hidden_size, arch.intermediate_size
        self.norm = RMSNorm(d, arch.norm_eps)
        self.self_attn = LlamaAttention(arch, layer, rotary)
        self.up_proj = Linear(d, f, split="columns")
        self.act = Activation("relu2")
        self.down_proj = Linear(f, d, split="rows")
        self.attn_weigh, self.mlp_weigh = Weigh(d), Weigh(d)

    def forward(
        self, x_TD: Tensor, residual_TD: Tensor | None, positions_T: Tensor, step: Step
    ) -> tuple[Tensor, Tensor]:
        x_TD, total_TD = self.norm(x_TD, residual_TD)
        attended_TD = self.attn_weigh(self.self_attn(x_TD, positions_T, step))
        return attended_TD + self.mlp_weigh(self.down_proj(self.act(self.up_proj(x_TD)))), total_TD


class ZebraForCausalLM(CausalLM):
    def make_body(self, arch: ModelArch) -> nn.Module:
        return Decoder(arch, ZebraBlock)
