"""OPT (arXiv:2205.01068), all sizes: learned positions from offset 2, and for 350m a narrower embedding with
projections and the norm after the residual. Owns: the arithmetic only. Shape legend: T tokens, D hidden.
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


class OPTAttention(nn.Module):
    def __init__(self, arch: ModelArch, layer: int) -> None:
        super().__init__()
        d = arch.hidden_size
        parts = {"q_proj": d, "k_proj": d, "v_proj": d}
        self.qkv_proj = MergedLinear(d, parts, arch.attention_bias, split="heads")
        self.out_proj = Linear(d, d, arch.attention_out_bias, split="rows")
        self.attn = Attention(arch, layer)

    def forward(self, x_TD: Tensor, positions_T: Tensor, step: Step) -> Tensor:
        q, k, v = self.qkv_proj(x_TD)
        return self.out_proj(self.attn(q, k, v, positions_T, step))


class OPTBlock(nn.Module):
    def __init__(self, arch: ModelArch, layer: int) -> None:
        super().__init__()
        d, affine = arch.hidden_size, arch.extra["layer_norm_elementwise_affine"]
        self.norm_first: bool = arch.extra["do_layer_norm_before"]
        self.self_attn = OPTAttention(arch, layer)
        self.self_attn_layer_norm = LayerNorm(d, arch.norm_eps, affine)
        self.fc1 = Linear(d, arch.intermediate_size, arch.mlp_bias, split="columns")
        self.act = Activation(arch.activation)
        self.fc2 = Linear(arch.intermediate_size, d, arch.mlp_bias, split="rows")
        self.final_layer_norm = LayerNorm(d, arch.norm_eps, affine)

    def mlp(self, x_TD: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x_TD)))

    def forward(
        self, x_TD: Tensor, residual_TD: Tensor | None, positions_T: Tensor, step: Step
    ) -> tuple[Tensor, Tensor | None]:
        if not self.norm_first:
            x_TD, _ = self.self_attn_layer_norm(self.self_attn(x_TD, positions_T, step), x_TD)
            x_TD, _ = self.final_layer_norm(self.mlp(x_TD), x_TD)
            return x_TD, None
        x_TD, residual_TD = self.self_attn_layer_norm(x_TD, residual_TD)
        x_TD, residual_TD = self.final_layer_norm(self.self_attn(x_TD, positions_T, step), residual_TD)
        return self.mlp(x_TD), residual_TD


class OPTDecoder(nn.Module):
    def __init__(self, arch: ModelArch) -> None:
        super().__init__()
        d, narrow, extra = arch.hidden_size, arch.extra["word_embed_proj_dim"], arch.extra
        self.embed_tokens = Embedding(arch.vocab_size, narrow, split="vocab")
        self.embed_positions = Embedding(arch.max_position, d, offset=2)
        self.project_in = Linear(narrow, d) if narrow != d else nn.Identity()
        self.layers = nn.ModuleList(OPTBlock(arch, i) for i in range(arch.num_layers))
        # Checkpoints that were fine-tuned before Transformers 4.20.1 have no final norm and say so.
        final = extra["do_layer_norm_before"] and not extra["_remove_final_layer_norm"]
        affine = extra["layer_norm_elementwise_affine"]
        self.final_layer_norm = LayerNorm(d, arch.norm_eps, affine) if final else None
        self.project_out = Linear(d, narrow) if narrow != d else nn.Identity()

    def forward(self, tokens_T: Tensor, positions_T: Tensor, step: Step) -> Tensor:
        x_TD = self.embed_positions(positions_T, self.project_in(self.embed_tokens(tokens_T)))
        residual_TD = None
        for layer in self.layers:
            x_TD, residual_TD = layer(x_TD, residual_TD, positions_T, step)
        if self.final_layer_norm is not None:
            x_TD, _ = self.final_layer_norm(x_TD, residual_TD)
        elif residual_TD is not None:
            x_TD = x_TD + residual_TD
        return self.project_out(x_TD)


class OPTModel(nn.Module):
    def __init__(self, arch: ModelArch) -> None:
        super().__init__()
        self.decoder = OPTDecoder(arch)

    def forward(self, tokens_T: Tensor, positions_T: Tensor, step: Step) -> Tensor:
        return self.decoder(tokens_T, positions_T, step)


class OPTForCausalLM(CausalLM):
    embedding_path = "decoder.embed_tokens"

    def make_body(self, arch: ModelArch) -> nn.Module:
        return OPTModel(arch)
