"""Sampling on a GPU: argmax, Gumbel draws and truncation over logits as the model leaves them, without a sort.

Owns: the kernels, and how the rows are split among programs. What is to come out says `ops/sampling.py`, to the token:
thresholds are exact (whole-number masses), and noise differs from torch's in the last place of a logarithm only.

Logits are bfloat16, float16 or float32, (S, V) with any row stride. A row is split into `parts`, each a program, so that
one row keeps the device busy too; what the parts found is put together by the next kernel. No result depends on the
split: maxima and whole numbers do not depend on an order, and sums of float32 only choose where to look. Nothing is kept
between calls, no size depends on a value: all of it can be captured in a graph.

A draw is one number, (score as an ordered 32-bit integer, 2^31 - 1 - token) in an int64, so that its maximum is the draw:
the best score, the lowest id among equals, NaN above all.

Shape legend: S sampled rows, V vocabulary, P parts of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.ops.sampling import Noise

TILE = 2048  # tokens that a program looks at together
PROGRAMS = 1024  # into which the rows of a call are split, or some more: eight for each multiprocessor
MOST_PARTS = 128

_LOWEST = tl.constexpr(-(0x7F800000 << 32) - (1 << 32) + 0x7FFFFFFF)  # the draw (-inf, token 0)
_LOG2E = tl.constexpr(1.44269504)


# --- numbers ---------------------------------------------------------------------------------------------------------


@triton.jit
def _order(x):
    """An int32 that sorts as the float32 does; zeros are equal, NaN is the largest."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def _unorder(order):
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _pack(x, token):
    return (_order(x).to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64)


@triton.jit
def _unpack(draw):
    """(score, token int64); the score of a row with NaN is NaN."""
    return _unorder((draw >> 32).to(tl.int32)), 0x7FFFFFFF - (draw & 0x7FFFFFFF)


@triton.jit
def _round(c0, c1, c2, c3, k0, k1):
    p0 = c0.to(tl.uint64) * 0xD2511F53
    p1 = c2.to(tl.uint64) * 0xCD9E8D57
    return (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, p1.to(tl.uint32), (p0 >> 32).to(tl.uint32) ^ c3 ^ k1, p0.to(tl.uint32)


@triton.jit
def _philox(quad, position, sample, seed):
    """The four words of each counter (quad, position, sample, 0): Philox4x32-10 as in `ops/philox.py`."""
    c0 = quad.to(tl.uint32)
    c1 = tl.zeros_like(c0) + position.to(tl.uint32)
    c2 = tl.zeros_like(c0) + sample.to(tl.uint32)
    c3 = tl.zeros_like(c0)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _words(begin, position, sample, seed, TILE: tl.constexpr):
    """The words of tokens begin .. begin + TILE (`begin` a multiple of 4)."""
    c0, c1, c2, c3 = _philox(begin // 4 + tl.arange(0, TILE // 4), position, sample, seed)
    return tl.reshape(tl.join(tl.join(c0, c2), tl.join(c1, c3)), (TILE,))


@triton.jit
def _gumbel(words):
    """Standard Gumbel noise: -log(-log1p(-u)), near u = 0 by a series."""
    u = tl.minimum(words.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10, 0.999999940395355224609375)
    series = u * (1.0 + u * (0.5 + u * (0.33333334 + u * (0.25 + u * (0.2 + u * 0.16666667)))))
    return -tl.log(tl.where(u < 0.0625, series, -tl.log(1.0 - u)))


@triton.jit
def _reach(x, words, best):
    """Whether x + noise may be `best` or more: t = -log1p(-u) is not below u, and must not be above exp(x - best). A
    cheap test that lets some too many pass."""
    least = ((words >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0  # not above u
    bar = best - 0.01 - tl.abs(best) * 1e-6
    most = tl.exp2((x - bar) * _LOG2E)
    return (least <= most) | (most != most)


# --- one pass --------------------------------------------------------------------------------------------------------


@triton.jit
def _take_largest(x, token, best, best_token):
    """The larger of both, lane by lane; NaN is taken, and then kept."""
    more = ((x > best) | (x != x)) & (best == best)
    return tl.where(more, x, best), tl.where(more, token, best_token)


@triton.jit(do_not_specialize=["tiles"])
def _scan_greedy(logits, stride, draws, vocab, tiles, TILE: tl.constexpr):
    """The largest logit of a part of a row. Grid (P, S); draws: int64 (S, P)."""
    part, row = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, TILE)
    line = logits + row.to(tl.int64) * stride
    begin = part * tiles * TILE
    best = tl.full((TILE,), float("-inf"), tl.float32)
    token = tl.zeros((TILE,), tl.int32)
    for start in range(begin, tl.minimum(begin + tiles * TILE, vocab), TILE):
        at = start + lane
        x = tl.load(line + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        best, token = _take_largest(x, at, best, token)
    tl.store(draws + row * tl.num_programs(0) + part, tl.max(_pack(best, token), 0))


@triton.jit(do_not_specialize=["tiles"])
def _scan_noise(
    logits, stride, temperature, greedy, seed, sample, position, draws, tops, vocab, tiles, TILE: tl.constexpr
):
    """The best score of a part of a row, with noise unless `greedy`. Grid (P, S); draws: int64 (S, P); tops: float32
    (S, P), the largest scaled logit."""
    part, row = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, TILE)
    line = logits + row.to(tl.int64) * stride
    begin = part * tiles * TILE
    heat = tl.load(temperature + row)
    still = tl.load(greedy + row) != 0
    seed, sample, position = tl.load(seed + row), tl.load(sample + row), tl.load(position + row)
    best = tl.full((TILE,), float("-inf"), tl.float32)
    token = tl.zeros((TILE,), tl.int32)
    draw = tl.full((), _LOWEST, tl.int64)
    score = tl.full((), float("-inf"), tl.float32)
    for start in range(begin, tl.minimum(begin + tiles * TILE, vocab), TILE):
        at = start + lane
        x = tl.load(line + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        if heat != 1.0:
            x = tl.math.div_rn(x, heat)
        if still:
            best, token = _take_largest(x, at, best, token)
        else:
            best = tl.maximum(best, x, propagate_nan=tl.PropagateNan.ALL)
            words = _words(start, position, sample, seed, TILE)
            if tl.max(_reach(x, words, score).to(tl.int32), 0) > 0:
                draw = tl.maximum(draw, tl.max(_pack(x + _gumbel(words), at), 0))
                score, _ = _unpack(draw)
    if still:
        draw = tl.max(_pack(best, token), 0)
    tl.store(draws + row * tl.num_programs(0) + part, draw)
    top, _ = _unpack(tl.max(_pack(best, token), 0))
    tl.store(tops + row * tl.num_programs(0) + part, top)


@triton.jit(do_not_specialize=["parts"])
def _put_together(draws, tops, tokens, top, parts, TOPS: tl.constexpr, PARTS: tl.constexpr):
    """The draw of a row from those of its parts. Grid (S,)."""
    row = tl.program_id(0)
    part = tl.arange(0, PARTS)
    draw = tl.max(tl.load(draws + row * parts + part, mask=part < parts, other=_LOWEST), 0)
    score, token = _unpack(draw)
    if TOPS:
        of_parts = tl.load(tops + row * parts + part, mask=part < parts, other=float("-inf"))
        score = _unorder(tl.max(_order(of_parts), 0))
    tl.store(tokens + row, token)
    tl.store(top + row, score)


def _split(rows: int, vocab: int) -> tuple[int, int]:
    """(parts of a row, tiles of a part)."""
    tiles = triton.cdiv(vocab, TILE)
    each = triton.cdiv(tiles, max(1, min(MOST_PARTS, PROGRAMS // rows)))
    return triton.cdiv(tiles, each), each


def _finish(draws_SP: Tensor, tops_SP: Tensor | None) -> tuple[Tensor, Tensor]:
    rows, parts = draws_SP.shape
    tokens_S = torch.empty(rows, dtype=torch.int64, device=draws_SP.device)
    top_S = torch.empty(rows, dtype=torch.float32, device=draws_SP.device)
    tops = draws_SP if tops_SP is None else tops_SP
    _put_together[(rows,)](
        draws_SP, tops, tokens_S, top_S, parts, TOPS=tops_SP is not None, PARTS=MOST_PARTS, num_warps=1
    )
    return tokens_S, top_S


def draw_greedy(logits_SV: Tensor) -> tuple[Tensor, Tensor]:
    """(token int64, its logit float32) of each row's argmax: see `ops.sampling.draw_greedy`. Logits of any of the
    three dtypes are read as they are. Two launches."""
    rows, vocab = logits_SV.shape
    parts, tiles = _split(rows, vocab)
    draws_SP = torch.empty((rows, parts), dtype=torch.int64, device=logits_SV.device)
    _scan_greedy[(parts, rows)](logits_SV, logits_SV.stride(0), draws_SP, vocab, tiles, TILE=TILE, num_warps=8)
    return _finish(draws_SP, None)


def draw_noise(logits_SV: Tensor, temperature_S: Tensor, greedy_S: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
    """(token int64, largest scaled logit float32) of rows without truncation: `ops.sampling.sample` with neither min_p,
    top_k nor top_p. The logits stay as they are. Two launches.

    A token differs from the reference's only where two scores are nearer than the last place of a logarithm (1e-5).
    """
    rows, vocab = logits_SV.shape
    parts, tiles = _split(rows, vocab)
    draws_SP = torch.empty((rows, parts), dtype=torch.int64, device=logits_SV.device)
    tops_SP = torch.empty((rows, parts), dtype=torch.float32, device=logits_SV.device)
    _scan_noise[(parts, rows)](
        logits_SV, logits_SV.stride(0), temperature_S, greedy_S, *noise, draws_SP, tops_SP, vocab, tiles,
        TILE=TILE, num_warps=8,
    )  # fmt: skip
    return _finish(draws_SP, tops_SP)
