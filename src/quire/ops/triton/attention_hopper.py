"""Attention of rows of many tokens on Hopper, written for its matrix units: what `attention_tiles.py` computes, by hand.

Owns: the schedule. While the matrix units work on a tile's sums and the next tile's products, the weights of the next
tile are computed; keys and values are copied two tiles ahead. Triton's own pipeline does one after the other. For 16-bit
floats without softcap and slopes; GPUs only, so the interpreter cannot run it.
Shape legend: M rows of a tile (tokens x G query heads, filled up), N keys of a tile, E head size, B tokens of a block.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from quire.ops.triton.attention_work import ITEM

_ITEM = gl.constexpr(ITEM)


@gluon.jit
def _pages(pages_ptr, j, first, last, B: gl.constexpr):
    return gl.load(pages_ptr + j // B, mask=(j >= first) & (j < last), other=0)


@gluon.jit
def _copy(
    to, ptr, page, j, e, first, last, K: gl.constexpr, E: gl.constexpr, B: gl.constexpr, WIDE: gl.constexpr
):  # fmt: skip
    """Asks for the keys or values j (N,); zeros where there are none."""
    place = page.to(gl.int64) if WIDE else page
    place = place * (B * K * E) + (j % B) * (K * E)
    live = (j >= first) & (j < last)
    async_copy.async_copy_global_to_shared(to, ptr + (place[:, None] + e[None, :]), mask=live[:, None])


@gluon.jit(do_not_specialize=["table_stride", "window"])
def tile_attention_hopper(
    q_ptr, kv_ptr, table_ptr, slopes_ptr, out_ptr, items_ptr, head_ptr,
    value_offset, q_token_stride, q_head_stride, table_stride, scale, softcap, window,
    H: gl.constexpr, K: gl.constexpr, E: gl.constexpr, B: gl.constexpr, M: gl.constexpr, N: gl.constexpr,
    WIDE: gl.constexpr, WINDOWED: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """As `tile_attention`, of which it takes the arguments."""
    G: gl.constexpr = H // K
    kind: gl.constexpr = q_ptr.dtype.element_ty
    ACROSS: gl.constexpr = E // 8
    loads: gl.constexpr = gl.BlockedLayout([1, 8], [32 // ACROSS, ACROSS], [WARPS, 1], [1, 0])
    products: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, N, 16])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, E, 16])
    weights: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)

    q_s = gl.allocate_shared_memory(kind, [M, E], shared)
    k_s = gl.allocate_shared_memory(kind, [2, N, E], shared)
    v_s = gl.allocate_shared_memory(kind, [2, N, E], shared)
    rows = gl.arange(0, M, gl.SliceLayout(1, loads))
    e = gl.arange(0, E, gl.SliceLayout(0, loads))
    lane = gl.arange(0, N, gl.SliceLayout(1, loads))
    key = gl.arange(0, N, gl.SliceLayout(0, products))
    query = gl.arange(0, M, gl.SliceLayout(1, products)) // G

    total = gl.load(head_ptr) * K
    for i in range(gl.program_id(0), total, gl.num_programs(0)):
        head = i % K
        item_ptr = items_ptr + (i // K) * _ITEM
        row = gl.load(item_ptr).to(gl.int64)
        token = gl.load(item_ptr + 1).to(gl.int64)
        position = gl.load(item_ptr + 2)
        count = gl.load(item_ptr + 3)
        own = rows < count * G
        h = head * G + rows % G
        q_at = (token + rows // G) * q_token_stride + h * q_head_stride
        q = gl.load(q_ptr + q_at[:, None] + e[None, :], mask=own[:, None], other=0.0)

        pages_ptr = table_ptr + row * table_stride
        keys_ptr = kv_ptr + head * E
        values_ptr = keys_ptr + value_offset
        last = position + count
        middle = (position + 1) // N
        first = 0
        seen_by_all = 0  # the first tile of keys that are within every query's window
        if WINDOWED:
            first = gl.maximum(position + 1 - window, 0)
            seen_by_all = (gl.maximum(last - window, 0) + N - 1) // N
        start = first // N
        stop = (last + N - 1) // N

        # Copies go in groups: {K0}, {K1, V0}, {K2, V1}, ...
        j = start * N + lane
        page_0 = _pages(pages_ptr, j, first, last, B)
        page_1 = _pages(pages_ptr, j + N, first, last, B)
        page_2 = _pages(pages_ptr, j + 2 * N, first, last, B)
        gl.thread_barrier()
        _copy(k_s.index(0), keys_ptr, page_0, j, e, first, last, K, E, B, WIDE)
        async_copy.commit_group()
        _copy(k_s.index(1), keys_ptr, page_1, j + N, e, first, last, K, E, B, WIDE)
        _copy(v_s.index(0), values_ptr, page_0, j, e, first, last, K, E, B, WIDE)
        async_copy.commit_group()
        q_s.store(q)
        async_copy.wait_group(1)
        fence_async_shared()
        gl.thread_barrier()

        at = position + query
        nothing = gl.zeros([M, N], gl.float32, products)
        s = warpgroup_mma(q_s, k_s.index(0).permute((1, 0)), nothing, use_acc=False)
        gl.thread_barrier()
        _copy(k_s.index(0), keys_ptr, page_2, j + 2 * N, e, first, last, K, E, B, WIDE)
        _copy(v_s.index(1), values_ptr, page_1, j + N, e, first, last, K, E, B, WIDE)
        async_copy.commit_group()
        page_v = page_2
        page_k = _pages(pages_ptr, j + 3 * N, first, last, B)

        if (start >= middle) | (start < seen_by_all):
            seen = (start * N + key)[None, :] <= at[:, None]
            if WINDOWED:
                seen = seen & ((start * N + key)[None, :] > at[:, None] - window)
            s = gl.where(seen, s, float("-inf"))
        m = gl.max(s, 1) * scale
        zero = gl.where(m == float("-inf"), 0.0, m)
        weight = gl.exp2(gl.fma(s, gl.full([M, N], scale, gl.float32, products), -zero[:, None] + nothing))
        norm = gl.sum(weight, 1)
        p = gl.convert_layout(weight.to(kind), weights)
        acc = gl.zeros([M, E], gl.float32, sums)

        for t in range(start, stop):
            turn = (t - start) % 2
            async_copy.wait_group(1)
            fence_async_shared()
            gl.thread_barrier()
            s_new = warpgroup_mma(q_s, k_s.index(1 - turn).permute((1, 0)), nothing, use_acc=False, is_async=True)
            sums_new = warpgroup_mma(p, v_s.index(turn), acc, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s_new])
            if (t + 1 >= middle) | (t + 1 < seen_by_all):
                seen = (t * N + N + key)[None, :] <= at[:, None]
                if WINDOWED:
                    seen = seen & ((t * N + N + key)[None, :] > at[:, None] - window)
                s = gl.where(seen, s, float("-inf"))
            top = gl.maximum(m, gl.max(s, 1) * scale)
            zero = gl.where(top == float("-inf"), 0.0, top)
            weight = gl.exp2(gl.fma(s, gl.full([M, N], scale, gl.float32, products), -zero[:, None] + nothing))
            shrink = gl.exp2(m - zero)
            m = top
            norm = gl.fma(norm, shrink, gl.sum(weight, 1))
            acc, p = warpgroup_mma_wait(0, deps=[sums_new, p])
            gl.thread_barrier()
            j = t * N + lane
            _copy(k_s.index(1 - turn), keys_ptr, page_k, j + 3 * N, e, first, last, K, E, B, WIDE)
            _copy(v_s.index(turn), values_ptr, page_v, j + 2 * N, e, first, last, K, E, B, WIDE)
            async_copy.commit_group()
            page_v = page_k
            page_k = _pages(pages_ptr, j + 4 * N, first, last, B)
            acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, sums))[:, None]
            p = gl.convert_layout(weight.to(kind), weights)
        async_copy.wait_group(0)

        norm = gl.convert_layout(norm, gl.SliceLayout(1, sums))
        out = acc / gl.where(norm == 0.0, 1.0, norm)[:, None]
        out_at = (token + rows // G) * (H * E) + h * E
        out = gl.convert_layout(out.to(out_ptr.dtype.element_ty), loads)
        gl.store(out_ptr + out_at[:, None] + e[None, :], out, mask=own[:, None])
