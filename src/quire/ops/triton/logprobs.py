"""Logprobs of drawn tokens and of the likeliest ones, without a sort and without a copy of the logits.

Owns: the kernels. One pass finds the largest of each block of a row, the sum of exponentials and the rank; then a
program for each row takes the largest of the blocks k times, and looks for the next one of that block alone.

Shape legend: S rows of logits, G rows asked for, V vocabulary, K likeliest tokens, P parts of a row, N blocks of a row.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from quire.ops.sampling import token_logprobs as reference
from quire.ops.triton.draws import LOG2E, LOWEST, pack, unpack
from quire.ops.triton.launch import Kernel, ceil, power, release, wait
from quire.ops.triton.sampling import BLOCK, PARTS, TILE, WARPS, Lines, split

MOST = 64  # likeliest tokens worth this way


@Kernel
def _scan(
    logits, at, tokens, peaks, tops, sums, ranks, STRIDE, VOCAB, TILES,
    UNIT: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (P, G). peaks: int64 (G, N), the largest draw of each block; tops, sums: float32 (G, P), a part's largest
    number and its sum of exp(x - largest); ranks: int32 (G, P), numbers above the token's."""
    wait(PDL)
    part, row, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    stride, vocab = STRIDE * UNIT, VOCAB * UNIT
    N = tl.cdiv(vocab, BLOCK)
    of = row.to(tl.int64)
    if at is not None:
        of = tl.load(at + row).to(tl.int64)
    line = logits + of * stride
    chosen = tl.load(line + tl.load(tokens + row)).to(tl.float32)
    lane = tl.arange(0, TILE)
    most = float("-inf")
    total = tl.zeros((TILE,), tl.float32)
    above = tl.zeros((TILE,), tl.int32)
    for start in range(part * TILES * TILE, tl.minimum((part + 1) * TILES * TILE, vocab), TILE):
        token = start + lane
        x = tl.load(line + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
        above += (x > chosen).to(tl.int32)
        draw = tl.where(token < vocab, pack(x, token), LOWEST - 0x7FFFFFFF)
        peak = tl.max(tl.reshape(draw, (TILE // BLOCK, BLOCK)), 1)
        block = start // BLOCK + tl.arange(0, TILE // BLOCK)
        tl.store(peaks + row.to(tl.int64) * N + block, peak, mask=block < N)
        highest, _ = unpack(tl.max(peak, 0))
        if highest > most:
            total *= tl.exp2((most - highest) * LOG2E)
            most = highest
        if most > float("-inf"):
            total += tl.exp2((x - most) * LOG2E)
    tl.store(tops + row * parts + part, most)
    tl.store(sums + row * parts + part, tl.sum(total, 0))
    tl.store(ranks + row * parts + part, tl.sum(above, 0))
    release(PDL)


@Kernel
def _pick(
    logits, at, tokens, given, peaks, tops, sums, ranks, ids, values, rank, STRIDE, VOCAB, P, K,
    UNIT: tl.constexpr, NORMALISE: tl.constexpr, N2: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (G,). given: int64 (G, K) or None, tokens to take instead of the likeliest."""
    wait(PDL)
    row = tl.program_id(0)
    stride, vocab = STRIDE * UNIT, VOCAB * UNIT
    N = tl.cdiv(vocab, BLOCK)
    of = row.to(tl.int64)
    if at is not None:
        of = tl.load(at + row).to(tl.int64)
    line = logits + of * stride
    part = tl.arange(0, PARTS)
    top_P = tl.load(tops + row * P + part, mask=part < P, other=float("-inf"))
    sum_P = tl.load(sums + row * P + part, mask=part < P, other=0.0)
    most = tl.max(top_P, 0)
    norm = 0.0
    if NORMALISE:
        norm = most + tl.log(tl.sum(tl.where(top_P > float("-inf"), sum_P * tl.exp2((top_P - most) * LOG2E), 0.0), 0))
    tl.store(rank + row, tl.sum(tl.load(ranks + row * P + part, mask=part < P, other=0), 0).to(tl.int64) + 1)
    token = tl.load(tokens + row)
    ids += row * (K + 1)
    values += row * (K + 1)
    tl.store(ids, token)
    tl.store(values, tl.load(line + token).to(tl.float32) - norm)
    if given is not None:
        for i in range(K):
            token = tl.load(given + row * K + i)
            tl.store(ids + 1 + i, token)
            tl.store(values + 1 + i, tl.load(line + token).to(tl.float32) - norm)
    else:
        n, lane = tl.arange(0, N2), tl.arange(0, BLOCK)
        peak = tl.load(peaks + row.to(tl.int64) * N + n, mask=n < N, other=LOWEST - 0x7FFFFFFF)
        for i in range(K):
            draw = tl.max(peak, 0)
            x, token = unpack(draw)
            tl.store(ids + 1 + i, token)
            tl.store(values + 1 + i, x - norm)
            block = (token // BLOCK).to(tl.int32)
            here = block * BLOCK + lane
            x = tl.load(line + here, mask=here < vocab, other=float("-inf")).to(tl.float32)
            rest = pack(x, here)
            following = tl.max(tl.where((rest < draw) & (here < vocab), rest, LOWEST - 0x7FFFFFFF), 0)
            peak = tl.where(n == block, following, peak)
    release(PDL)


def token_logprobs(
    logits_SV: Tensor, token_G: Tensor, top: int | Tensor, normalise: bool, at_G: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `ops.sampling.token_logprobs`; two launches. More than `MOST` of the likeliest tokens are the reference's."""
    rows, vocab = token_G.shape[0], logits_SV.shape[1]
    device, (stride, width, unit) = logits_SV.device, Lines.of(logits_SV)
    given_GK = None if isinstance(top, int) else top.contiguous()
    count = min(top, vocab) if isinstance(top, int) else top.shape[1]
    if given_GK is None and count > MOST:
        return reference(logits_SV, token_G, top, normalise, at_G)
    parts, tiles = split(rows, vocab)
    blocks = ceil(vocab, BLOCK)
    peaks_GN = torch.empty((rows, blocks), dtype=torch.int64, device=device)
    tops_GP, sums_GP = torch.empty((2, rows, parts), device=device)
    above_GP = torch.empty((rows, parts), dtype=torch.int32, device=device)
    ids = torch.empty((rows, 1 + count), dtype=torch.int64, device=device)
    values = torch.empty((rows, 1 + count), device=device)
    ranks_G = torch.empty(rows, dtype=torch.int64, device=device)
    found = peaks_GN, tops_GP, sums_GP, above_GP
    constants = unit, TILE, BLOCK
    _scan((parts, rows, 1), (logits_SV, at_G, token_G, *found), (stride, width, tiles), constants, warps=WARPS)
    tensors = logits_SV, at_G, token_G, given_GK, *found, ids, values, ranks_G
    _pick((rows, 1, 1), tensors, (stride, width, parts, count), (unit, normalise, power(blocks), PARTS, BLOCK), warps=4)
    return ids, values, ranks_G
