# pyright: reportAssignmentType=false, reportOperatorIssue=false
"""Attention of rows of many tokens over pages: tiles of queries, all query heads of a KV head together.

Owns: the kernel that computes the items of `attention_work.tile_items`. Unless its keys are cut, a query's result
depends on its row's keys alone, not on the tile that it is in, nor on how the prompt was cut into steps: tiles of keys
start at multiples of N, and what a query does not see changes nothing.
Shape legend: M rows of a tile (tokens x G query heads, filled up), N keys of a tile, E head size, B tokens of a block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire.ops.triton.attention_split import bent, fold, pages_of, weigh
from quire.ops.triton.attention_work import ITEM
from quire.ops.triton.launch import Kernel, release, wait

_ITEM = tl.constexpr(ITEM)


@triton.jit
def _sweep(
    m, norm, acc, q, kv_ptr, pages_ptr, value_offset, head, start, stop, at, slope, first, last, scale, softcap, window,
    K: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, B: tl.constexpr, N: tl.constexpr, EXACT: tl.constexpr,
    WIDE: tl.constexpr, MASKED: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Tiles of keys from `start` to `stop`; masked ones read keys from `first` to `last` only."""
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    kind = q.dtype
    e = tl.arange(0, EP)
    lane = tl.arange(0, N)
    page = pages_of(pages_ptr, start * N + lane, first, last, B)
    for t in tl.range(start, stop, num_stages=STAGES):
        j = t * N + lane
        place = page.to(tl.int64) if WIDE else page
        place = place * (B * K * E) + ((j % B) * (K * E) + head * E)
        page = pages_of(pages_ptr, j + N, first, last, B)
        k_ptr = kv_ptr + (place[:, None] + e[None, :])
        v_ptr = kv_ptr + value_offset + (place[:, None] + e[None, :])
        if not MASKED and E == EP:
            k, v = tl.load(k_ptr).to(kind), tl.load(v_ptr).to(kind)
        else:
            there = ((j >= first) & (j < last))[:, None] & (e < E)[None, :]
            k, v = tl.load(k_ptr, mask=there, other=0.0).to(kind), tl.load(v_ptr, mask=there, other=0.0).to(kind)
        s = tl.dot(q, k.T, input_precision=precision)
        if SOFTCAP or ALIBI:
            s = bent(s, at, j, slope, scale, softcap, SOFTCAP, ALIBI)
        if MASKED:
            seen = j[None, :] <= at[:, None]
            if WINDOWED:
                seen &= j[None, :] > at[:, None] - window
            s = tl.where(seen, s, float("-inf"))
        p, m, shrink = weigh(s, m, 1.0 if SOFTCAP or ALIBI else scale)
        norm = norm * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(kind), v, acc * shrink[:, None], input_precision=precision)
    return m, norm, acc


@Kernel
def tile_attention(
    q_ptr, kv_ptr, table_ptr, slopes_ptr, out_ptr, items_ptr, head_ptr, arrived_ptr, parts_ptr, tops_ptr,
    TABLE, WINDOW, PAGES, q_token: tl.constexpr, q_head: tl.constexpr, scale: tl.constexpr,
    softcap: tl.constexpr, H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, B: tl.constexpr,
    EXACT: tl.constexpr, WIDE: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    CUT: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Each program takes items in turns, KV head by KV head; where there are as many programs as items, one each.
    `scale` must be positive. With CUT an item may be a part of a tile's keys: `parts_ptr` (items, K, M, EP) and
    `tops_ptr` (items, K, 2, M) are as for `attention_split`, and who arrives last folds the parts in order."""
    release(PDL)
    wait(PDL)
    G: tl.constexpr = H // K
    value_offset = PAGES.to(tl.int64) * (B * K * E)
    kind = tl.float32 if EXACT else kv_ptr.dtype.element_ty
    rows = tl.arange(0, M)
    e = tl.arange(0, EP)
    total = tl.load(head_ptr) * K
    for i in range(tl.program_id(0), total, tl.num_programs(0)):
        head = i % K
        item_ptr = items_ptr + (i // K) * _ITEM
        row = tl.load(item_ptr).to(tl.int64)
        token = tl.load(item_ptr + 1).to(tl.int64)
        position = tl.load(item_ptr + 2)
        count = tl.load(item_ptr + 3)
        own = rows < count * G
        h = head * G + rows % G
        there = own[:, None] & (e < E)[None, :]
        q_at = (token + rows // G) * q_token + h * q_head
        q = tl.load(q_ptr + q_at[:, None] + e[None, :], mask=there, other=0.0).to(kind)
        at = position + rows // G
        slope = tl.load(slopes_ptr + h, mask=own, other=0.0).to(tl.float32) if ALIBI else 0.0

        # All queries see the tiles in the middle whole; some see parts of those before (a window) and behind.
        pages_ptr = table_ptr + row * TABLE
        last = position + count
        stop = (last + N - 1) // N
        middle = (position + 1) // N
        if CUT:
            least = tl.load(item_ptr + 4)
            stop = tl.load(item_ptr + 5)
            middle = tl.minimum(middle, stop)
        m = tl.full((M,), float("-inf"), tl.float32)
        norm = tl.zeros((M,), tl.float32)
        acc = tl.zeros((M, EP), tl.float32)
        first = 0
        start = 0
        if WINDOWED:
            first = tl.maximum(position + 1 - WINDOW, 0)
            start = tl.minimum((tl.maximum(last - WINDOW, 0) + N - 1) // N, middle)
            begin = tl.maximum(first // N, least) if CUT else first // N
            m, norm, acc = _sweep(
                m, norm, acc, q, kv_ptr, pages_ptr, value_offset, head, begin, start, at, slope, first, last,
                scale, softcap, WINDOW, K, E, EP, B, N, EXACT, WIDE, True, WINDOWED, SOFTCAP, ALIBI, STAGES,
            )  # fmt: skip
        if CUT:
            start = tl.maximum(start, least)
        m, norm, acc = _sweep(
            m, norm, acc, q, kv_ptr, pages_ptr, value_offset, head, start, middle, at, slope, first, last,
            scale, softcap, WINDOW, K, E, EP, B, N, EXACT, WIDE, False, WINDOWED, SOFTCAP, ALIBI, STAGES,
        )  # fmt: skip
        if CUT:
            middle = tl.maximum(middle, least)
        m, norm, acc = _sweep(
            m, norm, acc, q, kv_ptr, pages_ptr, value_offset, head, middle, stop, at, slope, first, last,
            scale, softcap, WINDOW, K, E, EP, B, N, EXACT, WIDE, True, WINDOWED, SOFTCAP, ALIBI, STAGES,
        )  # fmt: skip

        if CUT:
            parts = tl.load(item_ptr + 7)
            done = parts == 1
            if parts > 1:
                place = (tl.load(item_ptr + 8) + tl.load(item_ptr + 6)).to(tl.int64) * K + head
                tl.store(tops_ptr + place * (2 * M) + rows, m, mask=own)
                tl.store(tops_ptr + place * (2 * M) + M + rows, norm, mask=own)
                tl.store(parts_ptr + place * (M * EP) + rows[:, None] * EP + e[None, :], acc, mask=own[:, None])
                tl.debug_barrier()
                place = tl.load(item_ptr + 8).to(tl.int64) * K + head
                done = tl.atomic_add(arrived_ptr + place, 1, sem="acq_rel") == parts - 1
                if done:
                    tl.store(arrived_ptr + place, 0)
                    m = tl.full((M,), float("-inf"), tl.float32)
                    norm = tl.zeros((M,), tl.float32)
                    acc = tl.zeros((M, EP), tl.float32)
                    for part in range(0, parts):
                        top_ptr = tops_ptr + (place + part * K) * (2 * M) + rows
                        part_ptr = parts_ptr + (place + part * K) * (M * EP) + rows[:, None] * EP + e[None, :]
                        m, norm, acc = fold(
                            m, norm, acc,
                            tl.load(top_ptr, mask=own, other=float("-inf"), cache_modifier=".cg"),
                            tl.load(top_ptr + M, mask=own, other=0.0, cache_modifier=".cg"),
                            tl.load(part_ptr, mask=own[:, None], other=0.0, cache_modifier=".cg"),
                        )  # fmt: skip
            there &= done
        out = acc / tl.where(norm == 0.0, 1.0, norm)[:, None]
        out_at = (token + rows // G) * (H * E) + h * E
        tl.store(out_ptr + out_at[:, None] + e[None, :], out.to(out_ptr.dtype.element_ty), mask=there)
