"""The implementations named "native": the ops of `quire.ops` by the native library, one call each.

Owns: what is supported and why not, and the shapes of results. `Kernels` holds a pool, so that a test can have one for
each level of instructions.

Shape legend: T tokens, D features, N outputs, K KV heads, H query heads, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quire.ops import heads as heads_reference
from quire.ops import linear as references
from quire.ops import moe, sampling
from quire.ops.attention import reference
from quire.ops.attention.meta import AttentionMeta, GroupMeta
from quire.ops.cache import copy_pages
from quire.ops.dispatch import Case
from quire.ops.linear import QuantizedWeight
from quire.ops.native import program
from quire.ops.native.library import PORTABLE, Pool, levels, load
from quire.ops.sampling import Noise


def refusal(case: Case) -> str | None:
    """Why the library cannot serve a case of any op."""
    if case.device.type != "cpu":
        return f"runs on a CPU, not on {case.device.type}"
    if case.dtype not in program.TYPES:
        return f"has no kernels for {str(case.dtype).removeprefix('torch.')}"
    library = load()
    return library if isinstance(library, str) else None


def supports_activation(case: Case) -> str | None:
    kind = case.shapes.get("kind", "silu")
    return refusal(case) or (None if kind in program.KINDS else f"has no kernel for {kind}")


def supports_softcap(case: Case) -> str | None:
    """Logits are float32 whatever the model's type."""
    return refusal(replace(case, dtype=torch.float32))


def supports_sampling(case: Case) -> str | None:
    """Logits are float32 whatever the model's type."""
    return refusal(replace(case, dtype=torch.float32))


def supports_copies(case: Case) -> str | None:
    """Pages are moved as they are, whatever their type."""
    return refusal(replace(case, dtype=torch.float32))


def supports_attention(case: Case) -> str | None:
    heads, kv_heads = case.shapes.get("num_heads", 1), case.shapes.get("num_kv_heads", 1)
    return refusal(case) or (None if heads % kv_heads == 0 else f"{heads} heads are no multiple of {kv_heads} KV heads")


def supports_linear(case: Case) -> str | None:
    return refusal(case) or (None if max(levels()) > PORTABLE else "is slower than torch without AVX2")


def supports_gated_linear(case: Case) -> str | None:
    return supports_linear(case) or supports_activation(case)


def supports_moe(case: Case) -> str | None:
    """One linear layer after the other, for each expert that has tokens."""
    return (supports_linear if case.shapes.get("bits") is None else refusal)(case) or supports_activation(case)


def _rows(x: Tensor) -> Tensor:
    """`x` with its last dimension dense."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _heads(x_THE: Tensor) -> Tensor:
    """`x` with the heads of a token side by side."""
    dense = x_THE.stride(2) == 1 and (x_THE.stride(1) == x_THE.shape[2] or x_THE.shape[1] == 1)
    return x_THE if dense else x_THE.contiguous()


def _serves_cache(kv: Tensor, q_THE: Tensor) -> bool:
    return kv.dtype in (q_THE.dtype, torch.int8) and kv[0].is_contiguous()


# Tokens up to which bf16 linear layers run here rather than in torch's product, by measurement. On a Zen 4 that is any
# number: 1.8 to 4 times torch's speed at one token, 0.97 to 1.17 times at 256. Where torch has a matrix unit (AMX) it
# is 8: on a Xeon 204 GFLOP/s here and 189 to 258 there at 8 tokens, 218 and 490 to 680 at 32.
ANY, FEW_BESIDE_AMX = 1 << 30, 8


class Kernels:
    """`empty` and `count` are where a recorder (`recorder.py`) steps in. `few`: most tokens of a linear layer here."""

    def __init__(self, pool: Pool, few: int = ANY) -> None:
        self.pool, self.few = pool, few

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory for a result."""
        return torch.empty(tuple(shape), dtype=dtype)

    def count(self, size: int) -> int:
        """A number of tokens, rows or samples as an operation is to hold it."""
        return size

    def rms_norm(self, x: Tensor, residual: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return self._norm(program.RMS_NORM, x, residual, weight_D, None, eps)

    def layer_norm(
        self, x: Tensor, residual: Tensor | None, weight_D: Tensor | None, bias_D: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        return self._norm(program.LAYER_NORM, x, residual, weight_D, bias_D, eps)

    def _norm(
        self, op: int, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        x_TD = _rows(x.flatten(0, -2))
        out_TD, tokens = self.empty(x_TD.shape, x.dtype), self.count(x_TD.shape[0])
        if residual is None:
            self.pool.run(program.norm(op, x_TD, None, weight, bias, out_TD, None, eps, tokens))
            return out_TD.view(x.shape), x
        residual_TD = _rows(residual.flatten(0, -2))
        total_TD = self.empty(x_TD.shape, x.dtype)
        self.pool.run(program.norm(op, x_TD, residual_TD, weight, bias, out_TD, total_TD, eps, tokens))
        return out_TD.view(x.shape), total_TD.view(x.shape)

    def activation(self, x: Tensor, kind: str) -> Tensor:
        return self._activation(x, kind, False)

    def gated_activation(self, x: Tensor, kind: str) -> Tensor:
        return self._activation(x, kind, True)

    def _activation(self, x: Tensor, kind: str, gated: bool) -> Tensor:
        x_TD = _rows(x.flatten(0, -2))
        size = x.shape[-1] // 2 if gated else x.shape[-1]
        out_TD = self.empty((x_TD.shape[0], size), x.dtype)
        self.pool.run(program.activation(x_TD, out_TD, kind, gated, self.count(x_TD.shape[0])))
        return out_TD.view(*x.shape[:-1], size)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        a_TD, b_TD = _rows(a.flatten(0, -2)), _rows(b.flatten(0, -2))
        out_TD = self.empty(a_TD.shape, a.dtype)
        self.pool.run(program.add(a_TD, b_TD, out_TD, self.count(a_TD.shape[0])))
        return out_TD.view(a.shape)

    def softcap(self, x: Tensor, cap: float) -> Tensor:
        x_TD = _rows(x.flatten(0, -2))
        out_TD = self.empty(x_TD.shape, x.dtype)
        self.pool.run(program.softcap(x_TD, out_TD, cap, self.count(x_TD.shape[0])))
        return out_TD.view(x.shape)

    def heads(
        self,
        q_THE: Tensor,
        k_TKE: Tensor,
        v_TKE: Tensor,
        kv: Tensor,
        slots_T: Tensor,
        positions_T: Tensor | None = None,
        table_2LF: Tensor | None = None,
        q_norm_E: Tensor | None = None,
        k_norm_E: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        if not _serves_cache(kv, q_THE):
            return heads_reference.heads(
                q_THE, k_TKE, v_TKE, kv, slots_T, positions_T, table_2LF, q_norm_E, k_norm_E, eps
            )
        q_THE, k_TKE, v_TKE = _heads(q_THE), _heads(k_TKE), _heads(v_TKE)
        out_THE = self.empty(q_THE.shape, q_THE.dtype)
        op = program.heads(
            q_THE, k_TKE, v_TKE, self.count(q_THE.shape[0]), table_2LF=table_2LF,
            positions_T=None if positions_T is None else positions_T.contiguous(), slots_T=slots_T.contiguous(), kv=kv,
            q_out_THE=out_THE, q_norm_E=q_norm_E, k_norm_E=k_norm_E, eps=eps,
        )  # fmt: skip
        self.pool.run(op)
        return out_THE

    def attention(
        self,
        q_THE: Tensor,
        kv: Tensor,
        group: GroupMeta,
        meta: AttentionMeta,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        slopes_H: Tensor | None = None,
    ) -> Tensor:
        if not _serves_cache(kv, q_THE):
            return reference.attention(q_THE, kv, group, meta, scale, window, softcap, slopes_H)
        q_THE = _heads(q_THE)
        out_THE = self.empty(q_THE.shape, q_THE.dtype)
        rows = meta.lengths_R.shape[0]
        if slopes_H is not None:
            slopes_H = slopes_H.float().contiguous()
        tables_RP = _rows(group.block_tables_RP)
        op = program.attention(
            q_THE, kv, tables_RP, meta.lengths_R, meta.cu_q, out_THE, self.count(rows), self.count(meta.num_decodes),
            scale, window, softcap, slopes_H,
        )  # fmt: skip
        self.pool.run(op)
        return out_THE

    def linear(self, x: Tensor, weight_NK: Tensor, bias_N: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
        if not self._serves_linear(x, weight_NK):
            return references.linear(x, weight_NK, bias_N, dtype)
        x_TK = _rows(x.flatten(0, -2))
        out_TN = self.empty((x_TK.shape[0], weight_NK.shape[0]), dtype or x.dtype)
        self.pool.run(program.linear(x_TK, weight_NK, bias_N, out_TN, self.count(x_TK.shape[0])))
        return out_TN.view(*x.shape[:-1], weight_NK.shape[0])

    def gated_linear(self, x: Tensor, weight_NK: Tensor, bias_N: Tensor | None, kind: str) -> Tensor:
        """One operation, which rounds the activation's result alone."""
        if not self._serves_linear(x, weight_NK):
            return self.gated_activation(references.linear(x, weight_NK, bias_N), kind)
        x_TK, outputs = _rows(x.flatten(0, -2)), weight_NK.shape[0] // 2
        out_TN = self.empty((x_TK.shape[0], outputs), x.dtype)
        self.pool.run(program.linear(x_TK, weight_NK, bias_N, out_TN, self.count(x_TK.shape[0]), kind, True))
        return out_TN.view(*x.shape[:-1], outputs)

    def _serves_linear(self, x: Tensor, weight_NK: Tensor) -> bool:
        many = weight_NK.dtype == torch.bfloat16 and x.shape[:-1].numel() > self.few
        return not many and weight_NK.stride(1) == 1 and x.numel() > 0

    def moe(
        self,
        x_TD: Tensor,
        logits_TE: Tensor,
        gate_up: Tensor | QuantizedWeight,
        down: Tensor | QuantizedWeight,
        top_k: int,
        normalised: bool,
        kind: str,
    ) -> Tensor:
        experts = logits_TE.shape[-1]

        def product(x: Tensor, weight: Tensor | QuantizedWeight) -> Tensor:
            of = self.linear if isinstance(weight, Tensor) else self.quantized_linear
            return of(x, weight, None)  # pyright: ignore[reportArgumentType]

        def block(x_ND: Tensor, expert: int) -> Tensor:
            hidden_NF = self.gated_activation(product(x_ND, moe.part(gate_up, expert, experts)), kind)
            return product(hidden_NF, moe.part(down, expert, experts))

        return moe.by_expert(x_TD, *moe.route(logits_TE, top_k, normalised), experts, block)

    def embedding(
        self, ids_T: Tensor, table_VD: Tensor, offset: int, add_TD: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        add_TD = None if add_TD is None else _rows(add_TD)
        out_TD = self.empty((ids_T.shape[0], table_VD.shape[1]), table_VD.dtype)
        self.pool.run(program.gather(ids_T, table_VD, out_TD, self.count(ids_T.shape[0]), offset, add_TD, scale))
        return out_TD

    def copy_pages(
        self, sources: Sequence[Tensor], targets: Sequence[Tensor], sources_C: Tensor, targets_C: Tensor
    ) -> None:
        copy_pages(sources, targets, sources_C, targets_C)

    def quantized_linear(
        self, x: Tensor, weight: QuantizedWeight, bias_N: Tensor | None, dtype: torch.dtype | None = None
    ) -> Tensor:
        if weight.q.stride(1) != 1 or not weight.scale_NG.is_contiguous() or x.numel() == 0:
            return references.quantized_linear(x, weight, bias_N, dtype)
        x_TK = _rows(x.flatten(0, -2))
        out_TN = self.empty((x_TK.shape[0], weight.shape[0]), dtype or x.dtype)
        self.pool.run(program.quantized_linear(x_TK, weight, bias_N, out_TN, self.count(x_TK.shape[0])))
        return out_TN.view(*x.shape[:-1], weight.shape[0])

    def quantized_embedding(
        self,
        ids_T: Tensor,
        table: QuantizedWeight,
        offset: int,
        dtype: torch.dtype,
        add_TD: Tensor | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        if table.bits != 8 or table.scale_NG.shape[1] != 1 or table.q.stride(1) != 1:
            return references.quantized_embedding(ids_T, table, offset, dtype, add_TD, scale)
        add_TD = None if add_TD is None else _rows(add_TD)
        out_TD = self.empty((ids_T.shape[0], table.shape[1]), dtype)
        tokens = self.count(ids_T.shape[0])
        self.pool.run(program.quantized_gather(ids_T, table, out_TD, tokens, offset, add_TD, scale))
        return out_TD

    def sample(
        self,
        logits_SV: Tensor,
        temperature_S: Tensor,
        log_min_p_S: Tensor,
        top_k_S: Tensor,
        top_p_S: Tensor,
        greedy_S: Tensor,
        noise: Noise,
        max_k: int,
        nucleus: bool,
        static: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows that the kernel leaves undecided (one in some ten thousand) go to the reference, scaled already."""
        x_SV, rows = _rows(logits_SV), logits_SV.shape[0]
        tokens_S = self.empty((rows,), torch.int64)
        top_S, low_S = (self.empty((rows,), torch.float32) for _ in range(2))
        temperature_S, log_min_p_S = temperature_S.contiguous(), log_min_p_S.contiguous()
        top_k_S, top_p_S, greedy_S = top_k_S.contiguous(), top_p_S.contiguous(), greedy_S.contiguous()
        noise = Noise(noise.seed.contiguous(), noise.sample.contiguous(), noise.position.contiguous())
        op = program.sample(
            x_SV, temperature_S, log_min_p_S, top_k_S, top_p_S, greedy_S, noise, tokens_S, top_S, low_S,
            self.count(rows),
        )  # fmt: skip
        self.pool.run(op)
        if x_SV is not logits_SV:
            logits_SV.copy_(x_SV)
        open_S = tokens_S < 0
        if open_S.any():
            at = open_S.nonzero().squeeze(1)
            tokens_S[at], top_S[at], low_S[at] = sampling.sample(
                x_SV[at], torch.ones(len(at)), log_min_p_S[at], top_k_S[at], top_p_S[at], greedy_S[at], noise.take(at),
                max_k, nucleus, static,
            )  # fmt: skip
        return tokens_S, top_S, low_S
