"""Native attention against the reference, over batches drawn at random."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from quire.ops.attention import AttentionMeta, GroupMeta, attention
from quire.ops.cache import quantize_rows, read_rows
from quire.ops.heads import heads
from quire.ops.native.kernels import Kernels

BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
Of = Callable[[int], Kernels]


@dataclass
class World:
    """A ragged batch in pages; what was never written is NaN."""

    q: Tensor
    k: Tensor
    v: Tensor
    kv: Tensor
    group: GroupMeta
    meta: AttentionMeta

    @classmethod
    def make(
        cls,
        seed: int,
        rows: list[tuple[int, int]],
        heads: tuple[int, int],
        size: int,
        block: int,
        dtype: torch.dtype,
        int8: bool = False,
    ) -> World:
        """`rows`: (length, new tokens); a row of length 0 is padding and has one token without a slot. `int8`: the
        cache's type."""
        g = torch.Generator().manual_seed(seed)
        pages = [-(-length // block) for length, _ in rows]
        kv = torch.full((2, sum(pages) + 2, block, heads[1], size), torch.nan)
        order = torch.randperm(sum(pages) + 2, generator=g).tolist()
        width = max([*pages, 1])
        tables = torch.full((len(rows), width + 1), -1, dtype=torch.int32)
        slots: list[int] = []
        for r, (length, count) in enumerate(rows):
            own = [order.pop() for _ in range(pages[r])]
            tables[r, : len(own)] = torch.tensor(own, dtype=torch.int32)
            where = [own[i // block] * block + i % block for i in range(length)]
            old = torch.tensor(where[: max(0, length - count)], dtype=torch.int64)
            for flat in (kv[0].view(-1, heads[1], size), kv[1].view(-1, heads[1], size)):
                flat[old] = torch.randn(len(old), heads[1], size, generator=g)
            slots += where[length - count :] if length else [-1] * count
        counts, total = [c for _, c in rows], sum(c for _, c in rows)
        wide = torch.randn(total, (heads[0] + 2 * heads[1]) * size, generator=g).to(dtype)
        q, k, v = (x.unflatten(-1, (-1, size)) for x in wide.split([heads[0] * size, *[heads[1] * size] * 2], -1))
        group = GroupMeta(tables, torch.tensor(slots, dtype=torch.int64))
        meta = AttentionMeta(
            cu_q=torch.tensor([0, *counts]).cumsum(0).int(),
            lengths_R=torch.tensor([n for n, _ in rows], dtype=torch.int32),
            q_lens=counts,
            max_q=max([*counts, 1]),
            max_len=width * block,
            num_decodes=next((i for i, c in enumerate(counts) if c != 1), len(counts)),
            groups=(group,),
            kv_lens=[n for n, _ in rows],
        )
        return cls(q, k, v, quantize_rows(kv) if int8 else kv.to(dtype), group, meta)

    def check(self, kernels: Kernels, **rule: Any) -> Tensor:
        kv = self.kv.clone()
        heads(self.q, self.k, self.v, self.kv, self.group.slots_T)
        expected = attention(self.q, self.kv, self.group, self.meta, **rule)
        kernels.heads(self.q, self.k, self.v, kv, self.group.slots_T)
        assert torch.equal(kv.nan_to_num(7.0), self.kv.nan_to_num(7.0)), "what was written to the cache, to the bit"
        got = kernels.attention(self.q, kv, self.group, self.meta, **rule)
        spread = max(1.0, expected.float().abs().max().item()) if expected.numel() else 1.0
        error = (got.float() - expected.float()).abs().max().item() / spread if expected.numel() else 0.0
        assert error <= BOUNDS[self.q.dtype], error
        return got

    def attend(self, kernels: Kernels, **rule: Any) -> Tensor:
        kernels.heads(self.q, self.k, self.v, self.kv, self.group.slots_T)
        return kernels.attention(self.q, self.kv, self.group, self.meta, **rule)


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Any]:
    kv_heads, group = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    longest = draw(st.sampled_from([3, 40, 700, 1500]))
    decodes = draw(st.lists(st.integers(0, longest), max_size=9))
    chunks = draw(st.lists(st.tuples(st.integers(0, longest), st.integers(1, 150)), max_size=3))
    if not decodes and not chunks:
        decodes = [1]
    return {
        "seed": draw(st.integers(0, 9)),
        "rows": [(n, 1) for n in decodes] + [(n + count, count) for n, count in chunks],
        "heads": (kv_heads * group, kv_heads),
        "size": draw(st.sampled_from([1, 2, 6, 16, 33, 64, 80, 100, 128])),
        "block": draw(st.sampled_from([1, 2, 7, 16, 64])),
        "dtype": draw(st.sampled_from(list(BOUNDS))),
        "int8": draw(st.booleans()),
    }


RULES = st.fixed_dictionaries(
    {"scale": st.sampled_from([0.05, 0.2])},
    optional={"window": st.sampled_from([1, 3, 64, 600, 4000]), "softcap": st.sampled_from([1.5, 30.0])},
)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=batches(), rule=RULES, alibi=st.booleans(), threads=st.integers(1, 3))
def test_equals_the_reference(
    kernels: Of, batch: dict[str, Any], rule: dict[str, Any], alibi: bool, threads: int
) -> None:
    count = batch["heads"][0]
    slopes = torch.arange(1, count + 1) / count if alibi else None
    World.make(**batch).check(kernels(threads), **rule, slopes_H=slopes)


def test_a_token_depends_on_no_neighbour(kernels: Of) -> None:
    """The same bits alone (split over threads) and in a crowd (a row at a time)."""
    for int8 in (False, True):
        _check_alone(kernels, int8)


def _check_alone(kernels: Of, int8: bool) -> None:
    rows = [(1300, 1), (17, 1), (513, 1), *[(40 + i, 1) for i in range(30)]]
    crowd = World.make(3, rows, (6, 2), 64, 16, torch.bfloat16, int8)
    together = crowd.check(kernels(2), scale=0.125)
    for r in range(3):
        meta, group = crowd.meta, crowd.group
        alone = AttentionMeta(
            torch.tensor([0, 1], dtype=torch.int32), meta.lengths_R[r : r + 1], [1], 1, meta.max_len, 1, (group,), None
        )
        one = GroupMeta(group.block_tables_RP[r : r + 1], group.slots_T[r : r + 1])
        part = slice(r, r + 1)
        for threads in (1, 2, 3):
            got = kernels(threads).attention(crowd.q[part], crowd.kv, one, alone, 0.125)
            assert torch.equal(got, together[part])


def test_nan_is_not_lost(kernels: Of) -> None:
    for count, int8, dtype in product((1, 20), (False, True), BOUNDS):
        world = World.make(1, [(50, count)], (4, 2), 16, 16, dtype, int8)
        world.k[-1, 1] = math.nan
        out = world.attend(kernels(2), scale=0.3)
        assert out[-1, 2:].isnan().all() and not out[-1, :2].isnan().any()


def test_what_lies_before_the_window_is_not_read(kernels: Of) -> None:
    """Its page may be another row's by now, or hold anything."""
    for count, int8, dtype in product((1, 13, 70), (False, True), BOUNDS):
        world = World.make(4, [(200, count)], (4, 2), 16, 16, dtype, int8)
        first = (200 - count - 20 + 1) // 16
        gone = world.group.block_tables_RP[0, :first].long()
        assert len(gone)
        for each in world.kv.unbind():
            rows = torch.full((len(gone), 16, 2, 16), torch.nan)
            each[gone] = quantize_rows(rows) if int8 else rows.to(dtype)
        out = world.attend(kernels(2), scale=0.3, window=20)
        assert out.isfinite().all()


def test_many_long_rows_are_not_all_split(kernels: Of) -> None:
    world = World.make(6, [(70_000, 1)] * 3, (2, 1), 8, 64, torch.float32)
    alone = world.check(kernels(1), scale=0.3)
    assert torch.equal(world.check(kernels(3), scale=0.3), alone)


def test_thousands_of_tokens(kernels: Of) -> None:
    """A prompt in one step, and the last part of one, beside a row that decodes."""
    for dtype in BOUNDS:
        rows = [(900, 1), (2100, 2100), (2500, 1030)]
        World.make(7, rows, (3, 1), 33, 16, dtype).check(kernels(2), scale=0.2)


def test_a_wrong_page_shows(kernels: Of) -> None:
    """A negative control: the comparison is not blind."""
    world = World.make(5, [(40, 1), (60, 30)], (4, 2), 32, 8, torch.bfloat16)
    tables = world.group.block_tables_RP
    got = world.check(kernels(2), scale=0.3)
    tables[1, :2] = tables[1, :2].flip(0)
    swapped = world.attend(kernels(2), scale=0.3, window=30)
    assert not torch.allclose(got.float(), swapped.float(), atol=0.1)


def test_a_row_in_int8_keeps_seven_bits() -> None:
    x = torch.randn(50, 3, 21, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 50).view(-1, 1, 1)
    x[0] = 0.0
    x[1, 1, 4], x[2, 2, 20] = math.inf, math.nan
    rows = quantize_rows(x)
    assert rows.shape == (50, 3, 28)
    got = read_rows(rows, 21)
    assert got[1, 1].isnan().all() and got[2, 2].isnan().all()
    assert not got[0].any() and not got[1, 0].isnan().any()
    part, whole = got[3:], x[3:]
    assert ((part - whole).abs() <= whole.abs().amax(-1, keepdim=True) * (0.5001 / 127)).all()
