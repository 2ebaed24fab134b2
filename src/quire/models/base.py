"""The skeleton of a causal language model. Owns: the path from token ids to hidden states to logits.

Knows nothing of sharding, quantization, loading or devices: a model is its arithmetic, built on the meta device.
Shape legend: T tokens, S sampled rows, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from quire.config.arch import ModelArch
from quire.layers.elementwise import SoftCap
from quire.layers.groups import kv_groups
from quire.layers.linear import Embedding, LMHead
from quire.layers.norm import LayerNorm, RMSNorm
from quire.layers.rotary import Rotary
from quire.layers.step import Step

__all__ = ["Block", "CausalLM", "Decoder", "kv_groups"]

# What makes one block: (arch, layer, the rotary shared by the layers that turn alike). A block's forward is
# (x_TD, residual_TD | None, positions_T, step) -> (x_TD, residual_TD).
Block = Callable[[ModelArch, int, "Rotary | None"], nn.Module]


class Decoder(nn.Module):
    """Embedding, blocks that thread the residual, final norm: the body of Llama and its kin."""

    def __init__(self, arch: ModelArch, block: Block) -> None:
        super().__init__()
        ropes = [arch.rope_of(i) for i in range(arch.num_layers)]
        rotaries = {rope: Rotary(rope) for rope in dict.fromkeys(ropes) if rope is not None}
        scale = self.embedding_scale(arch)
        self.embed_tokens = Embedding(arch.vocab_size, arch.hidden_size, split="vocab", scale=scale)
        self.layers = nn.ModuleList(
            block(arch, i, None if rope is None else rotaries[rope]) for i, rope in enumerate(ropes)
        )
        self.norm = self.make_norm(arch)

    def make_norm(self, arch: ModelArch) -> RMSNorm | LayerNorm:
        return RMSNorm(arch.hidden_size, arch.norm_eps)

    def embedding_scale(self, arch: ModelArch) -> float:
        return 1.0

    def forward(self, tokens_T: Tensor, positions_T: Tensor, step: Step) -> Tensor:
        x_TD, residual_TD = self.embed_tokens(tokens_T), None
        for layer in self.layers:
            x_TD, residual_TD = layer(x_TD, residual_TD, positions_T, step)
        return self.norm(x_TD, residual_TD)[0]


class CausalLM(nn.Module):
    """A body named as in the checkpoint (`prefix`) and a head. Subclasses give `make_body`; `embedding_path` leads to
    its token embedding, which a tied head shares."""

    prefix = "model"
    embedding_path = "embed_tokens"

    def __init__(self, arch: ModelArch) -> None:
        super().__init__()
        self.arch = arch
        self.add_module(self.prefix, body := self.make_body(arch))
        embed = body.get_submodule(self.embedding_path)
        assert isinstance(embed, Embedding)
        tied = embed if arch.tie_word_embeddings else None
        self.lm_head = LMHead(embed.weight.shape[1], arch.vocab_size, tied)
        self.softcap = None if arch.logit_softcap is None else SoftCap(arch.logit_softcap)

    def make_body(self, arch: ModelArch) -> nn.Module:
        raise NotImplementedError

    def forward(self, tokens_T: Tensor, positions_T: Tensor, step: Step) -> Tensor:
        """Token ids and positions (int64) of the ragged batch -> hidden states (T, D), in the model's dtype."""
        return self.get_submodule(self.prefix)(tokens_T, positions_T, step)

    def compute_logits(self, hidden_SD: Tensor, dtype: torch.dtype | None = torch.float32) -> Tensor:
        """Logits (S, V) of some hidden states in `dtype`; None: float32, or whatever is cheaper and as exact."""
        if self.softcap is None:
            return self.lm_head(hidden_SD, dtype)
        return self.softcap(self.lm_head(hidden_SD, torch.float32))
