"""Device functions of sampling: numbers that sort, Philox, Gumbel noise, masses.

Owns: the arithmetic that has to give the bits of `ops/sampling.py` and `ops/philox.py`. Knows no rows and no memory.

A draw is one number: the score as an ordered int32, then 2^31 - 1 - token, in an int64. The largest draw has the best
score, and among equals the lowest id; NaN is above all.
"""

# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(0x7F800000 << 32) - (1 << 32) + 0x7FFFFFFF)  # the draw (-inf, token 0)
LOG2E = tl.constexpr(1.44269502162933349609375)
MASSLESS = tl.constexpr(29.5)  # below the top by so much, a mass is none: 2^-42.5


@triton.jit
def order(x):
    """An int32 that sorts as the float32 does; zeros are equal, NaN is the largest."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def unorder(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def pack(x, token):
    return (order(x).to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64)


@triton.jit
def unpack(draw):
    """(score, token int64) of a draw."""
    return unorder((draw >> 32).to(tl.int32)), 0x7FFFFFFF - (draw & 0x7FFFFFFF)


@triton.jit
def philox(quad, position, sample, seed):
    """The four words of each counter (quad, position, sample, 0): Philox4x32-10 as in `ops/philox.py`."""
    c0 = quad.to(tl.uint32)
    c1 = tl.zeros_like(c0) + position.to(tl.uint32)
    c2 = tl.zeros_like(c0) + sample.to(tl.uint32)
    c3 = tl.zeros_like(c0)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, p1.to(tl.uint32)
        c2, c3 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1, p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def words_from(begin, position, sample, seed, COUNT: tl.constexpr):
    """The words of tokens begin .. begin + COUNT; both multiples of 8. A thread has eight tokens side by side, as those
    that load 16-bit logits."""
    quad = begin // 4 + tl.arange(0, COUNT // 8) * 2
    a0, a1, a2, a3 = philox(quad, position, sample, seed)
    b0, b1, b2, b3 = philox(quad + 1, position, sample, seed)
    even = tl.join(tl.join(a0, b0), tl.join(a2, b2))
    odd = tl.join(tl.join(a1, b1), tl.join(a3, b3))
    return tl.reshape(tl.join(even, odd), (COUNT,))


@triton.jit
def words_at(token, position, sample, seed):
    """The words of single tokens."""
    c0, c1, c2, c3 = philox(token >> 2, position, sample, seed)
    which = token & 3
    return tl.where(which < 2, tl.where(which == 0, c0, c1), tl.where(which == 2, c2, c3))


@triton.jit
def gumbel(words):
    """Standard Gumbel noise: -log(-log1p(-u)), near u = 0 by a series."""
    u = tl.minimum(words.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10, 0.999999940395355224609375)
    series = u * (1.0 + u * (0.5 + u * (0.33333334 + u * (0.25 + u * (0.2 + u * 0.16666667)))))
    return -tl.log(tl.where(u < 0.0625, series, -tl.log(1.0 - u)))


@triton.jit
def may_reach(x, scale, words, best):
    """1 where x scale + noise may be `best` or more, else 0: t = -log1p(-u) is not below u, and must not be above
    exp(x scale - best). A cheap test that lets some too many pass."""
    least = ((words >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0  # not above u
    most = tl.exp2(x * (scale * LOG2E) - (best - 0.01 - tl.abs(best) * 1e-6) * LOG2E)
    return tl.where(least > most, 0, 1)


@triton.jit
def take_larger(x, token, best, best_token):
    """The larger of both, lane by lane; NaN is taken, and then kept."""
    more = ((x > best) | (x != x)) & (best == best)
    return tl.where(more, x, best), tl.where(more, token, best_token)


@triton.jit
def mass(x, top):
    """exp(x - top) in units of 2^-40, int64: `_mass` of ops/sampling.py, step by step. Only in kernels that are
    compiled without fusing products with sums."""
    t = tl.maximum((x - top) * LOG2E, -64.0)
    shifted = t + 12582912.0  # its last bits are the nearest whole number n, halves to even
    f = t - (shifted - 12582912.0)
    p = f * 0.001326472614891827
    p = (p + 0.009671512991189957) * f
    p = (p + 0.05550733581185341) * f
    p = (p + 0.24022242426872253) * f
    p = (p + 0.6931470036506653) * f
    power = (shifted.to(tl.int32, bitcast=True) << 23) + (167 << 23)  # 2^(n + 40)
    return ((p + 1.0) * power.to(tl.float32, bitcast=True)).to(tl.int64)


@triton.jit
def largest_with(key, weight, need, low, high, SIZE: tl.constexpr, WAYS: tl.constexpr):
    """The largest number that keys of at least it weigh `need` together; between `low` and `high` (int64), the keys of
    at least `low` weighing enough. WAYS: a power of two, into so many parts the range is split at a time."""
    if WAYS == 1:
        while low < high:
            middle = (low + high + 1) >> 1
            if tl.sum(tl.where(key >= middle.to(tl.int32), weight, 0), 0) >= need:
                low = middle
            else:
                high = middle - 1
    else:
        way = tl.arange(1, WAYS + 1).to(tl.int64)
        keys = tl.broadcast_to(key[:, None], (SIZE, WAYS))
        weights = tl.broadcast_to(weight[:, None], (SIZE, WAYS))
        while low < high:
            pivot = low + ((high - low) * way + (WAYS - 1)) // WAYS
            enough = tl.sum(tl.where(keys >= pivot.to(tl.int32)[None, :], weights, 0), 0) >= need
            low = tl.maximum(low, tl.max(tl.where(enough, pivot, low), 0))
            high = tl.minimum(high, tl.min(tl.where(enough, high, pivot - 1), 0))
    return low.to(tl.int32)
