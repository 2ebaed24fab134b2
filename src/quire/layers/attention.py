"""Attention of one layer: q/k norm, rotary, KV write and attention, kept together for the ops that fuse them.

Owns: the rule of the layer (scale, window, softcap, slopes). Knows its layer number, by which it finds its pages in the
step; holds no cache. Shape legend: T tokens, H query heads, K KV heads, E head size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quire.config.arch import ModelArch
from quire.layers.norm import RMSNorm
from quire.layers.rotary import NoRotary, Rotary
from quire.layers.step import Step
from quire.ops.attention import ATTENTION
from quire.ops.dispatch import Binder


class NoHeadNorm(nn.Module):
    """For models that do not normalise queries and keys."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Attention(nn.Module):
    """`rotary`: None where positions come otherwise. `head_norm`: RMSNorm over each head of q and k, whose weights the
    checkpoint keeps beside this module's siblings as q_norm and k_norm. `slopes`: ALiBi, one for each query head.
    """

    slopes_H: Tensor | None

    def __init__(
        self,
        arch: ModelArch,
        layer: int,
        rotary: Rotary | None = None,
        head_norm: bool = False,
        scale: float | None = None,
        slopes: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads, self.head_dim = arch.num_heads, arch.num_kv_heads, arch.head_dim
        self.scale = arch.attention_scale if scale is None else scale
        self.window = arch.sliding_windows[layer]
        self.softcap = arch.attn_softcap
        self.rotary = rotary or NoRotary()
        self.q_norm: nn.Module = NoHeadNorm()
        self.k_norm: nn.Module = NoHeadNorm()
        if head_norm:
            self.q_norm = RMSNorm(arch.head_dim, arch.norm_eps, "../../q_norm.weight")
            self.k_norm = RMSNorm(arch.head_dim, arch.norm_eps, "../../k_norm.weight")
        self.slopes = slopes
        self.register_buffer("slopes_H", None, persistent=False)
        self.op = ATTENTION.reference

    def build(self, length: int, device: torch.device) -> None:
        if self.slopes is not None:
            self.slopes_H = torch.tensor(self.slopes, dtype=torch.float32, device=device)

    def bind(self, ops: Binder) -> None:
        self.op = ops.bind(
            ATTENTION,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            window=self.window,
            softcap=self.softcap,
            alibi=self.slopes is not None,
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, positions_T: Tensor, step: Step) -> Tensor:
        """q (T, H*E), k and v (T, K*E) -> (T, H*E); writes k and v into the step's pages."""
        q_THE, k_TKE, v_TKE = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))
        q_THE, _ = self.q_norm(q_THE)
        k_TKE, _ = self.k_norm(k_TKE)
        q_THE, k_TKE = self.rotary(q_THE, k_TKE, positions_T)
        group, pages = step.kv[self.layer]
        out_THE = self.op(
            q_THE,
            k_TKE,
            v_TKE,
            pages,
            step.attn.groups[group],
            step.attn,
            self.scale,
            self.window,
            self.softcap,
            self.slopes_H,
        )
        return out_THE.flatten(1)
