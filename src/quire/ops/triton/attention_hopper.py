# pyright: reportAssignmentType=false, reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportGeneralTypeIssues=false
"""Attention of rows of many tokens over pages on Hopper: one warp brings pages, two groups of four warps compute.

Owns: a kernel in Gluon that computes the items of `attention_work.tile_items` as `attention_tiles.py` does, for heads
of 128 numbers of 16 bits whose scores no rule bends. The copy engine brings whole pages, so that no thread computes an
address; each group has 64 rows of queries, and asks for the next tile's products before it weighs this one's, so that
the matrix units have work while the others do theirs.
Shape legend: N keys of a tile, E head size, B tokens of a block, S tiles in flight.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quire.ops.triton.attention_work import ITEM
from quire.ops.triton.launch import Kernel

_ITEM = gl.constexpr(ITEM)
_LAYOUT = gl.NVMMASharedLayout(128, 16, 2)


def pages_of(kv: Tensor, block: int) -> TensorDescriptor:
    """What the copy engine must know about the cache (2, pages, B, K, E): boxes of half a head of a page."""
    return TensorDescriptor.from_tensor(kv.view(-1, kv.shape[3] * kv.shape[4]), [block, 64], _LAYOUT)


@gluon.jit
def _bring(
    pages, table_ptr, items_ptr, head_ptr, k_smem, v_smem, k_full, k_free, v_full, v_free, TABLE, ROWS,
    K: gl.constexpr, E: gl.constexpr, B: gl.constexpr, N: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    """Brings tiles of keys and of values, in the order of the items, as soon as there is room. What lies behind a row's
    last token is asked for out of bounds, or overwritten: there must be no nan where the weights are zero."""
    P: gl.constexpr = N // B
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    plain: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    size: gl.constexpr = N * E * 2
    total = gl.load(head_ptr) * K
    n = 0
    fixes = 0
    for i in range(gl.program_id(0), total, gl.num_programs(0)):
        head = i % K
        item_ptr = items_ptr + (i // K) * _ITEM
        own_ptr = table_ptr + gl.load(item_ptr).to(gl.int64) * TABLE
        last = gl.maximum(gl.load(item_ptr + 2) + gl.load(item_ptr + 3), 0)
        for t in range(0, gl.maximum((last + N - 1) // N, 1)):
            s = n % S
            phase = (n // S) & 1
            n += 1
            k_tile = k_smem.index(s)._reinterpret(k_smem.dtype, [2 * P, B, 64], layout)
            v_tile = v_smem.index(s)._reinterpret(v_smem.dtype, [2 * P, B, 64], layout)
            mbarrier.wait(k_free.index(s), phase ^ 1)
            mbarrier.expect(k_full.index(s), size)
            for p in gl.static_range(P):
                there = t * N + p * B < last
                page = gl.load(own_ptr + t * P + p, mask=there, other=0)
                at = gl.where(there, page * B, 2 * ROWS)
                for half in gl.static_range(2):
                    tma.async_copy_global_to_shared(
                        pages, [at, head * E + half * 64], k_full.index(s), k_tile.index(half * P + p)
                    )
            mbarrier.wait(v_free.index(s), phase ^ 1)
            partial = ((t + 1) * N > last) & (last % B != 0)
            arrived = v_full.index(gl.where(partial, S, s))
            mbarrier.expect(arrived, size)
            for p in gl.static_range(P):
                there = t * N + p * B < last
                page = gl.load(own_ptr + t * P + p, mask=there, other=0)
                at = gl.where(there, ROWS + page * B, 2 * ROWS)
                for half in gl.static_range(2):
                    tma.async_copy_global_to_shared(
                        pages, [at, head * E + half * 64], arrived, v_tile.index(half * P + p)
                    )
            if partial:
                mbarrier.wait(arrived, fixes & 1)
                fixes += 1
                edge = (last - t * N) // B
                j = t * N + edge * B + gl.arange(0, B, gl.SliceLayout(1, plain))
                for half in gl.static_range(2):
                    part = v_tile.index(half * P + edge)
                    x = part.load(plain)
                    part.store(gl.where((j < last)[:, None], x, gl.zeros([B, 64], x.dtype, plain)))
                fence_async_shared()
                mbarrier.arrive(v_full.index(s), count=1)


@gluon.jit
def _compute(
    C: gl.constexpr, q_ptr, out_ptr, items_ptr, head_ptr, q_smem, k_smem, v_smem, k_full, k_free, v_full, v_free,
    q_token: gl.constexpr, q_head: gl.constexpr, scale: gl.constexpr,
    H: gl.constexpr, K: gl.constexpr, E: gl.constexpr, N: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    """Half C of each tile of queries."""
    M: gl.constexpr = 64
    G: gl.constexpr = H // K
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    weights: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    plain: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    kind: gl.constexpr = k_smem.dtype
    total = gl.load(head_ptr) * K
    n = 0
    q_own = q_smem.index(C)
    rows = C * M + gl.arange(0, M, gl.SliceLayout(1, plain))
    e = gl.arange(0, E, gl.SliceLayout(0, plain))
    lane = gl.arange(0, N, gl.SliceLayout(0, scores))
    none = gl.zeros([M, N], gl.float32, scores)
    for i in range(gl.program_id(0), total, gl.num_programs(0)):
        head = i % K
        item_ptr = items_ptr + (i // K) * _ITEM
        token = gl.load(item_ptr + 1).to(gl.int64)
        position = gl.load(item_ptr + 2)
        count = gl.load(item_ptr + 3)
        there = (rows < count * G)[:, None]
        q_at = (token + rows // G) * q_token + (head * G + rows % G) * q_head
        q_own.store(gl.load(q_ptr + q_at[:, None] + e[None, :], mask=there, other=0.0))
        fence_async_shared()
        gl.thread_barrier()
        at = position + (C * M + gl.arange(0, M, gl.SliceLayout(1, scores))) // G
        middle = (position + 1) // N  # tiles that all queries see whole

        s = n % S
        phase = (n // S) & 1
        mbarrier.wait(k_full.index(s), phase)
        w = warpgroup_mma(q_own, k_smem.index(s).permute((1, 0)), none, use_acc=False, is_async=True)
        w = warpgroup_mma_wait(0, deps=(w,))
        mbarrier.arrive(k_free.index(s), count=1)
        if middle < 1:
            w = gl.where(lane[None, :] <= at[:, None], w, float("-inf"))
        m = gl.max(w, 1) * scale
        x = gl.exp2(w * scale - m[:, None])
        norm = gl.sum(x, 1)
        p = gl.convert_layout(x.to(kind), weights)
        acc = gl.zeros([M, E], gl.float32, sums)
        for t in range(1, (position + count + N - 1) // N):
            before, before_phase = s, phase
            n += 1
            s = n % S
            phase = (n // S) & 1
            mbarrier.wait(k_full.index(s), phase)
            w = warpgroup_mma(q_own, k_smem.index(s).permute((1, 0)), none, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(before), before_phase)
            acc = warpgroup_mma(p, v_smem.index(before), acc, is_async=True)
            w = warpgroup_mma_wait(1, deps=(w,))
            mbarrier.arrive(k_free.index(s), count=1)
            if t >= middle:
                w = gl.where((t * N + lane)[None, :] <= at[:, None], w, float("-inf"))
            top = gl.maximum(m, gl.max(w, 1) * scale)
            shrink = gl.exp2(m - top)
            m = top
            x = gl.exp2(w * scale - top[:, None])
            norm = norm * shrink + gl.sum(x, 1)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(v_free.index(before), count=1)
            p = gl.convert_layout(x.to(kind), weights)
            acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, sums))[:, None]
        mbarrier.wait(v_full.index(s), phase)
        acc = warpgroup_mma(p, v_smem.index(s), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(v_free.index(s), count=1)
        n += 1
        out = acc / gl.convert_layout(norm, gl.SliceLayout(1, sums))[:, None]
        out = gl.convert_layout(out.to(kind), plain)
        out_at = (token + rows // G) * (H * E) + (head * G + rows % G) * E
        seen = position + rows // G >= 0  # else it is a row of length 0
        gl.store(out_ptr + out_at[:, None] + e[None, :], gl.where(seen[:, None], out, 0.0), mask=there)


def _hopper_attention(
    pages, q_ptr, table_ptr, out_ptr, items_ptr, head_ptr, TABLE, ROWS,
    q_token: gl.constexpr, q_head: gl.constexpr, scale: gl.constexpr, H: gl.constexpr, K: gl.constexpr,
    E: gl.constexpr, B: gl.constexpr, N: gl.constexpr, S: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Each program takes items in turns, KV head by KV head. ROWS: tokens that there is room for in the pages."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    kind: gl.constexpr = pages.dtype
    q_smem = gl.allocate_shared_memory(kind, [2, 64, E], layout)
    k_smem = gl.allocate_shared_memory(kind, [S, N, E], layout)
    v_smem = gl.allocate_shared_memory(kind, [S, N, E], layout)
    k_full = gl.allocate_shared_memory(gl.int64, [S, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [S, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [S + 1, 1], mbarrier.MBarrierLayout())  # one is the bringer's own
    v_free = gl.allocate_shared_memory(gl.int64, [S, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(S):
        mbarrier.init(k_full.index(s), count=1)
        mbarrier.init(v_full.index(s), count=1)
        mbarrier.init(k_free.index(s), count=2)
        mbarrier.init(v_free.index(s), count=2)
    mbarrier.init(v_full.index(S), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_compute, (
                gl.constexpr(0), q_ptr, out_ptr, items_ptr, head_ptr, q_smem, k_smem, v_smem, k_full, k_free, v_full,
                v_free, q_token, q_head, scale, H, K, E, N, S,
            )),
            (_compute, (
                gl.constexpr(1), q_ptr, out_ptr, items_ptr, head_ptr, q_smem, k_smem, v_smem, k_full, k_free, v_full,
                v_free, q_token, q_head, scale, H, K, E, N, S,
            )),
            (_bring, (
                pages, table_ptr, items_ptr, head_ptr, k_smem, v_smem, k_full, k_free, v_full, v_free, TABLE, ROWS,
                K, E, B, N, S,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


hopper_attention = Kernel(_hopper_attention, jit=gluon.jit)
