"""Attention of rows of many tokens on Hopper, for its matrix units: what `attention_tiles.py` computes, by hand.

Owns: the schedule. While the matrix units work on a tile's sums and the next tile's products, the weights of the next
tile are computed; keys and values are copied two tiles ahead. Triton's own pipeline does one after the other. For
16-bit floats without softcap and slopes; GPUs only: the interpreter cannot run it.
Shape legend: M rows of a tile (tokens x G query heads, filled up), N keys of a tile, E head size, B tokens of a block.
"""

from __future__ import annotations

from collections.abc import Callable

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quire.ops.triton.attention_work import ITEM
from quire.ops.triton.launch import Kernel

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


def _kernel(function: Callable[..., None]) -> Kernel:
    return Kernel(function, jit=gluon.jit)


@gluon.jit
def _seen(s, t, at, key, WINDOW, N: gl.constexpr, WINDOWED: gl.constexpr):
    j = (t * N + key)[None, :]
    seen = j <= at[:, None]
    if WINDOWED:
        seen = seen & (j > at[:, None] - WINDOW)
    return gl.where(seen, s, float("-inf"))


@gluon.jit
def _weigh(s, m, scale: gl.constexpr):
    """Weights of the keys of a tile, the maximum so far, and what its change makes of the sums so far."""
    top = gl.maximum(m, gl.max(s, 1) * scale)
    zero = gl.where(top == float("-inf"), 0.0, top)
    factor = gl.full(s.shape, scale, gl.float32, s.type.layout)
    return gl.exp2(gl.fma(s, factor, gl.zeros_like(s) - zero[:, None])), top, gl.exp2(m - zero)


@gluon.jit
def _sweep(
    m, norm, acc, p, page_v, page_k, nothing, order_s, q_s, k_s, v_s, keys_ptr, values_ptr, pages_ptr, start, begin, stop, at, key,
    lane, e,
    first, last, WINDOW, scale: gl.constexpr, K: gl.constexpr, E: gl.constexpr, B: gl.constexpr, N: gl.constexpr,
    WIDE: gl.constexpr, WINDOWED: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Tiles `begin` to `stop` of the sums, and the products of the tiles after them, which are masked or not."""
    kind: gl.constexpr = k_s.dtype
    for t in range(begin, stop):
        turn = (t - start) % 2
        async_copy.wait_group(1)
        fence_async_shared()
        gl.thread_barrier()

        s = warpgroup_mma(q_s, k_s.index(1 - turn).permute((1, 0)), nothing, use_acc=False, is_async=True)
        acc = warpgroup_mma(p, v_s.index(turn), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        if MASKED:
            s = _seen(s, t + 1, at, key, WINDOW, N, WINDOWED)
        weight, m, shrink = _weigh(s, m, scale)
        norm = gl.fma(norm, shrink, gl.sum(weight, 1))
        p_new = gl.convert_layout(weight.to(kind), p.type.layout)
        order_s.store(norm)
        # What is to be done meanwhile goes through the wait: else the compiler would put it behind.
        acc, p, p_new, shrink = warpgroup_mma_wait(0, deps=[acc, p, p_new, shrink])
        gl.thread_barrier()
        j = t * N + lane
        _copy(k_s.index(1 - turn), keys_ptr, page_k, j + 3 * N, e, first, last, K, E, B, WIDE)
        _copy(v_s.index(turn), values_ptr, page_v, j + 2 * N, e, first, last, K, E, B, WIDE)
        async_copy.commit_group()
        page_v = page_k
        page_k = _pages(pages_ptr, j + 4 * N, first, last, B)
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout))[:, None]
        p = p_new
    return m, norm, acc, p, page_v, page_k


@_kernel
def tile_attention_hopper(
    q_ptr, kv_ptr, table_ptr, slopes_ptr, out_ptr, items_ptr, head_ptr, TABLE, WINDOW,
    value_offset: gl.constexpr, q_token: gl.constexpr, q_head: gl.constexpr, scale: gl.constexpr, H: gl.constexpr,
    K: gl.constexpr, E: gl.constexpr, B: gl.constexpr, WIDE: gl.constexpr, WINDOWED: gl.constexpr, M: gl.constexpr,
    N: gl.constexpr, WARPS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """As `tile_attention`, of which it takes the arguments."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
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
    order_s = gl.allocate_shared_memory(gl.float32, [M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
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
        q_at = (token + rows // G) * q_token + h * q_head
        q = gl.load(q_ptr + q_at[:, None] + e[None, :], mask=own[:, None], other=0.0)

        pages_ptr = table_ptr + row * TABLE
        keys_ptr = kv_ptr + head * E
        values_ptr = keys_ptr + value_offset
        last = position + count
        middle = (position + 1) // N
        first = 0
        seen_by_all = 0  # the first tile of keys that are within every query's window
        if WINDOWED:
            first = gl.maximum(position + 1 - WINDOW, 0)
            seen_by_all = (gl.maximum(last - WINDOW, 0) + N - 1) // N
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

        s = _seen(s, start, at, key, WINDOW, N, WINDOWED)
        m = gl.full([M], float("-inf"), gl.float32, gl.SliceLayout(1, products))
        weight, m, _ = _weigh(s, m, scale)
        norm = gl.sum(weight, 1)
        p = gl.convert_layout(weight.to(kind), weights)
        acc = gl.zeros([M, E], gl.float32, sums)
        # A tile's sums go with the products of the next one.
        begin = start
        end = gl.maximum(middle - 1, start)
        if WINDOWED:
            whole = gl.minimum(gl.maximum(seen_by_all - 1, start), end)
            m, norm, acc, p, page_v, page_k = _sweep(
                m, norm, acc, p, page_v, page_k, nothing, order_s, q_s, k_s, v_s, keys_ptr, values_ptr, pages_ptr, start, begin, whole,
                at, key, lane, e, first, last, WINDOW, scale, K, E, B, N, WIDE, WINDOWED, True,
            )  # fmt: skip
            begin = whole
        end = gl.minimum(end, stop)
        m, norm, acc, p, page_v, page_k = _sweep(
            m, norm, acc, p, page_v, page_k, nothing, order_s, q_s, k_s, v_s, keys_ptr, values_ptr, pages_ptr, start, begin, end,
            at, key, lane, e, first, last, WINDOW, scale, K, E, B, N, WIDE, WINDOWED, False,
        )  # fmt: skip
        m, norm, acc, p, page_v, page_k = _sweep(
            m, norm, acc, p, page_v, page_k, nothing, order_s, q_s, k_s, v_s, keys_ptr, values_ptr, pages_ptr, start, end, stop,
            at, key, lane, e, first, last, WINDOW, scale, K, E, B, N, WIDE, WINDOWED, True,
        )  # fmt: skip
        async_copy.wait_group(0)

        norm = gl.convert_layout(norm, gl.SliceLayout(1, sums))
        out = acc / gl.where(norm == 0.0, 1.0, norm)[:, None]
        out_at = (token + rows // G) * (H * E) + h * E
        out = gl.convert_layout(out.to(out_ptr.dtype.element_ty), loads)
        gl.store(out_ptr + out_at[:, None] + e[None, :], out, mask=own[:, None])
