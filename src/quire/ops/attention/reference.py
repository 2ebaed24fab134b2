"""The meaning of paged attention, in plain PyTorch: the whole ragged batch over pages that hold its keys and values.

Owns: the reference that every faster implementation is held to. Knows nothing of layers or models.

Shape legend: T tokens of the ragged batch, Q tokens of one row, R rows, L tokens read, H query heads, K KV heads,
G = H / K query heads of one KV head, E head size, P pages of a row, N blocks, B tokens of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quire.ops.attention.meta import AttentionMeta, GroupMeta
from quire.ops.cache import read_rows

# A slice of the work (queries of a long row, rows among the decodes) makes about this many numbers at the most, so
# that memory grows neither with the square of a length nor with rows x the longest.
_MAX_NUMBERS = 1 << 24


def attention(
    q_THE: Tensor,
    kv: Tensor,
    group: GroupMeta,
    meta: AttentionMeta,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    slopes_H: Tensor | None = None,
) -> Tensor:
    """(T, H, E) in the dtype of q. The step's own keys and values are in the pages already (`ops.heads`), in any float
    type or in int8 (`ops.cache`).

    Causal: token i of a row sees tokens j <= i, with a `window` only i - window < j. Scores are q.k * scale, then
    softcap * tanh(scores / softcap), then + slope * (j - i) (ALiBi, arXiv:2108.12409); softmax in float32. Rows of
    length 0 give zeros.
    """
    n = meta.num_decodes
    rule = _Rule(scale, window, softcap, slopes_H)
    out_THE = torch.zeros_like(q_THE)
    width = max(1, _MAX_NUMBERS // (max(meta.max_len, 1) * kv.shape[3] * kv.shape[4]))
    for at in range(0, n, width):
        rows = slice(at, min(n, at + width))
        out_THE[rows] = _decodes(q_THE[rows], kv, group, meta, rows, rule)
    if n == meta.lengths_R.shape[0]:
        return out_THE
    q_lens = meta.cu_q.diff().tolist() if meta.q_lens is None else meta.q_lens
    start = n
    for row in range(n, len(q_lens)):
        stop = start + q_lens[row]
        if stop > start:
            out_THE[start:stop] = _row(q_THE[start:stop], kv, group, meta, row, rule)
        start = stop
    return out_THE


class _Rule:
    """How raw scores become probabilities."""

    def __init__(self, scale: float, window: int | None, softcap: float | None, slopes_H: Tensor | None) -> None:
        self.scale, self.window, self.softcap, self.slopes_H = scale, window, softcap, slopes_H

    def seen(self, i: Tensor, j: Tensor) -> Tensor:
        """Which keys at index j a query at index i sees (broadcast; i = -1 sees nothing)."""
        seen = j <= i
        return seen if self.window is None else seen & (j > i - self.window)

    def __call__(self, scores: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """scores (..., K, G, Q, L) float32; i (..., 1, 1, Q, 1), j (..., L). A query that sees nothing gets zeros."""
        scores = scores * self.scale
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if self.slopes_H is not None:
            scores = scores + self.slopes_H.float().view(scores.shape[-4], -1, 1, 1) * (j - i)
        seen = self.seen(i, j)
        scores = scores.masked_fill(~seen, torch.finfo(torch.float32).min)
        return torch.softmax(scores, dim=-1).masked_fill(~seen, 0.0)


def _decodes(q_RHE: Tensor, kv: Tensor, group: GroupMeta, meta: AttentionMeta, these: slice, rule: _Rule) -> Tensor:
    """Rows of one token in one batched gather: static shapes, no host sync."""
    rows, heads, size = q_RHE.shape
    pages = meta.max_len // kv.shape[2]
    tables = group.block_tables_RP[these, :pages].long().clamp(min=0)
    k_RKLE, v_RKLE = (read_rows(pool[tables], size).flatten(1, 2).transpose(1, 2) for pool in (kv[0], kv[1]))
    q_RKGQE = q_RHE.float().view(rows, kv.shape[3], -1, 1, size)
    i = (meta.lengths_R[these].long() - 1).view(rows, 1, 1, 1, 1)
    j = torch.arange(k_RKLE.shape[2], device=q_RHE.device)
    probs = rule(q_RKGQE @ k_RKLE.unsqueeze(2).transpose(-1, -2), i, j)
    # A page may hold anything behind its last written token, or in front of the window, and 0 * nan is nan.
    unseen = ~rule.seen(i.view(rows, 1, 1, 1), j.view(1, 1, -1, 1))
    v_RKLE = v_RKLE.masked_fill(unseen, 0.0)
    return (probs @ v_RKLE.unsqueeze(2)).reshape(rows, heads, size).to(q_RHE.dtype)


def _row(q_QHE: Tensor, kv: Tensor, group: GroupMeta, meta: AttentionMeta, row: int, rule: _Rule) -> Tensor:
    """One row of several tokens; its queries in slices that keep the score matrix small."""
    count, heads, size = q_QHE.shape
    block = kv.shape[2]
    bound = meta.max_len if meta.kv_lens is None else meta.kv_lens[row]
    table = group.block_tables_RP[row, : -(-bound // block)].long().clamp(min=0)
    length = meta.lengths_R[row].long()
    j = torch.arange(table.shape[0] * block, device=q_QHE.device)
    k_KLE, v_KLE = (read_rows(pool[table], size).flatten(0, 1).transpose(0, 1) for pool in (kv[0], kv[1]))
    unseen = (j >= length) if rule.window is None else (j >= length) | (j <= length - count - rule.window)
    v_KLE = v_KLE.masked_fill(unseen.view(1, -1, 1), 0.0)
    q_KGQE = q_QHE.float().view(count, kv.shape[3], -1, size).permute(1, 2, 0, 3)
    i_Q = length - count + torch.arange(count, device=q_QHE.device)
    out_KGQE = torch.empty_like(q_KGQE)
    width = max(1, _MAX_NUMBERS // max(1, heads * j.shape[0]))
    for at in range(0, count, width):
        part = slice(at, at + width)
        scores = q_KGQE[:, :, part] @ k_KLE.unsqueeze(1).transpose(-1, -2)
        out_KGQE[:, :, part] = rule(scores, i_Q[part].view(1, 1, -1, 1), j) @ v_KLE.unsqueeze(1)
    return out_KGQE.permute(2, 0, 1, 3).reshape(count, heads, size).to(q_QHE.dtype)
