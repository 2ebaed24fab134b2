"""GPT-2 (Radford et al. 2019): learned positions, packed q, k, v, weights stored (in, out). Owns: the arithmetic only.

Shape legend: T tokens, D hidden.
"""

from __future__ import annotations

from torch import Tensor, nn

from quire.config.arch import ModelArch
from quire.layers.attention import Attention
from quire.layers.linear import Embedding, Linear, MergedLinear
from quire.layers.mlp import Activation
from quire.layers.norm import LayerNorm
from quire.layers.step import Step
from quire.models.base import CausalLM


class GPT2Attention(nn.Module):
    def __init__(self, arch: ModelArch, layer: int) -> None:
        super().__init__()
        d = arch.hidden_size
        by_layer = arch.extra["scale_attn_by_inverse_layer_idx"]
        scale = arch.attention_scale / (layer + 1) if by_layer else arch.attention_scale
        self.c_attn = MergedLinear(d, {"q": d, "k": d, "v": d}, True, split="heads", packed=True, transposed=True)
        self.c_proj = Linear(d, d, True, split="rows", transposed=True)
        self.attn = Attention(arch, layer, scale=scale)

    def forward(self, x_TD: Tensor, positions_T: Tensor, step: Step) -> Tensor:
        q, k, v = self.c_attn(x_TD)
        return self.c_proj(self.attn(q, k, v, positions_T, step))


class GPT2MLP(nn.Module):
    def __init__(self, arch: ModelArch) -> None:
        super().__init__()
        d, f = arch.hidden_size, arch.intermediate_size
        self.c_fc = Linear(d, f, True, split="columns", transposed=True)
        self.act = Activation(arch.activation)
        self.c_proj = Linear(f, d, True, split="rows", transposed=True)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.c_proj(self.act(self.c_fc(x_TD)))


class GPT2Block(nn.Module):
    def __init__(self, arch: ModelArch, layer: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(arch.hidden_size, arch.norm_eps)
        self.attn = GPT2Attention(arch, layer)
        self.ln_2 = LayerNorm(arch.hidden_size, arch.norm_eps)
        self.mlp = GPT2MLP(arch)

    def forward(
        self, x_TD: Tensor, residual_TD: Tensor | None, positions_T: Tensor, step: Step
    ) -> tuple[Tensor, Tensor]:
        x_TD, residual_TD = self.ln_1(x_TD, residual_TD)
        x_TD, total_TD = self.ln_2(self.attn(x_TD, positions_T, step), residual_TD)
        return self.mlp(x_TD), total_TD


class GPT2Model(nn.Module):
    def __init__(self, arch: ModelArch) -> None:
        super().__init__()
        self.wte = Embedding(arch.vocab_size, arch.hidden_size, split="vocab")
        self.wpe = Embedding(arch.max_position, arch.hidden_size)
        self.h = nn.ModuleList(GPT2Block(arch, i) for i in range(arch.num_layers))
        self.ln_f = LayerNorm(arch.hidden_size, arch.norm_eps)

    def forward(self, tokens_T: Tensor, positions_T: Tensor, step: Step) -> Tensor:
        x_TD, residual_TD = self.wpe(positions_T, self.wte(tokens_T)), None
        for block in self.h:
            x_TD, residual_TD = block(x_TD, residual_TD, positions_T, step)
        return self.ln_f(x_TD, residual_TD)[0]


class GPT2LMHeadModel(CausalLM):
    prefix = "transformer"
    embedding_path = "wte"

    def make_body(self, arch: ModelArch) -> nn.Module:
        return GPT2Model(arch)
