"""Attention over pages, Triton against the reference: decodes, chunks of prompts and both in one step."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from quire.ops.attention import AttentionMeta, GroupMeta, attention

PRECISION = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@dataclass
class World:
    """Rows of (length, count of queries) over shuffled pages. What no query may see is nan; so is, in the tables'
    unused columns, all of page 0."""

    rows: list[tuple[int, int]]
    heads: int = 8
    kv_heads: int = 2
    size: int = 16
    block: int = 16
    window: int | None = None
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None
    seed: int = 0
    q: Tensor = field(init=False)
    kv: Tensor = field(init=False)
    group: GroupMeta = field(init=False)

    def __post_init__(self) -> None:
        draw = torch.Generator().manual_seed(self.seed)
        used = [-(-length // self.block) for length, _ in self.rows]
        self.width = max(max(used), 1) + 1
        pages = list(range(1, sum(used) + 1))
        random.Random(self.seed).shuffle(pages)
        kv = torch.full((2, len(pages) + 1, self.block, self.kv_heads, self.size), torch.nan)
        tables = torch.zeros((len(self.rows), self.width), dtype=torch.int32)
        for row, (length, count) in enumerate(self.rows):
            own = [pages.pop() for _ in range(used[row])]
            tables[row, : len(own)] = torch.tensor(own, dtype=torch.int32)
            first = 0 if self.window is None else max(0, length - count - self.window + 1)
            j = torch.arange(first, length)
            where = tables[row, j // self.block].long() * self.block + j % self.block
            kv.view(2, -1, self.kv_heads, self.size)[:, where] = torch.randn(
                (2, length - first, self.kv_heads, self.size), generator=draw
            )
        self.kv = kv.to(self.kv_dtype or self.dtype)
        total = sum(count for _, count in self.rows)
        # As heads leaves it or as a view of one wider matrix.
        wide = torch.randn((total, self.heads + 2 * self.kv_heads, self.size), generator=draw)
        self.q = wide.to(self.dtype)[:, : self.heads]
        self.group = GroupMeta(tables, torch.empty(0, dtype=torch.int64))

    def meta(self, device: torch.device, captured: bool = False) -> AttentionMeta:
        counts = [count for _, count in self.rows]
        cu_q = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
        lengths = torch.tensor([length for length, _ in self.rows], dtype=torch.int32)
        decodes = next((i for i, count in enumerate(counts) if count != 1), len(counts))
        return AttentionMeta(
            cu_q.to(device), lengths.to(device), None if captured else counts, max(counts), self.width * self.block,
            decodes, (self.group,), None if captured else lengths.tolist(),
        )  # fmt: skip

    def reference(self, scale: float = 0.3, **rule: Any) -> Tensor:
        return attention(
            self.q.float(), self.kv, self.group, self.meta(torch.device("cpu")), scale, self.window, **rule
        )

    def kernel(
        self, device: torch.device, scale: float = 0.3, captured: bool = False, invariant: bool = False, **rule: Any
    ) -> Tensor:
        from quire.ops.triton import attention as module

        kernel = module.invariant_attention if invariant else module.attention
        group = GroupMeta(self.group.block_tables_RP.to(device), self.group.slots_T)
        meta = self.meta(device, captured)
        if isinstance(slopes := rule.get("slopes_H"), Tensor):
            rule["slopes_H"] = slopes.to(device)
        q, kv = self.q.to(device), self.kv.to(device)
        if q.device.type == "cuda":  # a copy is contiguous
            q = torch.cat([q, q], 1)[:, : self.heads]
        out = [kernel(q, kv, group, meta, scale, self.window, **rule) for _ in range(2)]
        assert torch.equal(out[0], out[1]), "the second layer of a step"
        assert out[0].dtype == self.dtype
        return out[0].cpu()

    def check(self, device: torch.device, captured: bool = False, **rule: Any) -> None:
        expected, got = self.reference(**rule), self.kernel(device, captured=captured, **rule)
        bound = PRECISION[self.dtype if self.kv_dtype is None else self.kv_dtype]
        assert torch.allclose(got.float(), expected, atol=bound, rtol=bound), (got.float() - expected).abs().max()


DECODES = [(1, 1), (0, 1), (64, 1), (65, 1), (300, 1), (129, 1)]
MIXED = [(5, 1), (0, 1), (200, 1), (3, 3), (70, 2), (40, 40), (150, 33), (129, 64), (33, 1)]
RULES: list[dict[str, Any]] = [
    {},
    {"scale": 2.0, "softcap": 1.5},
    {"slopes_H": torch.tensor([0.5, 0.25, 0.1, 0.05, 0.3, 0.7, 0.02, 0.9])},
    {"softcap": 3.0, "slopes_H": torch.tensor([0.5, 0.25, 0.1, 0.05, 0.3, 0.7, 0.02, 0.9])},
]


@pytest.mark.parametrize("rows", [DECODES, MIXED], ids=["decodes", "mixed"])
@pytest.mark.parametrize(("rule", "window"), [(rule, w) for rule in RULES for w in (None, 50)] + [(RULES[0], 1)])
def test_rules(device: torch.device, rows: list[tuple[int, int]], rule: dict[str, Any], window: int | None) -> None:
    World(rows, window=window).check(device, **rule)


@pytest.mark.parametrize("rows", [DECODES, MIXED], ids=["decodes", "mixed"])
@pytest.mark.parametrize(
    "shape",
    [
        {"heads": 8, "kv_heads": 8, "size": 8},
        {"heads": 8, "kv_heads": 1, "size": 80, "block": 32},
        {"heads": 6, "kv_heads": 2, "size": 64, "block": 24},
        {"heads": 20, "kv_heads": 1, "size": 16, "block": 1},
        {"heads": 2, "kv_heads": 2, "size": 256},
        {"heads": 71, "kv_heads": 1, "size": 64, "dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_shapes(device: torch.device, rows: list[tuple[int, int]], shape: dict[str, int]) -> None:
    World(rows, **shape).check(device)


@pytest.mark.parametrize("rows", [DECODES, MIXED], ids=["decodes", "mixed"])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_a_cap_a_window_and_wide_heads(device: torch.device, rows: list[tuple[int, int]], kv_heads: int) -> None:
    """Gemma 2's."""
    shape: dict[str, Any] = {"heads": 8, "kv_heads": kv_heads, "size": 256, "dtype": torch.bfloat16}
    World(rows, **shape, window=50).check(device, softcap=5.0)


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_types(device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    world = World(MIXED, dtype=dtype, kv_dtype=kv_dtype, size=32)
    expected, got = world.reference(), world.kernel(device)
    bound = max(PRECISION[dtype], PRECISION[kv_dtype]) if dtype == kv_dtype else PRECISION[dtype]
    assert torch.allclose(got.float(), expected, atol=bound, rtol=bound)


@pytest.mark.parametrize("rows", [DECODES, MIXED], ids=["decodes", "mixed"])
@pytest.mark.parametrize("window", [None, 50])
def test_where_only_the_device_knows_the_counts(
    device: torch.device, rows: list[tuple[int, int]], window: int | None
) -> None:
    World(rows, window=window).check(device, captured=True)


@pytest.mark.parametrize("window", [None, 50, 128])
@pytest.mark.parametrize("size", [64, 128])
def test_prompts_of_common_heads(device: torch.device, size: int, window: int | None) -> None:
    rows = [(7, 1), (0, 1), (300, 200), (129, 128), (256, 256), (200, 64)]
    World(rows, size=size, window=window, dtype=torch.bfloat16).check(device)


@pytest.mark.parametrize("heads", [2, 4, 32])
@pytest.mark.parametrize(("dtype", "block"), [(torch.bfloat16, 32), (torch.float16, 16)])
def test_prompts_of_the_commonest_heads(device: torch.device, dtype: torch.dtype, block: int, heads: int) -> None:
    """What a kernel for one kind of GPU serves."""
    rows = [(300, 200), (0, 20), (1, 1), (129, 128), (128, 128)]
    World(rows, heads=heads, size=128, dtype=dtype, block=block).check(device)


def test_long_rows_are_cut_and_put_together(device: torch.device) -> None:
    World([(5000, 1), (4999, 3)], heads=2, kv_heads=1).check(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_of_a_row_do_not_depend_on_its_batch(device: torch.device, dtype: torch.dtype) -> None:
    """Alone a row is cut into segments that several programs compute; among many it is one program's."""
    lengths = [700, 131, 64, 1500, 257, 1]
    others = [(random.Random(1).randrange(1, 300), 1) for _ in range(58)]
    batch = World([(length, 1) for length in lengths] + others, dtype=dtype)
    together = batch.kernel(device)
    for row, length in enumerate(lengths):
        alone = World([(length, 1)], dtype=dtype)
        alone.kv, alone.q = batch.kv, batch.q[row : row + 1]
        alone.group = GroupMeta(batch.group.block_tables_RP[row : row + 1], batch.group.slots_T)
        assert torch.equal(alone.kernel(device), together[row : row + 1])


@pytest.mark.parametrize("shape", [{}, {"window": 50}, {"size": 128, "dtype": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("cuts", [[48], [64, 100], [17, 31, 90]], ids=str)
def test_the_bits_of_a_prompt_do_not_depend_on_its_chunks(
    device: torch.device, shape: dict[str, Any], cuts: list[int]
) -> None:
    whole = World([(150, 150)], **shape)
    expected = whole.kernel(device)
    edges = [0, *cuts, 150]
    for start, stop in pairwise(edges):
        chunk = World([(stop, stop - start)], **shape)
        chunk.kv, chunk.q, chunk.group, chunk.width = whole.kv, whole.q[start:stop], whole.group, whole.width
        assert torch.equal(chunk.kernel(device), expected[start:stop])


@pytest.mark.parametrize("captured", [False, True])
def test_invariant(device: torch.device, captured: bool) -> None:
    for world in (World(MIXED, window=50), World(DECODES, size=64)):
        expected, got = world.reference(), world.kernel(device, captured=captured, invariant=True)
        assert torch.allclose(got, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("shape", [{}, {"window": 50}, {"size": 128, "dtype": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("captured", [False, True])
def test_invariant_bits_depend_neither_on_steps_nor_on_neighbours(
    device: torch.device, shape: dict[str, Any], captured: bool
) -> None:
    """A prompt in one step, in chunks, and its last tokens as decodes among other rows."""
    whole = World([(150, 150)], **shape)
    expected = whole.kernel(device, invariant=True)
    for start, stop in pairwise([0, 17, 100, 147, 148, 149, 150]):
        among = stop - start == 1
        world = World([(stop, stop - start), *([(20, 1), (0, 1), (130, 1)] if among else [])], **shape)
        world.kv, world.width = whole.kv, whole.width
        world.q = torch.cat([whole.q[start:stop], world.q[stop - start :]])
        first = whole.group.block_tables_RP
        world.group = GroupMeta(first.repeat(len(world.rows), 1), whole.group.slots_T)
        got = world.kernel(device, captured=captured and among, invariant=True)
        assert torch.equal(got[: stop - start], expected[start:stop])


def shared(world: World, prefixes: list[tuple[list[int], int]]) -> World:
    """Rows that read the first pages of the first of them, so many."""
    tables = world.group.block_tables_RP
    for rows, pages in prefixes:
        for row in rows[1:]:
            assert world.window is None and world.rows[row][0] > pages * world.block < world.rows[rows[0]][0]
            tables[row, :pages] = tables[rows[0], :pages]
    return world


PREFIXES: list[tuple[list[tuple[int, int]], list[tuple[list[int], int]]]] = [
    ([(700, 1)] * 9, [(list(range(9)), 40)]),  # two packs of four and a row that is left
    ([(300, 1), (257, 1), (1500, 1), (400, 1), (0, 1), (20, 1)], [([0, 1, 2, 3], 16)]),
    ([(520, 1), (600, 1), (530, 1), (610, 1), (520, 1), (600, 1)], [([0, 2, 4], 32), ([1, 3, 5], 33)]),  # two prefixes
    ([(700, 1), (700, 1), (700, 1), (700, 1)], [([0, 1, 2, 3], 20), ([0, 1], 40), ([2, 3], 43)]),  # a tree
    ([(700, 1), (700, 1)], [([0, 1], 15)]),  # too little
    ([(2600, 1), (2500, 1), (2049, 1), (2040, 1), (2600, 1)], [([0, 1, 2, 3, 4], 127)]),  # segments of several tiles
    ([(700, 1), (690, 3), (700, 1), (660, 40), (700, 1), (300, 2), (700, 1)], [([0, 1, 2, 3, 4, 6], 39)]),  # mixed
]


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize(("rows", "prefixes"), PREFIXES)
def test_rows_that_share_pages(
    device: torch.device, rows: list[tuple[int, int]], prefixes: list[tuple[list[int], int]], captured: bool
) -> None:
    shared(World(rows), prefixes).check(device, captured)


@pytest.mark.parametrize(
    "shape",
    [{"block": 32}, {"block": 24}, {"block": 1}, {"heads": 2}, {"heads": 32}, {"heads": 10}, {"size": 80}],
    ids=str,
)
def test_shapes_of_rows_that_share_pages(device: torch.device, shape: dict[str, int]) -> None:
    block = shape.get("block", 16)
    for pages in (300 // block, 512 // block + 1):
        shared(World([(700, 1)] * 5, **shape), [(list(range(5)), pages)]).check(device)


@pytest.mark.parametrize("rule", RULES)
def test_rules_for_rows_that_share_pages(device: torch.device, rule: dict[str, Any]) -> None:
    shared(World([(700, 1)] * 5), [(list(range(5)), 40)]).check(device, **rule)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "prefixes"), [PREFIXES[i] for i in (0, 2, 3, 5)])
def test_the_bits_of_a_row_do_not_depend_on_who_shares_its_pages(
    device: torch.device, rows: list[tuple[int, int]], prefixes: list[tuple[list[int], int]], dtype: torch.dtype
) -> None:
    batch = shared(World(rows, dtype=dtype), prefixes)
    together = batch.kernel(device)
    for row, (length, _) in enumerate(rows):
        alone = World([(length, 1)], dtype=dtype)
        alone.kv, alone.q = batch.kv, batch.q[row : row + 1]
        alone.group = GroupMeta(batch.group.block_tables_RP[row : row + 1], batch.group.slots_T)
        assert torch.equal(alone.kernel(device), together[row : row + 1])


def test_who_is_packed(device: torch.device) -> None:
    """That the tests above test something: pages are read once for a pack."""
    from quire.ops.triton import attention as module

    world = shared(World([(700, 1)] * 9), [(list(range(9)), 40)])
    meta = world.meta(device)
    q, kv, table_RP = (x.to(device) for x in (world.q, world.kv, world.group.block_tables_RP))
    step = module.Step(q, kv, meta, 0.3, None, None, False, False, table_RP)
    assert step.packs is not None
    counts = step.packs[1].tolist()
    assert counts == [4, 0, 0, 0, 4, 0, 0, 0, 0] and step.packs[0].tolist() == [10] * 8 + [0]


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("window", [None, 300, 1000])
@pytest.mark.parametrize(
    "rows", [[(1500, 20)], [(1500, 14), (20, 1), (0, 1), (700, 6)], [(900, 9), (600, 2), (1400, 6), (64, 1)]]
)
def test_few_tokens_behind_many(
    device: torch.device, rows: list[tuple[int, int]], window: int | None, captured: bool
) -> None:
    """Tiles of queries that are cut over their keys."""
    world = World(rows, heads=4, kv_heads=1, window=window)
    world.check(device, captured)
    world.check(device, captured, softcap=3.0, slopes_H=torch.tensor([0.5, 0.25, 0.1, 0.05]))


@pytest.mark.parametrize("invariant", [False, True])
def test_which_tiles_are_cut(device: torch.device, invariant: bool) -> None:
    from quire.ops.triton import attention as module

    world = World([(1500, 20)], heads=4, kv_heads=1)
    q, kv, table_RP = (x.to(device) for x in (world.q, world.kv, world.group.block_tables_RP))
    step = module.Step(q, kv, world.meta(device), 0.3, None, None, False, invariant, table_RP)
    assert (step.tile_work[1].item() > 3) != invariant
