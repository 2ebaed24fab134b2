# pyright: reportAssignmentType=false, reportOperatorIssue=false
"""Attention of rows of few tokens over pages: the work is cut over the keys, all query heads of a KV head together.

Owns: the kernel that computes the items of `attention_work.split_items`, and the order in which a row's segments are
folded.
Shape legend: M rows of a tile (tokens x G query heads, filled up), E head size, B tokens of a block, K KV heads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire.ops.triton.attention_shared import MEMBERS
from quire.ops.triton.attention_work import ITEM
from quire.ops.triton.launch import Kernel, release, wait

_ITEM, _MEMBERS = tl.constexpr(ITEM), tl.constexpr(MEMBERS)
_THREADS = tl.constexpr(128)  # of a program: 4 warps
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def bent(s, i, j, slope, scale, softcap, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr):
    """Products to exponents of two where a softcap or slopes bend them; queries at positions i (M,), keys at j (N,).
    `scale` comes divided by the softcap where there is one, else multiplied by log2(e); `softcap` multiplied by it."""
    s = s * scale
    if SOFTCAP:
        s = softcap - softcap * 2.0 / (tl.exp2(s * (2.0 * _LOG2E)) + 1.0)
    if ALIBI:
        s += (slope * _LOG2E)[:, None] * (j[None, :] - i[:, None]).to(tl.float32)
    return s


@triton.jit
def weigh(s, m, factor):
    """Weights of the keys of a tile, the maximum so far, and what its change makes of the sums so far. Exponents of two
    are s * factor; what is not seen is -inf. The product is fused wherever this is compiled: all tiles round alike."""
    top = tl.maximum(m, tl.max(s, 1) * factor)
    zero = tl.where(top == float("-inf"), 0.0, top)
    return tl.exp2(tl.fma(s, factor, -zero[:, None])), top, tl.exp2(m - zero)


@triton.jit
def fold(m, norm, acc, m_new, norm_new, acc_new):
    """Two partial results as one, in this order. Written with explicit fused products: it must round alike wherever it
    is compiled. An empty one (-inf, 0, 0) changes nothing."""
    top = tl.maximum(m, m_new)
    zero = tl.where(top == float("-inf"), 0.0, top)
    a, b = tl.exp2(m - zero), tl.exp2(m_new - zero)
    return top, tl.fma(norm, a, norm_new * b), tl.fma(acc, a[:, None], acc_new * b[:, None])


@triton.jit
def pages_of(pages_ptr, j, first, last, B: tl.constexpr):
    """The pages of keys j: asked for a tile ahead, so that no tile waits for them."""
    return tl.load(pages_ptr + j // B, mask=(j >= first) & (j < last), other=0)


@triton.jit
def _leave(
    parts_ptr, tops_ptr, place, own, m, norm, acc,
    M: tl.constexpr, ROWS: tl.constexpr, SHARED: tl.constexpr, G: tl.constexpr, K: tl.constexpr, EP: tl.constexpr,
    SHARING: tl.constexpr,
):  # fmt: skip
    """Leaves a partial result for who finishes the row: for each row of the tile at `place`, or where no packs are at
    `place` of the first. Then the first ROWS rows alone can be of use: the others are added as zeros, which takes less
    shared memory on the way than a tile that is mostly filling."""
    rows = tl.arange(0, M)
    spot = place if SHARING else place + rows // G * K
    tl.store(tops_ptr + spot * (2 * G) + rows % G, m, mask=own)
    tl.store(tops_ptr + spot * (2 * G) + G + rows % G, norm, mask=own)
    e = tl.arange(0, EP)
    if SHARING or ROWS == M:
        tl.store(parts_ptr + (spot * G + rows % G)[:, None] * EP + e[None, :], acc, mask=own[:, None])
    else:
        acc = tl.sum(tl.reshape(tl.where(own[:, None], acc, 0.0), (M // ROWS, ROWS, EP)), 0)
        rows = tl.arange(0, ROWS)
        spot = place + rows // G * K
        tl.store(parts_ptr + (spot * G + rows % G)[:, None] * EP + e[None, :], acc, mask=(rows < SHARED)[:, None])


@Kernel
def split_attention(
    q_ptr, kv_ptr, table_ptr, slopes_ptr, out_ptr, items_ptr, arrived_ptr, slots_ptr, parts_ptr, tops_ptr,
    TABLE, WINDOW, PAGES, RANGES, PACKED, q_token: tl.constexpr, q_head: tl.constexpr, scale: tl.constexpr,
    softcap: tl.constexpr, H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, B: tl.constexpr,
    EXACT: tl.constexpr, WIDE: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    SHARING: tl.constexpr, BQ: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    MOST: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program for each range and KV head. With SHARING a tile of queries may be one token of each row of a pack.

    `parts_ptr` float32 (slots, K, G, EP) and `tops_ptr` (slots, K, 2, G): weighted sums, and maxima (of powers of two)
    and sums of weights, of the segments of rows that several programs share; a row of up to BQ tokens has a slot for
    each. Who arrives last at such a row folds them in order, and leaves the counter at zero for the next layer.
    """
    release(PDL)
    wait(PDL)
    G: tl.constexpr = H // K
    SHARED: tl.constexpr = BQ * G
    value_offset = PAGES.to(tl.int64) * (B * K * E)
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    kind = tl.float32 if EXACT else kv_ptr.dtype.element_ty
    rows = tl.arange(0, M)
    e = tl.arange(0, EP)
    lane = tl.arange(0, TILE)
    mine = tl.program_id(0) // K
    head = tl.program_id(0) % K
    index = mine
    more = True
    while more:
        item_ptr = items_ptr + index * _ITEM
        row = tl.load(item_ptr).to(tl.int64)
        token = tl.load(item_ptr + 1).to(tl.int64)
        position = tl.load(item_ptr + 2)
        count = tl.load(item_ptr + 3)
        start = tl.load(item_ptr + 4)
        stop = tl.load(item_ptr + 5)
        slot = tl.load(item_ptr + 6)
        run = tl.load(item_ptr + 7)
        slot_0 = tl.load(item_ptr + 8)
        slots = tl.load(item_ptr + 9)
        runs = tl.load(item_ptr + 10)
        segment = tl.load(item_ptr + 11)
        index = RANGES + tl.load(item_ptr + 12) + 1

        own = rows < count * G
        h = head * G + rows % G
        at = position + rows // G
        token_m = token + rows // G
        place = slot.to(tl.int64) * K + head
        step = K
        if SHARING:
            packed = tl.load(item_ptr + 14) > 0
            step = tl.load(item_ptr + 15) * K
            theirs = own & packed
            token_m = tl.where(packed, tl.load(item_ptr + 16 + rows // G, mask=theirs, other=0), token_m)
            member = tl.load(item_ptr + 16 + _MEMBERS + rows // G, mask=theirs, other=0)
            spot = tl.where(packed, PACKED + member * MOST, rows // G)
            place = (slot + spot).to(tl.int64) * K + head
            at = tl.where(packed, 1 << 30, at)
        elif BQ > 1:
            step = BQ * K
        q_at = token_m * q_token + h * q_head
        there = own[:, None] if E == EP else own[:, None] & (e < E)[None, :]
        q = tl.load(q_ptr + q_at[:, None] + e[None, :], mask=there, other=0.0).to(kind)
        slope = tl.load(slopes_ptr + h, mask=own, other=0.0).to(tl.float32) if ALIBI else 0.0

        m = tl.full((M,), float("-inf"), tl.float32)
        norm = tl.zeros((M,), tl.float32)
        acc = tl.zeros((M, EP), tl.float32)
        m_all, norm_all, acc_all = m, norm, acc
        left = segment
        pages_ptr = table_ptr + row * TABLE
        last = position + count
        if SHARING:
            last = position + tl.where(packed, 1, count)
        first = tl.maximum(position + 1 - WINDOW, 0) if WINDOWED else 0
        page = pages_of(pages_ptr, start * TILE + lane, first, last, B)
        for t in tl.range(start, stop, num_stages=STAGES):
            j = t * TILE + lane
            live = (j >= first) & (j < last)
            where = page.to(tl.int64) if WIDE else page
            where = where * (B * K * E) + ((j % B) * (K * E) + head * E)
            page = pages_of(pages_ptr, j + TILE, first, last, B)
            readable = live[:, None] if E == EP else live[:, None] & (e < E)[None, :]
            k = tl.load(kv_ptr + (where[:, None] + e[None, :]), mask=readable, other=0.0).to(kind)
            v = tl.load(kv_ptr + value_offset + (where[:, None] + e[None, :]), mask=readable, other=0.0).to(kind)
            s = tl.dot(q, k.T, input_precision=precision)
            if SOFTCAP or ALIBI:
                s = bent(s, at, j, slope, scale, softcap, SOFTCAP, ALIBI)
            seen = live[None, :]
            if BQ > 1:
                seen &= j[None, :] <= at[:, None]
                if WINDOWED:
                    seen &= j[None, :] > at[:, None] - WINDOW
            p, m, shrink = weigh(tl.where(seen, s, float("-inf")), m, 1.0 if SOFTCAP or ALIBI else scale)
            norm = tl.fma(norm, shrink, tl.sum(p, 1))
            acc = tl.dot(p.to(kind), v, acc * shrink[:, None], input_precision=precision)
            left -= 1
            if (left == 0) | (t == stop - 1):
                if run == 0:
                    m_all, norm_all, acc_all = fold(m_all, norm_all, acc_all, m, norm, acc)
                else:
                    _leave(parts_ptr, tops_ptr, place, own, m, norm, acc, M, ROWS, SHARED, G, K, EP, SHARING)
                    place += step
                m = tl.full((M,), float("-inf"), tl.float32)
                norm = tl.zeros((M,), tl.float32)
                acc = tl.zeros((M, EP), tl.float32)
                left = segment
        more = tl.load(items_ptr + index * _ITEM + 13) == mine

        if slot < 0:
            out = acc_all / tl.where(norm_all == 0.0, 1.0, norm_all)[:, None]
            out_at = token_m * (H * E) + h * E
            tl.store(
                out_ptr + out_at[:, None] + e[None, :],
                out.to(out_ptr.dtype.element_ty),
                mask=own[:, None] & (e < E)[None, :],
            )
        else:
            if run == 0:
                _leave(
                    parts_ptr, tops_ptr, place, own, m_all, norm_all, acc_all, M, ROWS, SHARED, G, K, EP, SHARING
                )  # fmt: skip
            tl.debug_barrier()
            if SHARING:
                _arrive(
                    out_ptr, parts_ptr, tops_ptr, item_ptr, arrived_ptr, slots_ptr, packed, row.to(tl.int32), token,
                    count, slot_0, slots, runs, step, head, H, K, E, EP, M, ROWS,
                )  # fmt: skip
            else:
                counter_ptr = arrived_ptr + row * K + head
                if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == runs - 1:
                    tl.store(counter_ptr, 0)
                    i = tl.arange(0, ROWS)
                    _finish(
                        out_ptr, parts_ptr, tops_ptr, slot_0 + i // G, tl.where(i < count * G, slots, 0), slots, step,
                        head, token + i // G, H, K, E, EP, ROWS, 8,
                    )  # fmt: skip


@triton.jit
def _arrive(
    out_ptr, parts_ptr, tops_ptr, item_ptr, arrived_ptr, slots_ptr, packed, row, token, count, slot, slots, runs, step,
    head, H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Counts a run for its row, or for all rows of its pack, and finishes those that it was the last for."""
    G: tl.constexpr = H // K
    t = tl.arange(0, _THREADS)  # one row each
    several = tl.where(packed, count, 1)
    theirs = (t < several) & packed
    row_t = tl.where(packed, tl.load(item_ptr + 16 + _MEMBERS + t, mask=theirs, other=0), row)
    runs_t = tl.where(packed, tl.load(slots_ptr + row_t * 4 + 2, mask=theirs, other=0), runs)
    counter_ptr = arrived_ptr + row_t * K + head
    done = (t < several) & (tl.atomic_add(counter_ptr, 1, mask=t < several, sem="acq_rel") == runs_t - 1)
    tl.store(counter_ptr, tl.zeros((_THREADS,), tl.int32), mask=done)
    bits = tl.sum(tl.where(done, 1 << (t % _MEMBERS), 0))
    if bits != 0:
        if packed:
            part = tl.arange(0, M) // G
            last = (part < count) & ((bits >> part) % 2 == 1)
            member = tl.load(item_ptr + 16 + _MEMBERS + part, mask=last, other=0)
            token_m = tl.load(item_ptr + 16 + part, mask=last, other=0)
            slot_m = tl.load(slots_ptr + member * 4, mask=last, other=0)
            slots_m = tl.load(slots_ptr + member * 4 + 1, mask=last, other=0)
            _finish(
                out_ptr, parts_ptr, tops_ptr, slot_m, slots_m, tl.max(slots_m), step, head, token_m.to(tl.int64),
                H, K, E, EP, M, 4,
            )  # fmt: skip
        else:
            i = tl.arange(0, ROWS)
            _finish(
                out_ptr, parts_ptr, tops_ptr, slot + i // G, tl.where(i < count * G, slots, 0), slots, step, head,
                token + i // G, H, K, E, EP, ROWS, 8,
            )  # fmt: skip


@triton.jit
def _finish(
    out_ptr, parts_ptr, tops_ptr, slot, slots, most, step, head, token,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, ROWS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Folds the `slots` partial results of each row (0: not this one) in order, from `slot` on. Some are asked for at
    once; other programs wrote them, so past the first cache."""
    G: tl.constexpr = H // K
    rows = tl.arange(0, ROWS)
    e = tl.arange(0, EP)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    norm = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, EP), tl.float32)
    for x in range(0, most, AT_ONCE):
        tops, totals, sums = (), (), ()
        for y in tl.static_range(AT_ONCE):
            there = x + y < slots
            place = slot.to(tl.int64) * K + (x + y) * step + head
            top_ptr = tops_ptr + place * (2 * G) + rows % G
            part_ptr = parts_ptr + (place * G + rows % G)[:, None] * EP + e[None, :]
            tops += (tl.load(top_ptr, mask=there, other=float("-inf"), cache_modifier=".cg"),)
            totals += (tl.load(top_ptr + G, mask=there, other=0.0, cache_modifier=".cg"),)
            sums += (tl.load(part_ptr, mask=there[:, None], other=0.0, cache_modifier=".cg"),)
        for y in tl.static_range(AT_ONCE):
            m, norm, acc = fold(m, norm, acc, tops[y], totals[y], sums[y])
    out = acc / tl.where(norm == 0.0, 1.0, norm)[:, None]
    out_at = token * (H * E) + (head * G + rows % G) * E
    tl.store(
        out_ptr + out_at[:, None] + e[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=(slots > 0)[:, None] & (e < E)[None, :],
    )
