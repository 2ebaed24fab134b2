"""The ragged batch against a loop over rows and tokens."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from quire.runner import batch as batches
from quire.runner.batch import Batch
from quire.runner.sampler import Sampler
from quire.runner.table import RequestTable
from quire.runner.upload import HostUpload
from quire.types.plan import Plan, ints

from .plans import V, make_plan

SIZE = 4
MAX_LEN = 48


def make_table(rows: int, groups: int, seed: int) -> RequestTable:
    """Rows with any last token, length and offset; pages of which none is there twice, and some are not there."""
    table = RequestTable(rows, MAX_LEN, SIZE, groups, Sampler(V, "cpu"), torch.device("cpu"))
    gen = torch.Generator().manual_seed(seed)
    table.last_R[:rows] = torch.randint(0, V, (rows,), generator=gen)
    table.length_R[:rows] = torch.randint(1, MAX_LEN - 12, (rows,), generator=gen)
    table.offset_R[:rows] = torch.randint(-1, 9, (rows,), generator=gen)
    for pages in table.pages_RP:
        count = pages[:rows].numel()
        ids = torch.randperm(count, generator=gen).to(torch.int32)
        pages[:rows] = torch.where(torch.rand(count, generator=gen) < 0.2, -1, ids).view(rows, -1)
    return table


def build(plan: Plan, table: RequestTable) -> Batch:
    upload = HostUpload()
    batches.stage(plan, upload)
    upload.send()
    return batches.build(plan, upload, table, [])


def slow(plan: Plan, table: RequestTable) -> dict[str, Any]:
    """What the batch must be, one token after the other."""
    out: dict[str, Any] = {"tokens": [], "positions": [], "lengths": [], "cu_q": [0], "ends": []}
    slots: list[list[int]] = [[] for _ in table.pages_RP]
    for i, row in enumerate(plan.rows.tolist()):
        start, count = int(plan.starts[i]), int(plan.counts[i])
        if plan.upper[i]:
            start = int(table.length_R[row])
        known = plan.tokens[plan.token_offsets[i] : plan.token_offsets[i + 1]].tolist()
        tokens = known if len(known) == count else [int(table.last_R[row]), *known]
        assert len(tokens) == count
        for index, token in enumerate(tokens, start):
            out["tokens"].append(token)
            out["positions"].append(max(0, index + int(table.offset_R[row])))
            for g, pages in enumerate(table.pages_RP):
                page = int(pages[row, index // SIZE]) if index >= 0 else -1
                slots[g].append(page * SIZE + index % SIZE if page >= 0 else -1)
        out["lengths"].append(start + count)
        out["cu_q"].append(len(out["tokens"]))
    out["slots"] = slots
    out["last"] = [out["cu_q"][i + 1] - 1 for i in plan.sample_index.tolist()]
    return out


def check(plan: Plan, table: RequestTable) -> Batch:
    batch, right = build(plan, table), slow(plan, table)
    meta = batch.step.attn
    assert batch.tokens_T.tolist() == right["tokens"]
    assert batch.step.positions_T.tolist() == right["positions"]
    assert batch.lengths_R.tolist() == meta.lengths_R.tolist() == right["lengths"]
    assert meta.cu_q.tolist() == right["cu_q"] and meta.cu_q.dtype == meta.lengths_R.dtype == torch.int32
    assert [group.slots_T.tolist() for group in meta.groups] == right["slots"]
    assert batch.last_S.tolist() == right["last"]
    assert batch.sample_rows_S.tolist() == plan.sample_rows.tolist()
    assert batch.sample_index_S.tolist() == plan.sample_index.tolist()
    assert batch.rows_R.tolist() == plan.rows.tolist()
    assert meta.q_lens == plan.counts.tolist() and meta.max_q == max(plan.counts)
    assert meta.kv_lens is not None and all(n <= m for n, m in zip(right["lengths"], meta.kv_lens, strict=True))
    assert meta.max_len % SIZE == 0 and max(meta.kv_lens) <= meta.max_len < max(meta.kv_lens) + SIZE
    decodes = [*plan.counts.tolist(), 0]
    assert meta.num_decodes == next(i for i, count in enumerate(decodes) if count != 1)
    for pages, group in zip(table.pages_RP, meta.groups, strict=True):
        assert torch.equal(group.block_tables_RP, pages[plan.rows, : meta.max_len // SIZE])
    return batch


@pytest.mark.parametrize("seed", range(40))
def test_batches_agree_with_the_loop(seed: int) -> None:
    rng = random.Random(seed)
    table = make_table(9, rng.choice([1, 2, 3]), seed)
    work = []
    for row in rng.sample(range(9), rng.randint(1, 9)):
        length = int(table.length_R[row])
        kind = rng.choice("decode decode upper prompt behind".split())
        if kind == "decode":  # the host knows how far the row has come, the device its last token
            work.append((row, length, 1, [], False))
        elif kind == "upper":  # the host only knows a bound
            work.append((row, length + rng.randint(0, 4), 1, [], True))
        elif kind == "prompt":
            known = [rng.randrange(V) for _ in range(rng.randint(1, 9))]
            work.append((row, rng.randint(0, MAX_LEN - 10), len(known), known, False))
        else:  # known tokens behind the one that the device drew
            known = [rng.randrange(V) for _ in range(rng.randint(1, 6))]
            work.append((row, length + rng.randint(0, 3), 1 + len(known), known, rng.random() < 0.5))
    work.sort(key=lambda item: item[2] != 1)  # decoding rows first
    sampled = rng.sample(range(len(work)), rng.randint(0, len(work)))
    check(make_plan(work, [(i, work[i][0]) for i in sampled]), table)


def test_a_prompt_is_sampled_more_often_than_it_runs() -> None:
    table = make_table(6, 2, 0)
    plan = make_plan([(0, 5, 1, [], False), (2, 0, 3, [4, 5, 6], False)], [(0, 0), (1, 2), (1, 3), (1, 5)])
    assert check(plan, table).last_S.tolist() == [0, 3, 3, 3]


def test_rows_that_all_decode_take_the_short_path_to_the_same_batch() -> None:
    table = make_table(9, 2, 1)
    length = table.length_R.tolist()
    check(make_plan([(i, length[i] + i % 2, 1, [], i % 2 == 1) for i in range(9)], [(i, i) for i in range(9)]), table)


def test_a_prompt_of_one_token_is_not_taken_for_a_decode() -> None:
    table = make_table(3, 1, 2)
    table.last_R[1] = 9
    assert check(make_plan([(1, 0, 1, [5], False)], [(0, 1)]), table).tokens_T.tolist() == [5]
    assert check(make_plan([(1, 0, 1, [0], False)], [(0, 1)]), table).tokens_T.tolist() == [0], "0 is a token too"


def test_padding_is_written_nowhere() -> None:
    table = make_table(4, 2, 3)
    pad = table.padding_row
    plan = make_plan([(0, int(table.length_R[0]), 1, [], False), (pad, 0, 1, [], False), (pad, -1, 1, [], False)])
    batch = check(plan, table)
    for group in batch.step.attn.groups:
        assert group.slots_T[1:].tolist() == [-1, -1]
    assert batch.lengths_R.tolist()[2] == 0 and batch.step.positions_T.tolist()[1:] == [0, 0]


def test_the_order_of_rows_is_the_plans() -> None:
    table = make_table(9, 1, 4)
    for order in ([3, 1, 7], [7, 3, 1]):
        plan = make_plan([(row, 4, 2, [row, row + 1], False) for row in order])
        assert check(plan, table).tokens_T.tolist() == [t for row in order for t in (row, row + 1)]


def test_positions_of_several_axes_are_refused() -> None:
    plan = make_plan([(0, 0, 1, [5], False)], positions=ints([[0], [1], [2]]))
    with pytest.raises(AssertionError, match="not there yet"):
        batches.stage(plan, HostUpload())


def test_the_loop_can_tell_a_wrong_batch() -> None:
    table = make_table(4, 1, 5)
    plan = make_plan([(0, int(table.length_R[0]) + 2, 1, [], True)])
    wrong = Plan(**{f: getattr(plan, f) for f in plan.__struct_fields__} | {"upper": np.array([False])})
    assert build(wrong, table).lengths_R.tolist() != slow(plan, table)["lengths"]
