"""min_p, top_k and top_p of rows without sorting them: kernels that find each row's threshold, and draw above it.

Owns: the search. `sampling.py` says what a row's memory holds and launches them in turn. Exact as `ops/sampling.py` is:
a threshold follows from counts and from masses that are whole numbers; floats only choose where to look.

- `choose`, for rows with a top_k: of the blocks' maxima the k-th largest is a bound that at least k tokens reach. The
  tokens that do are a list, in which the k-th largest is found, then the nucleus, then the draw.
- `weigh`, twice, for rows with a top_p alone: masses (float32) above eight pivots, to find a narrow bracket around the
  nucleus's threshold. `gather`: the tokens inside the bracket as a list; exact masses of all and of those above it.
- `settle`: the threshold, from the list; the draw too, if the list holds all survivors. Where the list is too small (k
  in the thousands, thousands of nearly equal logits) it searches the row, pass by pass.
- `draw_above`: the draw from rows of which that is left.

Shape legend: S rows, V vocabulary, P parts of a row, N blocks of a row, L length of a list.
"""

# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
from __future__ import annotations

from functools import partial

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
TOTAL, COUNT, HIGHEST, LOWEST_PIVOT, GUESS = (tl.constexpr(i) for i in range(8, 13))

_SURE = tl.constexpr(2e-5)  # relative error that a sum of float32 does not have
_NEARLY = tl.constexpr(1e-6)
_SMALL = tl.constexpr(1024)  # a list so short is settled faster
_INF = tl.constexpr(float("inf"))


@triton.jit
def row_top(tops, row, parts, PARTS: tl.constexpr):
    """The largest scaled logit of a row from those of its parts; NaN if there is one."""
    part = tl.arange(0, PARTS)
    of_parts = tl.load(tops + row * parts + part, mask=part < parts, other=float("-inf"))
    return unorder(tl.max(order(of_parts), 0))


@triton.jit
def row_floor(floats, top):
    """The threshold of min_p, of the row whose memory is given."""
    share = tl.load(floats + LOG_MIN_P)
    return tl.where(share == float("-inf"), share, top + share)


@triton.jit
def scaled(line, at, vocab, heat):
    x = tl.load(line + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
    if heat != 1.0:
        x = tl.math.div_rn(x, heat)
    return x


@triton.jit
def _tile_peak(peaks, row, start, N, TILE: tl.constexpr, BLOCK: tl.constexpr):
    block = start // BLOCK + tl.arange(0, TILE // BLOCK)
    return tl.max(tl.load(peaks + row.to(tl.int64) * N + block, mask=block < N, other=float("-inf")), 0)


@triton.jit
def _narrow(sums, row, parts, top, floor, share, ROUND: tl.constexpr, PARTS: tl.constexpr):
    """(below, above, guess, total, count) from the sums of a round: tokens of at least `below` have the nucleus's mass
    for sure (or `below` is where masses end), tokens above `above` for sure have not; the threshold is near `guess`."""
    part, j = tl.arange(0, PARTS), tl.arange(0, 16)
    mine = sums + row.to(tl.int64) * parts * 16
    sum_P16 = tl.load(mine + part[:, None] * 16 + j[None, :], mask=(part < parts)[:, None], other=0.0)
    sum_16 = tl.sum(sum_P16, 0)
    total = tl.sum(tl.where(j == TOTAL, sum_16, 0.0), 0)
    count = tl.sum(tl.where(j == COUNT, sum_16, 0.0), 0)
    highest, lowest, guess = tl.load(mine + HIGHEST), tl.load(mine + LOWEST_PIVOT), tl.load(mine + GUESS)
    pivot = _pivot(highest, lowest, guess, j, ROUND)
    limit = total * share
    enough = (j < 8) & (sum_16 >= limit * (1.0 + _SURE))
    short = (j < 8) & (sum_16 < limit * (1.0 - _SURE))
    below = tl.max(tl.where(enough, pivot, float("-inf")), 0)
    below = tl.where(below == float("-inf"), floor if ROUND == 0 else lowest, below)
    above = tl.min(tl.where(short, pivot, tl.where(highest >= top, _INF, highest)), 0)
    most, least = tl.min(tl.where(enough, sum_16, total), 0), tl.max(tl.where(short, sum_16, 0.0), 0)
    guess = tl.minimum(above, top)
    guess += (below - guess) * tl.minimum(tl.maximum((limit - least) / (most - least), 0.0), 1.0)
    # what was weighed is nearly the scaled logit
    return below - tl.abs(below) * _NEARLY, above + tl.abs(above) * _NEARLY, guess, total, count


@triton.jit
def _pivot(highest, lowest, guess, j, ROUND: tl.constexpr):
    """Eight falling numbers, the last of them `lowest`: evenly spaced at first, then around the guess."""
    if ROUND == 0:
        here = highest + (lowest - highest) * ((j + 1) * 0.125)
    else:
        away = tl.abs(j - 3)
        away = tl.where(away == 0, 0.0, tl.where(away == 1, 0.025, tl.where(away == 2, 0.08, 0.25)))
        here = guess + (highest - lowest) * tl.where(j < 3, away, -away)
        here = tl.minimum(tl.maximum(here, lowest), highest)
    return tl.where(j == 7, lowest, here)


@triton.jit
def _more(sums, x, m, pivot, TILE: tl.constexpr):
    """Sums within each thread: eight numbers side by side are its own."""
    return sums + tl.sum(tl.reshape(tl.where(x >= pivot, m, 0.0), (TILE // 8, 8)), 1)


@partial(Kernel, fused=False)
def choose(
    logits, tops, floats, numbers, peaks, blocks, counts, lists, draws, STRIDE, VOCAB, P,
    UNIT: tl.constexpr, N2: tl.constexpr, L: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (S,). blocks: int32 (S, N2), room for their numbers. Of a row with a top_k: the list, and if it is short the
    threshold and the draw."""
    wait(PDL)
    row = tl.program_id(0)
    stride, vocab = STRIDE * UNIT, VOCAB * UNIT
    N = tl.cdiv(vocab, BLOCK)
    numbers += row * 8
    floats += row * 8
    if tl.load(numbers + TODO) == KTH:
        top = row_top(tops, row, P, PARTS)
        if top > float("-inf"):
            floor, heat, k = row_floor(floats, top), tl.load(floats + HEAT), tl.load(numbers + TOP_K)
            n = tl.arange(0, N2)
            peak = tl.load(peaks + row.to(tl.int64) * N + n, mask=n < N, other=float("-inf"))
            key = order(peak)
            below = floor
            if k <= N:
                ones = tl.full((N2,), 1, tl.int32)
                first = tl.min(tl.where(n < N, key, 0x7FFFFFFF), 0).to(tl.int64)
                kth = largest_with(tl.where(n < N, key, -0x7FFFFFFF), ones, k, first, order(top).to(tl.int64), N2, 4)
                below = tl.maximum(floor, unorder(kth))
            chosen = ((peak >= below) & (peak > float("-inf")) & (n < N)).to(tl.int32)
            blocks += row * N2
            tl.store(blocks + tl.cumsum(chosen, 0) - 1, n, mask=chosen == 1)
            some = tl.sum(chosen, 0)
            tl.debug_barrier()
            draws_of = lists + row.to(tl.int64) * L
            line = logits + row.to(tl.int64) * stride
            lane = tl.arange(0, TILE)
            count = 0
            for begin in range(0, some, TILE // BLOCK):
                which = begin + lane // BLOCK
                at = tl.load(blocks + which, mask=which < some, other=0) * BLOCK + lane % BLOCK
                x = scaled(line, tl.where(which < some, at, vocab), vocab, heat)
                take = ((x >= below) & (x > float("-inf"))).to(tl.int32)
                to = count + tl.cumsum(take, 0) - 1
                tl.store(draws_of + to, pack(x, at), mask=(take == 1) & (to < L))
                count += tl.sum(take, 0)
            tl.store(counts + row, count)
            tl.store(floats + BOUND, below)
            tl.store(floats + WHOLE, 1.0)
            tl.debug_barrier()
            if count <= _SMALL:
                share = tl.load(numbers + TOP_P).to(tl.float64, bitcast=True)
                none = tl.full((), 0, tl.int64)
                low, _, draw = _from_list(
                    draws_of, numbers, count, KTH, top, floor, k, share, none, none, 1.0, _SMALL, 4
                )
                tl.store(floats + LOW, low)
                tl.store(draws + row * P, draw)
                tl.store(numbers + TODO, 0)
    release(PDL)


@Kernel
def weigh(
    logits, tops, floats, numbers, peaks, before, sums, STRIDE, VOCAB, TILES,
    UNIT: tl.constexpr, ROUND: tl.constexpr, N2: tl.constexpr,
    PARTS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (P, S). before: sums of the round before; sums: float32 (S, P, 16)."""
    wait(PDL)
    part, row, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    stride, vocab = STRIDE * UNIT, VOCAB * UNIT
    N = tl.cdiv(vocab, BLOCK)
    top = _INF
    if tl.load(numbers + row * 8 + TODO) == NUCLEUS:
        top = row_top(tops, row, parts, PARTS)
    if tl.abs(top) < _INF:
        scale = 1.0 / tl.load(floats + row * 8 + HEAT)
        floor = row_floor(floats + row * 8, top)
        total = 0.0
        if ROUND == 0:
            block = tl.arange(0, N2)
            peak = tl.load(peaks + row.to(tl.int64) * N + block, mask=block < N, other=float("-inf"))
            least = tl.min(tl.where(peak == float("-inf"), top, peak), 0)
            width = tl.minimum(2.0 * (top - least), MASSLESS)
            width = tl.where(width > 0.0, width, MASSLESS)
            highest, lowest = top, tl.maximum(top - width, floor)
            guess = top
        else:
            share = tl.load(numbers + row * 8 + TOP_P).to(tl.float64, bitcast=True).to(tl.float32)
            end = tl.maximum(floor, top - MASSLESS)
            lowest, highest, guess, total, _ = _narrow(before, row, parts, top, end, share, 0, PARTS)
            highest = tl.minimum(highest, top)
        line = logits + row.to(tl.int64) * stride
        lane = tl.arange(0, TILE)
        none = tl.zeros((TILE // 8,), tl.float32)
        s0, s1, s2, s3, s4, s5, s6, s7, s8 = none, none, none, none, none, none, none, none, none
        reach = tl.maximum(floor, top - MASSLESS) if ROUND == 0 else lowest
        for start in range(part * TILES * TILE, tl.minimum((part + 1) * TILES * TILE, vocab), TILE):
            if _tile_peak(peaks, row, start, N, TILE, BLOCK) >= reach:
                x = tl.load(line + start + lane, mask=start + lane < vocab, other=float("-inf")).to(tl.float32) * scale
                m = tl.exp2((x - top) * LOG2E)
                s0 = _more(s0, x, m, _pivot(highest, lowest, guess, 0, ROUND), TILE)
                s1 = _more(s1, x, m, _pivot(highest, lowest, guess, 1, ROUND), TILE)
                s2 = _more(s2, x, m, _pivot(highest, lowest, guess, 2, ROUND), TILE)
                s3 = _more(s3, x, m, _pivot(highest, lowest, guess, 3, ROUND), TILE)
                s4 = _more(s4, x, m, _pivot(highest, lowest, guess, 4, ROUND), TILE)
                s5 = _more(s5, x, m, _pivot(highest, lowest, guess, 5, ROUND), TILE)
                s6 = _more(s6, x, m, _pivot(highest, lowest, guess, 6, ROUND), TILE)
                s7 = _more(s7, x, m, lowest, TILE)
                s8 = _more(s8, x, m, floor, TILE) if ROUND == 0 else _more(s8, x, 1.0, lowest, TILE)
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
        tl.store(mine + GUESS, guess)
    release(PDL)


@partial(Kernel, fused=False)
def gather(
    logits, tops, floats, numbers, peaks, sums, masses, counts, lists, STRIDE, VOCAB, TILES,
    UNIT: tl.constexpr, L: tl.constexpr,
    PARTS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (P, S). masses: int64 (S, P, 2), of all tokens that pass min_p and of those above the bracket. counts: int32
    (S,), zeros before. lists: int64 (S, L), draws in no order."""
    wait(PDL)
    part, row, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    stride, vocab = STRIDE * UNIT, VOCAB * UNIT
    N = tl.cdiv(vocab, BLOCK)
    top = _INF  # then all of it is the nucleus
    if tl.load(numbers + row * 8 + TODO) == NUCLEUS:
        top = row_top(tops, row, parts, PARTS)
    if tl.abs(top) < _INF:
        heat = tl.load(floats + row * 8 + HEAT)
        floor = row_floor(floats + row * 8, top)
        reach = tl.maximum(floor, top - MASSLESS)
        share = tl.load(numbers + row * 8 + TOP_P).to(tl.float64, bitcast=True).to(tl.float32)
        below, above, _, _, count = _narrow(sums, row, parts, top, reach, share, 1, PARTS)
        above = tl.where(count <= L // 2, _INF, above)  # few: all of them
        if part == 0:
            tl.store(floats + row * 8 + WHOLE, tl.where(above == _INF, 1.0, 0.0))
            tl.store(floats + row * 8 + BOUND, below)
        line = logits + row.to(tl.int64) * stride
        lane = tl.arange(0, TILE)
        all_mass = tl.zeros((TILE // 8,), tl.int64)
        mass_above = tl.zeros((TILE // 8,), tl.int64)
        for start in range(part * TILES * TILE, tl.minimum((part + 1) * TILES * TILE, vocab), TILE):
            peak = _tile_peak(peaks, row, start, N, TILE, BLOCK)
            if peak >= reach:
                at = start + lane
                x = scaled(line, at, vocab, heat)
                m = tl.where(x >= floor, mass(x, top), 0)
                all_mass += tl.sum(tl.reshape(m, (TILE // 8, 8)), 1)
                if peak > above:
                    mass_above += tl.sum(tl.reshape(tl.where(x > above, m, 0), (TILE // 8, 8)), 1)
                if peak >= below:
                    take = ((x >= below) & (x <= above)).to(tl.int32)
                    found = tl.sum(take, 0)
                    if found > 0:
                        to = tl.atomic_add(counts + row, found, sem="relaxed") + tl.cumsum(take, 0) - 1
                        inside = (take == 1) & (to < L)
                        tl.store(lists + row.to(tl.int64) * L + to, pack(x, at), mask=inside)
        tl.store(masses + (row * parts + part) * 2, tl.sum(all_mass, 0))
        tl.store(masses + (row * parts + part) * 2 + 1, tl.sum(mass_above, 0))
    release(PDL)


@triton.jit
def _limit(total, share):
    return tl.maximum((total.to(tl.float64) * share).to(tl.int64), 1)


@triton.jit
def _from_list(
    draws_of, numbers, count, todo, top, floor, k, share, all_mass, mass_above, whole,
    SIZE: tl.constexpr, WAYS: tl.constexpr,
):  # fmt: skip
    """(threshold, whether it was found, the draw or `LOWEST`) from a row's list of `count` tokens."""
    lane = tl.arange(0, SIZE)
    inside = lane < count
    mine = tl.load(draws_of + lane, mask=inside, other=LOWEST)
    x, token = unpack(mine)
    key = tl.where(inside, (mine >> 32).to(tl.int32), -0x7FFFFFFF)
    first, last = tl.min(tl.where(inside, key, 0x7FFFFFFF), 0).to(tl.int64), tl.max(key, 0).to(tl.int64)
    low, found = floor, 1
    if (todo == KTH) & (count >= k):
        low = tl.maximum(low, unorder(largest_with(key, inside.to(tl.int32), k, first, last, SIZE, WAYS)))
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
                    low = tl.maximum(low, unorder(largest_with(key, m, limit - mass_above, first, last, SIZE, WAYS)))
                else:
                    found = 0
    draw = tl.full((), LOWEST, tl.int64)
    if (found == 1) & (whole == 1.0):
        score = x
        if tl.load(numbers + STILL) == 0:
            words = words_at(token, tl.load(numbers + POSITION), tl.load(numbers + SAMPLE), tl.load(numbers + SEED))
            score += gumbel(words)
        draw = tl.max(tl.where(inside & (x >= low), pack(score, token), LOWEST), 0)
    return low, found, draw


@triton.jit
def _weight_of_row(line, vocab, heat, top, key, WEIGHED: tl.constexpr, TILE: tl.constexpr):
    """(number of tokens with at least this key, or their mass; the least such key; the largest key below): int64."""
    lane = tl.arange(0, TILE)
    weight = tl.zeros((TILE // 8,), tl.int64)
    least = tl.full((TILE,), 0x7FFFFFFF, tl.int32)
    largest = tl.full((TILE,), -0x7FFFFFFF, tl.int32)
    for start in range(0, vocab, TILE):
        x = scaled(line, start + lane, vocab, heat)
        of_x = order(x)
        up = (of_x >= key) & (start + lane < vocab)
        m = tl.where(up, mass(x, top), 0) if WEIGHED else up.to(tl.int64)
        weight += tl.sum(tl.reshape(m, (TILE // 8, 8)), 1)
        least = tl.minimum(least, tl.where(up, of_x, 0x7FFFFFFF))
        largest = tl.maximum(largest, tl.where(up, -0x7FFFFFFF, of_x))
    return tl.sum(weight, 0), tl.min(least, 0).to(tl.int64), tl.max(largest, 0).to(tl.int64)


@triton.jit
def _from_row(line, vocab, heat, top, need, below, above, WEIGHED: tl.constexpr, TILE: tl.constexpr):
    """The largest key that tokens of at least it weigh `need`: between the keys `below`, which do, and `above`."""
    while below < above:
        middle = (below + above + 1) >> 1
        weight, least, largest = _weight_of_row(line, vocab, heat, top, middle.to(tl.int32), WEIGHED, TILE)
        if weight >= need:
            below = tl.minimum(least, above)
        else:
            above = tl.maximum(largest, below)
    return unorder(below.to(tl.int32))


@partial(Kernel, fused=False)
def settle(
    logits, tops, floats, numbers, masses, counts, lists, draws, STRIDE, VOCAB, P,
    UNIT: tl.constexpr, L: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (S,). Writes each row's threshold, and its draw if the list is enough for that."""
    wait(PDL)
    row = tl.program_id(0)
    stride, vocab = STRIDE * UNIT, VOCAB * UNIT
    floats += row * 8
    numbers += row * 8
    todo = tl.load(numbers + TODO)
    if (todo == KTH) | (todo == NUCLEUS):
        top = row_top(tops, row, P, PARTS)
        floor = row_floor(floats, top)
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
            if todo == KTH:  # its list has all there is; nobody weighed the row
                all_mass *= 0
                mass_above *= 0
            draws_of = lists + row.to(tl.int64) * L
            if count <= _SMALL:
                low, found, draw = _from_list(
                    draws_of, numbers, count, todo, top, floor, k, share, all_mass, mass_above, whole, _SMALL, 4
                )
            elif count <= L:
                low, found, draw = _from_list(
                    draws_of, numbers, count, todo, top, floor, k, share, all_mass, mass_above, whole, L, 1
                )
            else:
                found = 0
            if found == 0:
                line, heat = logits + row.to(tl.int64) * stride, tl.load(floats + HEAT)
                begin, end = order(tl.load(floats + BOUND)).to(tl.int64), order(top).to(tl.int64)
                low, total = floor, tl.where(todo == KTH, 0, all_mass)
                if todo == KTH:
                    if count >= k:
                        low = tl.maximum(low, _from_row(line, vocab, heat, top, k, begin, end, False, TILE))
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
    logits, tops, floats, numbers, peaks, draws, STRIDE, VOCAB, TILES,
    UNIT: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (P, S). The draws of parts of the rows that have none yet."""
    wait(PDL)
    part, row = tl.program_id(0), tl.program_id(1)
    stride, vocab = STRIDE * UNIT, VOCAB * UNIT
    N = tl.cdiv(vocab, BLOCK)
    numbers += row * 8
    todo = tl.load(numbers + TODO)
    if todo != DONE:
        low, heat = tl.load(floats + row * 8 + LOW), tl.load(floats + row * 8 + HEAT)
        if todo == FLOOR:
            low = row_floor(floats + row * 8, row_top(tops, row, tl.num_programs(0), PARTS))
        seed, sample, position = tl.load(numbers + SEED), tl.load(numbers + SAMPLE), tl.load(numbers + POSITION)
        still = (tl.load(numbers + STILL) != 0).to(tl.int32)
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
                if tl.max(alive.to(tl.int32) & (may_reach(x, 1.0, words, score) | still), 0) > 0:
                    noise = tl.where(still == 1, 0.0, gumbel(words))
                    draw = tl.maximum(draw, tl.max(tl.where(alive, pack(x + noise, at), LOWEST), 0))
                    score, _ = unpack(draw)
        tl.store(draws + row * tl.num_programs(0) + part, draw)
    release(PDL)
