"""Falcon (arXiv:2311.16867): multi-query or grouped attention, beside the feed-forward block or before it; rotary
positions or ALiBi. Owns: the arithmetic only. Shape legend: T tokens, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quire.config.arch import ModelArch
from quire.layers.attention import Attention, alibi_slopes
from quire.layers.elementwise import Add
from quire.layers.linear import Embedding, Linear, MergedLinear
from quire.layers.mlp import Activation
from quire.layers.norm import LayerNorm
from quire.layers.rotary import Rotary
from quire.layers.step import Step
from quire.models.base import CausalLM


class FalconAttention(nn.Module):
    def __init__(self, arch: ModelArch, layer: int, rotary: Rotary | None) -> None:
        super().__init__()
        d, e, kv = arch.hidden_size, arch.head_dim, arch.num_kv_heads
        parts = {"q": d, "k": kv * e, "v": kv * e}
        pieces = [("q", d // kv), ("k", e), ("v", e)] * kv  # a KV head lies behind the query heads that share it
        self.query_key_value = MergedLinear(d, parts, arch.attention_bias, "heads", packed=True, pieces=pieces)
        self.dense = Linear(d, d, arch.attention_out_bias, split="rows")
        self.attn = Attention(arch, layer, rotary, slopes=None if rotary else self.slopes(arch))

    def slopes(self, arch: ModelArch) -> tuple[float, ...]:
        """Falcon was trained with slopes in bfloat16, and scales them as it does the products of q and k."""
        slopes = torch.tensor(alibi_slopes(arch.num_heads), device="cpu").bfloat16().tolist()
        return tuple(slope * arch.attention_scale for slope in slopes)

    def forward(self, x_TD: Tensor, positions_T: Tensor, step: Step) -> Tensor:
        q, k, v = self.query_key_value(x_TD)
        return self.dense(self.attn(q, k, v, positions_T, step))


class FalconMLP(nn.Module):
    def __init__(self, arch: ModelArch) -> None:
        super().__init__()
        d, f = arch.hidden_size, arch.intermediate_size
        self.dense_h_to_4h = Linear(d, f, arch.mlp_bias, split="columns")
        self.act = Activation(arch.activation)
        self.dense_4h_to_h = Linear(f, d, arch.mlp_bias, split="rows")

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.dense_4h_to_h(self.act(self.dense_h_to_4h(x_TD)))


class FalconBlock(nn.Module):
    """`norm_2`: in front of the feed-forward block, where attention and that have no norm in common."""

    def __init__(self, arch: ModelArch, layer: int, rotary: Rotary | None) -> None:
        super().__init__()
        new: bool = arch.extra["new_decoder_architecture"]
        self.parallel: bool = new or arch.extra["parallel_attn"]
        two = new and arch.extra["num_ln_in_parallel_attn"] in (None, 2)
        second = "ln_mlp" if two else None if self.parallel else "post_attention_layernorm"
        d, eps = arch.hidden_size, arch.norm_eps
        self.norm_1 = LayerNorm(d, eps, name="ln_attn" if two else "input_layernorm")
        self.norm_2 = None if second is None else LayerNorm(d, eps, name=second)
        self.self_attention = FalconAttention(arch, layer, rotary)
        self.mlp = FalconMLP(arch)
        self.sum = Add()

    def forward(
        self, x_TD: Tensor, residual_TD: Tensor | None, positions_T: Tensor, step: Step
    ) -> tuple[Tensor, Tensor]:
        x_TD, total_TD = self.norm_1(x_TD, residual_TD)
        attended_TD = self.self_attention(x_TD, positions_T, step)
        if self.norm_2 is not None:
            x_TD, total_TD = self.norm_2(total_TD) if self.parallel else self.norm_2(attended_TD, total_TD)
        mlp_TD = self.mlp(x_TD)
        return self.sum(mlp_TD, attended_TD) if self.parallel else mlp_TD, total_TD


class FalconModel(nn.Module):
    def __init__(self, arch: ModelArch) -> None:
        super().__init__()
        rotary = None if arch.rope is None else Rotary(arch.rope)
        self.word_embeddings = Embedding(arch.vocab_size, arch.hidden_size, split="vocab")
        self.h = nn.ModuleList(FalconBlock(arch, i, rotary) for i in range(arch.num_layers))
        self.ln_f = LayerNorm(arch.hidden_size, arch.norm_eps)

    def forward(self, tokens_T: Tensor, positions_T: Tensor, step: Step) -> Tensor:
        x_TD, residual_TD = self.word_embeddings(tokens_T), None
        for block in self.h:
            x_TD, residual_TD = block(x_TD, residual_TD, positions_T, step)
        return self.ln_f(x_TD, residual_TD)[0]


class FalconForCausalLM(CausalLM):
    prefix = "transformer"
    embedding_path = "word_embeddings"

    def make_body(self, arch: ModelArch) -> nn.Module:
        return FalconModel(arch)
