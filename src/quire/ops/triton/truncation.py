"""min_p, top_k and top_p of rows without sorting them: kernels that find each row's threshold, and draw above it.

Owns: the search. `sampling.py` says what a row's memory holds and launches them in turn. Exact as `ops/sampling.py` is:
a threshold follows from counts and from masses that are whole numbers; floats only choose where to look.

- `weigh`, twice: masses (float32) above eight pivots, to find a narrow bracket around a nucleus's threshold. For rows
  with a top_k it finds instead a bound that at least k tokens reach: of the blocks' maxima the k-th largest or less.
- `gather`: the tokens inside the bracket (or above the bound) as a list; exact masses of all and of those above it.
- `settle`: the threshold, from the list; the draw too, if the list holds all survivors. Where the list is too small for
  the bracket (k in the thousands, thousands of equal logits) it searches the row, pass by pass.
- `draw`: the draw from rows of which that is left.

Shape legend: S rows, V vocabulary, P parts of a row, N blocks of a row, L length of a list.
"""

# pyright: reportPossiblyUnboundVariable=false
from __future__ import annotations

import triton
import triton.language as tl

from quire.ops.triton.draws import (
    LOG2E,
    LOWEST,
    MASSLESS,
    gumbel,
    largest_with,
    mass,
    may_reach,
    order,
    pack,
    unorder,
    unpack,
    words_at,
    words_from,
)
from quire.ops.triton.launch import Kernel, release, wait

# What is left to do with a row.
DONE, FLOOR, KTH, NUCLEUS = (tl.constexpr(i) for i in range(4))
# Columns of the rows' memory: float32 (S, 8), int64 (S, 8).
HEAT, LOG_MIN_P, LOW, BOUND, WHOLE = (tl.constexpr(i) for i in range(5))
TODO, TOP_K, TOP_P, SEED, SAMPLE, POSITION, STILL = (tl.constexpr(i) for i in range(7))
# Columns of a part's sums, float32 (S, P, 16), behind those of the eight pivots.
TOTAL, COUNT, HIGHEST, LOWEST_PIVOT = (tl.constexpr(i) for i in range(8, 12))

_SURE = tl.constexpr(2e-5)  # relative error that a sum of float32 does not have
_SMALL = tl.constexpr(1024)  # a list so short is settled faster
_INF = tl.constexpr(float("inf"))


@triton.jit
def row_top(tops, row, parts, PARTS: tl.constexpr):
    """The largest scaled logit of a row from those of its parts; NaN if there is one."""
    part = tl.arange(0, PARTS)
    of_parts = tl.load(tops + row * parts + part, mask=part < parts, other=float("-inf"))
    return unorder(tl.max(order(of_parts), 0))


@triton.jit
def row_floor(floats, row, top):
    """The threshold of min_p."""
    share = tl.load(floats + row * 8 + LOG_MIN_P)
    return tl.where(share == float("-inf"), share, top + share)


@triton.jit
def scaled(line, at, vocab: tl.constexpr, heat):
    x = tl.load(line + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
    if heat != 1.0:
        x = tl.math.div_rn(x, heat)
    return x


@triton.jit
def _tile_peak(peaks, row, start, N: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr):
    block = start // BLOCK + tl.arange(0, TILE // BLOCK)
    return tl.max(tl.load(peaks + row.to(tl.int64) * N + block, mask=block < N, other=float("-inf")), 0)


@triton.jit
def _narrow(sums, row, parts, top, floor, share, FIRST: tl.constexpr, PARTS: tl.constexpr):
    """(below, above, total, count) from the sums of a round: tokens of at least `below` have the nucleus's mass for
    sure (or `below` is where masses end), tokens above `above` for sure have not."""
    part, j = tl.arange(0, PARTS), tl.arange(0, 16)
    mine = sums + row.to(tl.int64) * parts * 16
    sum_P16 = tl.load(mine + part[:, None] * 16 + j[None, :], mask=(part < parts)[:, None], other=0.0)
    sum_16 = tl.sum(sum_P16, 0)
    total = tl.sum(tl.where(j == TOTAL, sum_16, 0.0), 0)
    count = tl.sum(tl.where(j == COUNT, sum_16, 0.0), 0)
    highest, lowest = tl.load(mine + HIGHEST), tl.load(mine + LOWEST_PIVOT)
    pivot = _pivot(highest, lowest, j)
    limit = total * share
    enough = (j < 8) & (sum_16 >= limit * (1.0 + _SURE))
    short = (j < 8) & (sum_16 < limit * (1.0 - _SURE))
    below = tl.max(tl.where(enough, pivot, float("-inf")), 0)
    if FIRST:
        below = tl.where(below == float("-inf"), floor, below)
    else:
        below = tl.where(below == float("-inf"), lowest, below)
    above = tl.min(tl.where(short, pivot, tl.where(highest >= top, _INF, highest)), 0)
    return below, above, total, count


@triton.jit
def _pivot(highest, lowest, j):
    return tl.where(j == 7, lowest, highest + (lowest - highest) * ((j + 1).to(tl.float32) * 0.125))


@triton.jit
def _more(sums, x, m, pivot, TILE: tl.constexpr):
    """Sums within each thread: eight numbers side by side are its own."""
    return sums + tl.sum(tl.reshape(tl.where(x >= pivot, m, 0.0), (TILE // 8, 8)), 1)


@Kernel
def weigh(
    logits, tops, floats, numbers, peaks, before, sums, TILES,
    stride: tl.constexpr, vocab: tl.constexpr, ROUND: tl.constexpr, N: tl.constexpr, N2: tl.constexpr,
    PARTS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (P, S). before: sums of the round before; sums: float32 (S, P, 16)."""
    wait(PDL)
    part, row, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    todo = tl.load(numbers + row * 8 + TODO)
    top = row_top(tops, row, parts, PARTS)
    if (todo == KTH) & (part == 0) & (ROUND == 0):
        block = tl.arange(0, N2)
        key = order(tl.load(peaks + row.to(tl.int64) * N + block, mask=block < N, other=float("-inf")))
        k = tl.load(numbers + row * 8 + TOP_K)
        bound = float("-inf")
        if k <= N:
            ones = tl.full((N2,), 1, tl.int32)
            bound = unorder(largest_with(key, ones, k, tl.min(key, 0).to(tl.int64), tl.max(key, 0).to(tl.int64)))
        tl.store(floats + row * 8 + BOUND, bound)
    if (todo == NUCLEUS) & (tl.abs(top) < _INF):
        heat = tl.load(floats + row * 8 + HEAT)
        floor = row_floor(floats, row, top)
        total = 0.0
        if ROUND == 0:
            block = tl.arange(0, N2)
            peak = tl.load(peaks + row.to(tl.int64) * N + block, mask=block < N, other=float("-inf"))
            least = tl.min(tl.where(peak == float("-inf"), top, peak), 0)
            width = tl.minimum(2.0 * (top - least), MASSLESS)
            width = tl.where(width > 0.0, width, MASSLESS)
            highest, lowest = top, tl.maximum(top - width, floor)
        else:
            share = tl.load(numbers + row * 8 + TOP_P).to(tl.float64, bitcast=True).to(tl.float32)
            end = tl.maximum(floor, top - MASSLESS)
            lowest, highest, total, _ = _narrow(before, row, parts, top, end, share, True, PARTS)
            highest = tl.minimum(highest, top)
        line = logits + row.to(tl.int64) * stride
        lane = tl.arange(0, TILE)
        none = tl.zeros((TILE // 8,), tl.float32)
        s0, s1, s2, s3, s4, s5, s6, s7, s8 = none, none, none, none, none, none, none, none, none
        if ROUND == 0:
            reach = tl.maximum(floor, top - MASSLESS)
        else:
            reach = lowest
        for start in range(part * TILES * TILE, tl.minimum((part + 1) * TILES * TILE, vocab), TILE):
            if _tile_peak(peaks, row, start, N, TILE, BLOCK) >= reach:
                x = scaled(line, start + lane, vocab, heat)
                m = tl.exp2((x - top) * LOG2E)
                s0 = _more(s0, x, m, _pivot(highest, lowest, 0), TILE)
                s1 = _more(s1, x, m, _pivot(highest, lowest, 1), TILE)
                s2 = _more(s2, x, m, _pivot(highest, lowest, 2), TILE)
                s3 = _more(s3, x, m, _pivot(highest, lowest, 3), TILE)
                s4 = _more(s4, x, m, _pivot(highest, lowest, 4), TILE)
                s5 = _more(s5, x, m, _pivot(highest, lowest, 5), TILE)
                s6 = _more(s6, x, m, _pivot(highest, lowest, 6), TILE)
                s7 = _more(s7, x, m, lowest, TILE)
                if ROUND == 0:
                    s8 = _more(s8, x, m, floor, TILE)
                else:
                    s8 = _more(s8, x, 1.0, lowest, TILE)
        mine = sums + (row * parts + part).to(tl.int64) * 16
        tl.store(mine + 0, tl.sum(s0, 0))
        tl.store(mine + 1, tl.sum(s1, 0))
        tl.store(mine + 2, tl.sum(s2, 0))
        tl.store(mine + 3, tl.sum(s3, 0))
        tl.store(mine + 4, tl.sum(s4, 0))
        tl.store(mine + 5, tl.sum(s5, 0))
        tl.store(mine + 6, tl.sum(s6, 0))
        tl.store(mine + 7, tl.sum(s7, 0))
        if ROUND == 0:
            tl.store(mine + TOTAL, tl.sum(s8, 0))
            tl.store(mine + COUNT, 0.0)
        else:
            tl.store(mine + TOTAL, tl.where(part == 0, total, 0.0))
            tl.store(mine + COUNT, tl.sum(s8, 0))
        tl.store(mine + HIGHEST, highest)
        tl.store(mine + LOWEST_PIVOT, lowest)
    release(PDL)


@Kernel
def gather(
    logits, tops, floats, numbers, peaks, sums, masses, counts, list_x, list_token, TILES,
    stride: tl.constexpr, vocab: tl.constexpr, N: tl.constexpr, L: tl.constexpr,
    PARTS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (P, S). masses: int64 (S, P, 2), of all tokens that pass min_p and of those above the bracket. counts: int32
    (S,), zeros before. list_x, list_token: float32, int32 (S, L), in no order."""
    wait(PDL)
    part, row, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    todo = tl.load(numbers + row * 8 + TODO)
    top = row_top(tops, row, parts, PARTS)
    # an infinite top is the nucleus; NaN and a masked row have none
    if (todo != DONE) & (top > float("-inf")) & ((top < _INF) | (todo != NUCLEUS)):
        heat = tl.load(floats + row * 8 + HEAT)
        floor = row_floor(floats, row, top)
        below, above, reach = floor, _INF, floor
        if todo == KTH:
            below = tl.maximum(tl.load(floats + row * 8 + BOUND), floor)
            reach = below
        if todo == NUCLEUS:
            reach = tl.maximum(floor, top - MASSLESS)
            share = tl.load(numbers + row * 8 + TOP_P).to(tl.float64, bitcast=True).to(tl.float32)
            below, above, _, count = _narrow(sums, row, parts, top, reach, share, False, PARTS)
            above = tl.where(count <= L // 2, _INF, above)  # few: all of them
        if part == 0:
            tl.store(floats + row * 8 + WHOLE, tl.where(above == _INF, 1.0, 0.0))
            tl.store(floats + row * 8 + BOUND, below)
        line = logits + row.to(tl.int64) * stride
        lane = tl.arange(0, TILE)
        all_mass = tl.zeros((TILE // 8,), tl.int64)
        mass_above = tl.zeros((TILE // 8,), tl.int64)
        for start in range(part * TILES * TILE, tl.minimum((part + 1) * TILES * TILE, vocab), TILE):
            if _tile_peak(peaks, row, start, N, TILE, BLOCK) >= reach:
                at = start + lane
                x = scaled(line, at, vocab, heat)
                if todo == NUCLEUS:
                    m = tl.where(x >= floor, mass(x, top), 0)
                    all_mass += tl.sum(tl.reshape(m, (TILE // 8, 8)), 1)
                    mass_above += tl.sum(tl.reshape(tl.where(x > above, m, 0), (TILE // 8, 8)), 1)
                take = (x >= below) & (x <= above) & (x > float("-inf"))
                found = tl.sum(take.to(tl.int32), 0)
                if found > 0:
                    to = tl.atomic_add(counts + row, found, sem="relaxed") + tl.cumsum(take.to(tl.int32), 0) - 1
                    take = take & (to < L)
                    tl.store(list_x + row.to(tl.int64) * L + to, x, mask=take)
                    tl.store(list_token + row.to(tl.int64) * L + to, at, mask=take)
        tl.store(masses + (row * parts + part) * 2, tl.sum(all_mass, 0))
        tl.store(masses + (row * parts + part) * 2 + 1, tl.sum(mass_above, 0))
    release(PDL)


@triton.jit
def _limit(total, share):
    return tl.maximum((total.to(tl.float64) * share).to(tl.int64), 1)


@triton.jit
def _from_list(xs, tokens, numbers, count, todo, top, floor, k, share, all_mass, mass_above, whole, SIZE: tl.constexpr):
    """(threshold, whether it was found, the draw or `LOWEST`) from a row's list of `count` tokens."""
    lane = tl.arange(0, SIZE)
    inside = lane < count
    x = tl.load(xs + lane, mask=inside, other=float("-inf"))
    key = order(x)
    first, last = tl.min(tl.where(inside, key, 0x7FFFFFFF), 0).to(tl.int64), tl.max(key, 0).to(tl.int64)
    low, found = floor, 1
    if todo == KTH:
        if count >= k:
            low = tl.maximum(low, unorder(largest_with(key, inside.to(tl.int32), k, first, last)))
    if share < 1.0:
        if top == _INF:
            low = top
        else:
            m = tl.where(inside & (x >= low), mass(x, top), 0)
            here = tl.sum(m, 0)
            total = tl.where(todo == KTH, here, all_mass)
            limit = _limit(total, share)
            if limit <= total:
                if (mass_above < limit) & (limit <= mass_above + here):
                    low = tl.maximum(low, unorder(largest_with(key, m, limit - mass_above, first, last)))
                else:
                    found = 0
    draw = tl.full((), LOWEST, tl.int64)
    if (found == 1) & (whole == 1.0):
        token = tl.load(tokens + lane, mask=inside, other=0)
        score = x
        if tl.load(numbers + STILL) == 0:
            words = words_at(token, tl.load(numbers + POSITION), tl.load(numbers + SAMPLE), tl.load(numbers + SEED))
            score += gumbel(words)
        draw = tl.max(tl.where(inside & (x >= low), pack(score, token), LOWEST), 0)
    return low, found, draw


@triton.jit
def _weight_of_row(line, vocab: tl.constexpr, heat, top, key, WEIGHED: tl.constexpr, TILE: tl.constexpr):
    """(number of tokens with at least this key, or their mass; the least such key; the largest key below): int64."""
    lane = tl.arange(0, TILE)
    weight = tl.zeros((TILE // 8,), tl.int64)
    least = tl.full((TILE,), 0x7FFFFFFF, tl.int32)
    largest = tl.full((TILE,), -0x7FFFFFFF, tl.int32)
    for start in range(0, vocab, TILE):
        x = scaled(line, start + lane, vocab, heat)
        of_x = order(x)
        up = (of_x >= key) & (start + lane < vocab)
        if WEIGHED:
            m = tl.where(up, mass(x, top), 0)
        else:
            m = up.to(tl.int64)
        weight += tl.sum(tl.reshape(m, (TILE // 8, 8)), 1)
        least = tl.minimum(least, tl.where(up, of_x, 0x7FFFFFFF))
        largest = tl.maximum(largest, tl.where(up, -0x7FFFFFFF, of_x))
    return tl.sum(weight, 0), tl.min(least, 0).to(tl.int64), tl.max(largest, 0).to(tl.int64)


@triton.jit
def _from_row(line, vocab: tl.constexpr, heat, top, need, below, above, WEIGHED: tl.constexpr, TILE: tl.constexpr):
    """The largest key that tokens of at least it weigh `need`: between the keys `below`, which do, and `above`."""
    while below < above:
        middle = (below + above + 1) >> 1
        weight, least, largest = _weight_of_row(line, vocab, heat, top, middle.to(tl.int32), WEIGHED, TILE)
        if weight >= need:
            below = tl.minimum(least, above)
        else:
            above = tl.maximum(largest, below)
    return unorder(below.to(tl.int32))


@Kernel
def settle(
    logits, tops, floats, numbers, masses, counts, list_x, list_token, draws, P,
    stride: tl.constexpr, vocab: tl.constexpr, L: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (S,). Writes each row's threshold, and its draw if the list is enough for that."""
    wait(PDL)
    row = tl.program_id(0)
    floats += row * 8
    numbers += row * 8
    todo = tl.load(numbers + TODO)
    if todo != DONE:
        top = row_top(tops, row, P, PARTS)
        floor = row_floor(floats - row * 8, row, top)
        share = tl.load(numbers + TOP_P).to(tl.float64, bitcast=True)
        k = tl.load(numbers + TOP_K)
        low, found = float("-inf"), 1
        draw = tl.full((), LOWEST, tl.int64)
        if (top != top) | (top == float("-inf")):
            tl.store(numbers + TODO, 0)
        elif (todo == NUCLEUS) & (top == _INF):
            low = top
        else:
            count = tl.load(counts + row)
            whole = tl.load(floats + WHOLE)
            part = tl.arange(0, PARTS)
            mass_of = masses + (row * P + part) * 2
            all_mass = tl.sum(tl.load(mass_of, mask=part < P, other=0), 0)
            mass_above = tl.sum(tl.load(mass_of + 1, mask=part < P, other=0), 0)
            xs, tokens = list_x + row.to(tl.int64) * L, list_token + row.to(tl.int64) * L
            if count <= _SMALL:
                low, found, draw = _from_list(
                    xs, tokens, numbers, count, todo, top, floor, k, share, all_mass, mass_above, whole, _SMALL
                )
            elif count <= L:
                low, found, draw = _from_list(
                    xs, tokens, numbers, count, todo, top, floor, k, share, all_mass, mass_above, whole, L
                )
            else:
                found = 0
            if found == 0:
                line, heat = logits + row.to(tl.int64) * stride, tl.load(floats + HEAT)
                begin, end = order(tl.load(floats + BOUND)).to(tl.int64), order(top).to(tl.int64)
                low, total = floor, all_mass
                if todo == KTH:
                    if count >= k:
                        low = tl.maximum(low, _from_row(line, vocab, heat, top, k, begin, end, False, TILE))
                    total = 0
                    if (share < 1.0) & (top < _INF):
                        total, _, _ = _weight_of_row(line, vocab, heat, top, order(low), True, TILE)
                if (share < 1.0) & (top == _INF):
                    low = top
                if (share < 1.0) & (top < _INF):
                    limit = _limit(total, share)
                    if limit <= total:
                        begin = order(tl.maximum(low, top - MASSLESS)).to(tl.int64)
                        low = tl.maximum(low, _from_row(line, vocab, heat, top, limit, begin, end, True, TILE))
            if draw != LOWEST:
                tl.store(draws + row * P, draw)
                tl.store(numbers + TODO, 0)
        tl.store(floats + LOW, low)
    release(PDL)


@Kernel
def draw_above(
    logits, floats, numbers, peaks, draws, TILES,
    stride: tl.constexpr, vocab: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (P, S). The draws of parts of the rows that have none yet."""
    wait(PDL)
    part, row = tl.program_id(0), tl.program_id(1)
    numbers += row * 8
    if tl.load(numbers + TODO) != DONE:
        low, heat = tl.load(floats + row * 8 + LOW), tl.load(floats + row * 8 + HEAT)
        seed, sample, position = tl.load(numbers + SEED), tl.load(numbers + SAMPLE), tl.load(numbers + POSITION)
        still = tl.load(numbers + STILL) != 0
        line = logits + row.to(tl.int64) * stride
        lane = tl.arange(0, TILE)
        draw = tl.full((), LOWEST, tl.int64)
        score = tl.full((), float("-inf"), tl.float32)
        for start in range(part * TILES * TILE, tl.minimum((part + 1) * TILES * TILE, vocab), TILE):
            if _tile_peak(peaks, row, start, N, TILE, BLOCK) >= low:
                at = start + lane
                x = scaled(line, at, vocab, heat)
                alive = (x >= low) & (at < vocab)
                words = words_from(start, position, sample, seed, TILE)
                if tl.max((alive & (may_reach(x, words, score) | still)).to(tl.int32), 0) > 0:
                    noise = tl.where(still, 0.0, gumbel(words))
                    draw = tl.maximum(draw, tl.max(tl.where(alive, pack(x + noise, at), LOWEST), 0))
                    score, _ = unpack(draw)
        tl.store(draws + row * tl.num_programs(0) + part, draw)
    release(PDL)
