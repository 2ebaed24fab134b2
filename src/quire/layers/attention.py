"""Attention of one layer in two ops: `heads` (q/k norm, rotary, KV write) and `attention`.

Owns: the rule of the layer (scale, window, softcap, slopes). Knows its layer number, by which it finds its pages in the
step; holds no cache. Shape legend: T tokens, H query heads, K KV heads, E head size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quire.config.arch import ModelArch
from quire.layers.norm import RMSNorm
from quire.layers.rotary import Rotary
from quire.layers.step import Step
from quire.ops.attention import ATTENTION
from quire.ops.dispatch import Binder
from quire.ops.heads import HEADS


def alibi_slopes(num_heads: int, largest: float = 8.0) -> tuple[float, ...]:
    """The slopes of ALiBi (arXiv:2108.12409): 2^-x for x evenly spaced up to `largest`. Where the number of heads is no
    power of two, every second of the next one's first, then the others as far as they are needed."""
    count = 1 << (num_heads - 1).bit_length()
    slopes = [2.0 ** (-largest * (i + 1) / count) for i in range(count)]
    return tuple(slopes if count == num_heads else (slopes[1::2] + slopes[::2])[:num_heads])


class Heads(nn.Module):
    """Head norm, rotation and KV write. `norm`: of each head of q and k, whose weights the checkpoint keeps beside the
    parent of this module's parent as q_norm and k_norm."""

    def __init__(self, arch: ModelArch, rotary: Rotary | None, norm: type[RMSNorm] | None) -> None:
        super().__init__()
        self.head_dim, self.eps = arch.head_dim, arch.norm_eps
        self.rotary = rotary
        self.q_norm = norm(arch.head_dim, arch.norm_eps, "../../../q_norm.weight") if norm else None
        self.k_norm = norm(arch.head_dim, arch.norm_eps, "../../../k_norm.weight") if norm else None
        self.op = HEADS.reference

    def bind(self, ops: Binder) -> None:
        turned = 0 if self.rotary is None else self.rotary.rope.rotary_dim
        self.op = ops.bind(HEADS, head_dim=self.head_dim, rotary_dim=turned, head_norm=self.q_norm is not None)

    def forward(
        self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, pages: Tensor, slots_T: Tensor, positions_T: Tensor
    ) -> Tensor:
        return self.op(
            q_THE,
            k_TKE,
            v_TKE,
            pages,
            slots_T,
            positions_T,
            None if self.rotary is None else self.rotary.table_2LF,
            None if self.q_norm is None else self.q_norm.weight,
            None if self.k_norm is None else self.k_norm.weight,
            self.eps,
        )


class Attention(nn.Module):
    """`rotary`: None where positions come otherwise. `head_norm`: the norm over each head of q and k. `slopes`: ALiBi,
    one for each query head.
    """

    slopes_H: Tensor | None

    def __init__(
        self,
        arch: ModelArch,
        layer: int,
        rotary: Rotary | None = None,
        head_norm: type[RMSNorm] | None = None,
        scale: float | None = None,
        slopes: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads, self.head_dim = arch.num_heads, arch.num_kv_heads, arch.head_dim
        self.scale = arch.attention_scale if scale is None else scale
        self.window = arch.sliding_windows[layer]
        self.softcap = arch.attn_softcap
        self.heads = Heads(arch, rotary, head_norm)
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
        group, pages = step.kv[self.layer]
        meta = step.attn.groups[group]
        q_THE = self.heads(q_THE, k_TKE, v_TKE, pages, meta.slots_T, positions_T)
        out_THE = self.op(q_THE, pages, meta, step.attn, self.scale, self.window, self.softcap, self.slopes_H)
        return out_THE.flatten(1)
