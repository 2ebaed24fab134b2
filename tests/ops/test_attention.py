"""The reference attention against a plain dense computation, one token at a time."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from quire.ops.attention import AttentionMeta, GroupMeta, attention
from quire.ops.cache import copy_pages, write_kv

BLOCK, BLOCKS, K, E = 4, 64, 2, 6


def dense(
    q_HE: Tensor,
    k_LKE: Tensor,
    v_LKE: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    slopes_H: Tensor | None = None,
) -> Tensor:
    """One query at the end of L tokens, head by head."""
    length, group = len(k_LKE), len(q_HE) // K
    first = 0 if window is None else max(0, length - window)
    out = torch.zeros_like(q_HE)
    for h, q_E in enumerate(q_HE):
        scores = (k_LKE[first:, h // group] @ q_E) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if slopes_H is not None:
            scores = scores + slopes_H[h] * torch.arange(first - length + 1, 1)
        out[h] = scores.softmax(0) @ v_LKE[first:, h // group]
    return out


class World:
    """Rows of given lengths in pages full of nan but for what was written."""

    def __init__(self, heads: int, rows: list[tuple[int, int]], dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(len(rows) + heads)
        draw = random.Random(1)
        free = list(range(BLOCKS))
        draw.shuffle(free)
        self.rows = rows
        self.kv = torch.full((2, BLOCKS, BLOCK, K, E), torch.nan, dtype=dtype)
        total = sum(count for _, count in rows)
        self.q, self.k, self.v = (torch.randn(total, h, E).to(dtype) for h in (heads, K, K))
        self.keys, self.values, tables, slots, self.width = [], [], [], [], 8
        at = 0
        for length, count in rows:
            pages = [free.pop() for _ in range(-(-length // BLOCK))]
            where = [pages[i // BLOCK] * BLOCK + i % BLOCK for i in range(length)]
            keys, values = torch.randn(2, length, K, E).to(dtype)
            if length:
                keys[-count:], values[-count:] = self.k[at : at + count], self.v[at : at + count]
            self.keys.append(keys)
            self.values.append(values)
            old = torch.tensor(where[: max(0, length - count)], dtype=torch.int64)
            self.kv[0].view(-1, K, E)[old] = keys[: len(old)]
            self.kv[1].view(-1, K, E)[old] = values[: len(old)]
            slots += where[length - count :] if length else [-1] * count
            tables.append((pages + [draw.randrange(BLOCKS) for _ in range(self.width)])[: self.width])
            at += count
        self.group = GroupMeta(torch.tensor(tables, dtype=torch.int32), torch.tensor(slots))

    def meta(self, num_decodes: int, slack: int = 0) -> AttentionMeta:
        counts, lengths = [c for _, c in self.rows], [n for n, _ in self.rows]
        return AttentionMeta(
            cu_q=torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32),
            lengths_R=torch.tensor(lengths, dtype=torch.int32),
            q_lens=counts,
            max_q=max(counts),
            max_len=self.width * BLOCK,
            num_decodes=num_decodes,
            groups=(self.group,),
            kv_lens=[n + slack for n in lengths],
        )

    def expected(self, **rule: Any) -> Tensor:
        out, at = torch.zeros_like(self.q, dtype=torch.float32), 0
        for row, (length, count) in enumerate(self.rows):
            for i in range(count if length else 0):
                seen = length - count + i + 1
                keys, values = self.keys[row][:seen].float(), self.values[row][:seen].float()
                out[at + i] = dense(self.q[at + i].float(), keys, values, **rule)
            at += count
        return out


def attend(world: World, meta: AttentionMeta, *args: Any, **rule: Any) -> Tensor:
    write_kv(world.k, world.v, world.kv, world.group.slots_T)
    return attention(world.q, world.kv, world.group, meta, *args, **rule)


ROWS = [(1, 1), (9, 1), (0, 1), (32, 1), (5, 5), (17, 4), (30, 29), (2, 1)]
RULES = [
    {"scale": 0.4},
    {"scale": 1.0, "window": 3},
    {"scale": 0.3, "window": 40},
    {"scale": 2.0, "softcap": 1.5},
    {"scale": 0.4, "window": 6, "softcap": 3.0, "slopes_H": torch.tensor([0.5, 0.25, 0.1, 0.05, 0.3, 0.7])},
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("num_decodes", [0, 4])
def test_equals_the_dense_meaning(rule: dict[str, Any], num_decodes: int) -> None:
    world = World(6, ROWS)
    expected = world.expected(**rule)
    got = attend(world, world.meta(num_decodes, slack=2), **rule)
    assert torch.allclose(got, expected, atol=2e-6)


def test_much_work_is_cut_into_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(4, ROWS)
    monkeypatch.setattr("quire.ops.attention.reference._MAX_NUMBERS", 32 * K * E * 3)
    got = attend(world, world.meta(4), 0.5)
    assert torch.allclose(got, world.expected(scale=0.5), atol=2e-6)


def test_half_precision_keeps_softmax_in_float32() -> None:
    world = World(4, ROWS, torch.bfloat16)
    got = attend(world, world.meta(4), 0.5)
    assert got.dtype == torch.bfloat16
    assert torch.allclose(got.float(), world.expected(scale=0.5), atol=1e-2)


def test_a_captured_batch_has_no_host_lengths() -> None:
    world = World(4, ROWS[:4])
    meta = world.meta(4)
    meta.q_lens = meta.kv_lens = None
    got = attend(world, meta, 0.5)
    assert torch.allclose(got, world.expected(scale=0.5), atol=2e-6)
    assert not got[2].any(), "a padding row gives zeros"


@pytest.mark.parametrize("slots", [[-1, -1, -1], [-1, 0, 7], [5, -1, 0], [3, 9, 1]])
def test_write_kv_writes_where_told_and_nowhere_else(slots: list[int]) -> None:
    kv = torch.full((2, 3, BLOCK, K, E), torch.nan)
    k, v = torch.randn(2, 3, K, E)
    expected = kv.clone()
    for i, slot in enumerate(slots):
        if slot >= 0:
            expected[0].view(-1, K, E)[slot], expected[1].view(-1, K, E)[slot] = k[i], v[i]
    write_kv(k, v, kv, torch.tensor(slots))
    assert torch.equal(kv.nan_to_num(9.0), expected.nan_to_num(9.0))


def test_copy_pages_reads_before_it_writes() -> None:
    kv = torch.arange(2 * 4 * BLOCK * K * E, dtype=torch.float32).view(2, 4, BLOCK, K, E)
    before = kv.clone()
    copy_pages([kv], [kv], torch.tensor([0, 1]), torch.tensor([1, 2]))
    assert torch.equal(kv[:, 1], before[:, 0])
    assert torch.equal(kv[:, 2], before[:, 1])
    assert torch.equal(kv[:, 3], before[:, 3])


def test_decodes_ask_the_device_for_nothing() -> None:
    """Tensors without values go through: no host sync, every shape static, so a graph can capture it."""
    world = World(4, ROWS[:4])
    meta = world.meta(4)
    meta.q_lens = meta.kv_lens = None
    with FakeTensorMode() as mode:
        fake = mode.from_tensor
        group = GroupMeta(fake(world.group.block_tables_RP), fake(world.group.slots_T))
        meta.lengths_R, meta.cu_q = fake(meta.lengths_R), fake(meta.cu_q)
        kv = fake(world.kv)
        write_kv(fake(world.k), fake(world.v), kv, group.slots_T)
        got = attention(fake(world.q), kv, group, meta, 0.5, window=3)
    assert got.shape == world.q.shape
