"""Attention of rows of few tokens over pages: the work is cut over the keys, all query heads of a KV head together.

Owns: the kernel that computes the items of `attention_work.split_items`, and the order in which a row's segments are
folded. Shape legend: M rows of a tile (tokens x G query heads, filled up), E head size, B tokens of a block, K KV heads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire.ops.triton.attention_work import ITEM

_ITEM = tl.constexpr(ITEM)
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
def fold(m, l, acc, m_new, l_new, acc_new):
    """Two partial results as one, in this order. Written with explicit fused products: it must round alike wherever it
    is compiled. An empty one (-inf, 0, 0) changes nothing."""
    top = tl.maximum(m, m_new)
    zero = tl.where(top == float("-inf"), 0.0, top)
    a, b = tl.exp2(m - zero), tl.exp2(m_new - zero)
    return top, tl.fma(l, a, l_new * b), tl.fma(acc, a[:, None], acc_new * b[:, None])


@triton.jit
def pages_of(pages_ptr, j, first, last, B: tl.constexpr):
    """The pages of keys j: asked for a tile ahead, so that no tile waits for them."""
    return tl.load(pages_ptr + j // B, mask=(j >= first) & (j < last), other=0)


@triton.jit(do_not_specialize=["table_stride", "window"])
def split_attention(
    q_ptr, kv_ptr, table_ptr, slopes_ptr, out_ptr, items_ptr, head_ptr, arrived_ptr, parts_ptr, tops_ptr,
    value_offset, q_token_stride, q_head_stride, table_stride, scale, softcap, window,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, B: tl.constexpr, BQ: tl.constexpr,
    M: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, EXACT: tl.constexpr,
    WIDE: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A fixed number of programs takes the items in turns, KV head by KV head.

    `parts_ptr` float32 (slots, K, BQ*G, EP) and `tops_ptr` (slots, K, 2, BQ*G): sums and, in powers of two, maxima of
    the segments of rows that several programs share. Who arrives last at such a row folds them in order, and leaves the
    counter at zero for the next layer.
    """
    G: tl.constexpr = H // K
    SHARED: tl.constexpr = BQ * G
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    kind = tl.float32 if EXACT else kv_ptr.dtype.element_ty
    rows = tl.arange(0, M)
    e = tl.arange(0, EP)
    lane = tl.arange(0, TILE)
    total = tl.load(head_ptr) * K
    for i in range(tl.program_id(0), total, tl.num_programs(0)):
        head = i % K
        item_ptr = items_ptr + (i // K) * _ITEM
        row = tl.load(item_ptr).to(tl.int64)
        token = tl.load(item_ptr + 1).to(tl.int64)
        position = tl.load(item_ptr + 2)
        count = tl.load(item_ptr + 3)
        start = tl.load(item_ptr + 4)
        stop = tl.load(item_ptr + 5)
        slot = tl.load(item_ptr + 6)
        part = tl.load(item_ptr + 7)
        segments = tl.load(item_ptr + 8)
        segment = tl.load(item_ptr + 9)

        own = rows < count * G
        h = head * G + rows % G
        q_at = (token + rows // G) * q_token_stride + h * q_head_stride
        there = own[:, None] if E == EP else own[:, None] & (e < E)[None, :]
        q = tl.load(q_ptr + q_at[:, None] + e[None, :], mask=there, other=0.0).to(kind)
        at = position + rows // G
        slope = tl.load(slopes_ptr + h, mask=own, other=0.0).to(tl.float32) if ALIBI else 0.0

        m = tl.full((M,), float("-inf"), tl.float32)
        l = tl.zeros((M,), tl.float32)
        acc = tl.zeros((M, EP), tl.float32)
        m_all, l_all, acc_all = m, l, acc
        left = segment
        pages_ptr = table_ptr + row * table_stride
        last = position + count
        first = tl.maximum(position + 1 - window, 0) if WINDOWED else 0
        page = pages_of(pages_ptr, start * TILE + lane, first, last, B)
        for t in tl.range(start, stop, num_stages=STAGES):
            j = t * TILE + lane
            live = (j >= first) & (j < last)
            place = page.to(tl.int64) if WIDE else page
            place = place * (B * K * E) + ((j % B) * (K * E) + head * E)
            page = pages_of(pages_ptr, j + TILE, first, last, B)
            readable = live[:, None] if E == EP else live[:, None] & (e < E)[None, :]
            k = tl.load(kv_ptr + (place[:, None] + e[None, :]), mask=readable, other=0.0).to(kind)
            v = tl.load(kv_ptr + value_offset + (place[:, None] + e[None, :]), mask=readable, other=0.0).to(kind)
            s = tl.dot(q, k.T, input_precision=precision)
            if SOFTCAP or ALIBI:
                s = bent(s, at, j, slope, scale, softcap, SOFTCAP, ALIBI)
            seen = live[None, :]
            if BQ > 1:
                seen &= j[None, :] <= at[:, None]
                if WINDOWED:
                    seen &= j[None, :] > at[:, None] - window
            p, m, shrink = weigh(tl.where(seen, s, float("-inf")), m, 1.0 if SOFTCAP or ALIBI else scale)
            l = l * shrink + tl.sum(p, 1)
            acc = tl.dot(p.to(kind), v, acc * shrink[:, None], input_precision=precision)
            left -= 1
            if left == 0:
                m_all, l_all, acc_all = fold(m_all, l_all, acc_all, m, l, acc)
                m = tl.full((M,), float("-inf"), tl.float32)
                l = tl.zeros((M,), tl.float32)
                acc = tl.zeros((M, EP), tl.float32)
                left = segment
        m_all, l_all, acc_all = fold(m_all, l_all, acc_all, m, l, acc)

        if slot < 0:
            out = acc_all / tl.where(l_all == 0.0, 1.0, l_all)[:, None]
            out_at = (token + rows // G) * (H * E) + h * E
            tl.store(
                out_ptr + out_at[:, None] + e[None, :],
                out.to(out_ptr.dtype.element_ty),
                mask=own[:, None] & (e < E)[None, :],
            )
        else:
            mine = ((slot + part) * K + head).to(tl.int64)
            tl.store(parts_ptr + (mine * SHARED + rows)[:, None] * EP + e[None, :], acc_all, mask=own[:, None])
            tl.store(tops_ptr + mine * (2 * SHARED) + rows, m_all, mask=own)
            tl.store(tops_ptr + mine * (2 * SHARED) + SHARED + rows, l_all, mask=own)
            tl.debug_barrier()
            counter_ptr = arrived_ptr + slot * K + head
            if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == segments - 1:
                tl.store(counter_ptr, 0)
                _finish(
                    out_ptr, parts_ptr, tops_ptr, slot, segments, head, token, count * G,
                    H, K, E, EP, SHARED, ROWS,
                )  # fmt: skip


@triton.jit
def _finish(
    out_ptr, parts_ptr, tops_ptr, slot, segments, head, token, count,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, SHARED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Folds a row's segments in order; four are asked for at once."""
    G: tl.constexpr = H // K
    rows = tl.arange(0, ROWS)
    e = tl.arange(0, EP)
    own = rows < count
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    l = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, EP), tl.float32)
    for x in range(0, segments, 4):
        m_0, l_0, acc_0 = _part(parts_ptr, tops_ptr, slot, x, segments, head, own, rows, e, K, SHARED, EP)
        m_1, l_1, acc_1 = _part(parts_ptr, tops_ptr, slot, x + 1, segments, head, own, rows, e, K, SHARED, EP)
        m_2, l_2, acc_2 = _part(parts_ptr, tops_ptr, slot, x + 2, segments, head, own, rows, e, K, SHARED, EP)
        m_3, l_3, acc_3 = _part(parts_ptr, tops_ptr, slot, x + 3, segments, head, own, rows, e, K, SHARED, EP)
        m, l, acc = fold(m, l, acc, m_0, l_0, acc_0)
        m, l, acc = fold(m, l, acc, m_1, l_1, acc_1)
        m, l, acc = fold(m, l, acc, m_2, l_2, acc_2)
        m, l, acc = fold(m, l, acc, m_3, l_3, acc_3)
    out = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    out_at = (token + rows // G) * (H * E) + (head * G + rows % G) * E
    tl.store(
        out_ptr + out_at[:, None] + e[None, :], out.to(out_ptr.dtype.element_ty), mask=own[:, None] & (e < E)[None, :]
    )


@triton.jit
def _part(
    parts_ptr, tops_ptr, slot, part, parts, head, mine, rows, e, K: tl.constexpr, SHARED: tl.constexpr, EP: tl.constexpr
):
    """A segment's partial result; an empty one where there is none. Other programs wrote it: past the first cache."""
    there = mine & (part < parts)
    place = ((slot + part) * K + head).to(tl.int64)
    top_ptr = tops_ptr + place * (2 * SHARED) + rows
    m = tl.load(top_ptr, mask=there, other=float("-inf"), cache_modifier=".cg")
    l = tl.load(top_ptr + SHARED, mask=there, other=0.0, cache_modifier=".cg")
    part_ptr = parts_ptr + (place * SHARED + rows)[:, None] * EP + e[None, :]
    return m, l, tl.load(part_ptr, mask=there[:, None], other=0.0, cache_modifier=".cg")
