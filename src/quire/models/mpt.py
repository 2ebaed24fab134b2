"""MPT: ALiBi, or learned positions as its configuration says; no biases as a rule; q, k and v clipped in some sizes.

Owns: the arithmetic only. Shape legend: T tokens, D hidden.
"""

from __future__ import annotations

from torch import Tensor, nn

from quire.config.arch import ModelArch
from quire.layers.attention import Attention, alibi_slopes
from quire.layers.linear import Embedding, Linear, MergedLinear
from quire.layers.mlp import Activation
from quire.layers.norm import LayerNorm
from quire.layers.step import Step
from quire.models.base import CausalLM


class MPTAttention(nn.Module):
    def __init__(self, arch: ModelArch, layer: int) -> None:
        super().__init__()
        d, kv, settings = arch.hidden_size, arch.num_kv_heads * arch.head_dim, arch.extra["attn_config"]
        slopes = alibi_slopes(arch.num_heads, settings["alibi_bias_max"]) if settings["alibi"] else None
        self.clip: float | None = settings["clip_qkv"]
        self.Wqkv = MergedLinear(d, {"q": d, "k": kv, "v": kv}, arch.attention_bias, split="heads", packed=True)
        self.q_ln = LayerNorm(d, arch.norm_eps, bias=arch.mlp_bias) if settings["qk_ln"] else None
        self.k_ln = LayerNorm(kv, arch.norm_eps, bias=arch.mlp_bias) if settings["qk_ln"] else None
        self.out_proj = Linear(d, d, arch.attention_out_bias, split="rows")
        self.attn = Attention(arch, layer, slopes=slopes)

    def forward(self, x_TD: Tensor, positions_T: Tensor, step: Step) -> Tensor:
        q, k, v = self.Wqkv(x_TD)
        if self.clip:
            q, k, v = (x.clamp(-self.clip, self.clip) for x in (q, k, v))
        if self.q_ln is not None and self.k_ln is not None:
            q, k = self.q_ln(q)[0], self.k_ln(k)[0]
        return self.out_proj(self.attn(q, k, v, positions_T, step))


class MPTMLP(nn.Module):
    def __init__(self, arch: ModelArch) -> None:
        super().__init__()
        self.up_proj = Linear(arch.hidden_size, arch.intermediate_size, arch.mlp_bias, split="columns")
        self.act = Activation(arch.activation)
        self.down_proj = Linear(arch.intermediate_size, arch.hidden_size, arch.mlp_bias, split="rows")

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(self.act(self.up_proj(x_TD)))


class MPTBlock(nn.Module):
    def __init__(self, arch: ModelArch, layer: int) -> None:
        super().__init__()
        self.norm_1 = LayerNorm(arch.hidden_size, arch.norm_eps, bias=arch.mlp_bias)
        self.attn = MPTAttention(arch, layer)
        self.norm_2 = LayerNorm(arch.hidden_size, arch.norm_eps, bias=arch.mlp_bias)
        self.ffn = MPTMLP(arch)

    def forward(
        self, x_TD: Tensor, residual_TD: Tensor | None, positions_T: Tensor, step: Step
    ) -> tuple[Tensor, Tensor]:
        x_TD, residual_TD = self.norm_1(x_TD, residual_TD)
        x_TD, total_TD = self.norm_2(self.attn(x_TD, positions_T, step), residual_TD)
        return self.ffn(x_TD), total_TD


class MPTModel(nn.Module):
    def __init__(self, arch: ModelArch) -> None:
        super().__init__()
        learned = arch.extra["learned_pos_emb"] and not arch.extra["attn_config"]["alibi"]
        self.wte = Embedding(arch.vocab_size, arch.hidden_size, split="vocab")
        self.wpe = Embedding(arch.max_position, arch.hidden_size) if learned else None
        self.blocks = nn.ModuleList(MPTBlock(arch, i) for i in range(arch.num_layers))
        self.norm_f = LayerNorm(arch.hidden_size, arch.norm_eps, bias=arch.mlp_bias)

    def forward(self, tokens_T: Tensor, positions_T: Tensor, step: Step) -> Tensor:
        x_TD, residual_TD = self.wte(tokens_T), None
        if self.wpe is not None:
            x_TD = self.wpe(positions_T, x_TD)
        for block in self.blocks:
            x_TD, residual_TD = block(x_TD, residual_TD, positions_T, step)
        return self.norm_f(x_TD, residual_TD)[0]


class MptForCausalLM(CausalLM):
    prefix = "transformer"
    embedding_path = "wte"

    def make_body(self, arch: ModelArch) -> nn.Module:
        return MPTModel(arch)
