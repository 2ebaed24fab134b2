"""Llama 1, 2 and 3.x (arXiv:2302.13971), and the blocks that its kin subclass. Owns: the arithmetic only.

Shape legend: T tokens, D hidden.
"""

from __future__ import annotations

from torch import Tensor, nn

from quire.config.arch import ModelArch
from quire.layers.attention import Attention
from quire.layers.linear import Linear, MergedLinear
from quire.layers.mlp import MLP
from quire.layers.norm import RMSNorm
from quire.layers.rotary import Rotary
from quire.layers.step import Step
from quire.models.base import CausalLM, Decoder


class LlamaAttention(nn.Module):
    head_norm: type[RMSNorm] | None = None
    packed = False  # q, k and v in one tensor of the checkpoint

    def __init__(self, arch: ModelArch, layer: int, rotary: Rotary | None) -> None:
        super().__init__()
        d, q, kv = arch.hidden_size, arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
        parts = {"q_proj": q, "k_proj": kv, "v_proj": kv}
        self.qkv_proj = MergedLinear(d, parts, arch.attention_bias, split="heads", packed=self.packed)
        self.o_proj = Linear(q, d, arch.attention_out_bias, split="rows")
        self.attn = Attention(arch, layer, rotary, head_norm=self.head_norm)

    def forward(self, x_TD: Tensor, positions_T: Tensor, step: Step) -> Tensor:
        q, k, v = self.qkv_proj(x_TD)
        return self.o_proj(self.attn(q, k, v, positions_T, step))


class LlamaBlock(nn.Module):
    attention: type[LlamaAttention] = LlamaAttention
    norm: type[RMSNorm] = RMSNorm

    def __init__(self, arch: ModelArch, layer: int, rotary: Rotary | None) -> None:
        super().__init__()
        self.input_layernorm = self.norm(arch.hidden_size, arch.norm_eps)
        self.self_attn = self.attention(arch, layer, rotary)
        self.post_attention_layernorm = self.norm(arch.hidden_size, arch.norm_eps)
        self.mlp = self.make_mlp(arch, layer)

    def make_mlp(self, arch: ModelArch, layer: int) -> nn.Module:
        packed = self.attention.packed
        return MLP(arch.hidden_size, arch.intermediate_size, arch.activation, arch.mlp_bias, packed)

    def forward(
        self, x_TD: Tensor, residual_TD: Tensor | None, positions_T: Tensor, step: Step
    ) -> tuple[Tensor, Tensor]:
        x_TD, residual_TD = self.input_layernorm(x_TD, residual_TD)
        x_TD, total_TD = self.post_attention_layernorm(self.self_attn(x_TD, positions_T, step), residual_TD)
        return self.mlp(x_TD), total_TD


class LlamaForCausalLM(CausalLM):
    block: type[LlamaBlock] = LlamaBlock
    decoder: type[Decoder] = Decoder

    def make_body(self, arch: ModelArch) -> nn.Module:
        return self.decoder(arch, self.block)
