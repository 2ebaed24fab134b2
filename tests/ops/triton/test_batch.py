"""The inputs of a step, Triton against the reference."""

from __future__ import annotations

import pytest
import torch

from quire.ops.batch import (
    ON_DEVICE,
    PADDING,
    DecodeBuffers,
    RaggedBuffers,
    RaggedInputs,
    Rows,
    decode_batch,
    ragged_batch,
    update_rows,
)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("block_size", [1, 16])
def test_decode_batch(device: torch.device, groups: int, block_size: int) -> None:
    from quire.ops.triton.batch import decode_batch as kernel

    generator = torch.Generator().manual_seed(groups)
    live, count, pages = 5, 8, 300
    order = torch.randperm(9, generator=generator)[:live]
    lengths = torch.tensor([0, 3, 17, 256 * block_size, 299 * block_size])
    inputs = torch.full((2 + 2 * groups, count), -1, dtype=torch.int32)
    inputs[0], inputs[1] = 10, PADDING
    inputs[0, :live] = order.int()
    inputs[1, :live] = torch.where(torch.tensor([True, False, True, False, True]), ON_DEVICE, lengths).int()
    inputs[2, 3], inputs[3, 3] = 256, 77  # the very page that is written to
    inputs[2, 1], inputs[3, 1] = 200, 78  # one that is not

    def make() -> tuple[Rows, DecodeBuffers]:
        draw = torch.Generator().manual_seed(3)
        length = torch.randint(0, 9, (11,), generator=draw)
        length[order] = torch.where(inputs[1, :live] == ON_DEVICE, lengths, length[order])
        table = [torch.randint(0, 99, (11, pages), generator=draw, dtype=torch.int32) for _ in range(groups)]
        for each in table:
            each[10] = -1
        last, offset = torch.randint(0, 99, (2, 11), generator=draw)
        rows = Rows(last.to(device), length.to(device), offset.to(device), [t.to(device) for t in table], block_size)
        return rows, DecodeBuffers.empty(count, [pages] * groups, device)

    (rows, out), (expected_rows, expected) = make(), make()
    kernel(inputs.to(device), rows, out)
    decode_batch(inputs.to(device), expected_rows, expected)
    for name in ("rows_B", "positions_B", "lengths_B"):
        assert torch.equal(getattr(out, name), getattr(expected, name)), name
    assert torch.equal(out.tokens_B[:live], expected.tokens_B[:live])
    assert torch.equal(rows.length_X, expected_rows.length_X)
    for g in range(groups):
        assert torch.equal(out.slots_B[g], expected.slots_B[g])
        assert torch.equal(rows.pages_XP[g], expected_rows.pages_XP[g])
        for i, length in enumerate(out.lengths_B[:live].tolist()):
            used = -(-length // block_size)
            assert torch.equal(out.tables_BP[g][i, :used], expected.tables_BP[g][i, :used])


def random_rows(groups: int, block_size: int, device: torch.device) -> Rows:
    draw = torch.Generator().manual_seed(3)
    table = [torch.randint(0, 99, (11, 300), generator=draw, dtype=torch.int32) for _ in range(groups)]
    for each in table:
        each[10] = -1
    last, offset, length = torch.randint(0, 99, (3, 11), generator=draw)
    return Rows(last.to(device), length.to(device), offset.to(device), [t.to(device) for t in table], block_size)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("block_size", [1, 16])
def test_ragged_batch(device: torch.device, groups: int, block_size: int) -> None:
    from quire.ops.triton.batch import ragged_batch as kernel

    counts, padded_rows, padded_tokens = torch.tensor([1, 1, 5, 150, 1]), 3, 9
    starts = torch.tensor([ON_DEVICE, 7, 0, 3, ON_DEVICE])
    total = int(counts.sum())
    cu_q = torch.cat((torch.tensor([0]), counts.cumsum(0), torch.full((padded_rows,), total))).int()
    of = torch.cat((torch.repeat_interleave(torch.arange(5), counts), torch.full((padded_tokens,), -1))).int()
    tokens = torch.arange(total + padded_tokens).int()
    tokens[torch.tensor([0, 1, 2])] = -1
    inputs = RaggedInputs(
        *(
            t.int().to(device)
            for t in (
                torch.cat((torch.tensor([4, 9, 0, 2, 7]), torch.full((padded_rows,), 10))),
                torch.cat((starts, torch.full((padded_rows,), PADDING))),
                cu_q,
                tokens,
                of,
            )
        )
    )

    def make() -> tuple[Rows, RaggedBuffers]:
        buffers = RaggedBuffers.empty(total + padded_tokens, 5 + padded_rows, [300] * groups, device)
        return random_rows(groups, block_size, device), buffers

    (rows, out), (expected_rows, expected) = make(), make()
    kernel(inputs, rows, out)
    ragged_batch(inputs, expected_rows, expected)
    for name in ("tokens_T", "positions_T", "starts_R", "lengths_R"):
        assert torch.equal(getattr(out, name), getattr(expected, name)), name
    assert torch.equal(rows.length_X, expected_rows.length_X)
    assert not out.lengths_R[5:].any()
    for g in range(groups):
        assert torch.equal(out.slots_T[g], expected.slots_T[g])
        assert (out.slots_T[g][total:] == -1).all()
        for i, length in enumerate(out.lengths_R.tolist()):
            used = -(-length // block_size)
            assert torch.equal(out.tables_RP[g][i, :used], expected.tables_RP[g][i, :used])


@pytest.mark.parametrize("groups", [1, 2])
def test_update_rows(device: torch.device, groups: int) -> None:
    from quire.ops.triton.batch import update_rows as kernel

    rows, expected = random_rows(groups, 16, device), random_rows(groups, 16, device)
    entries = torch.tensor([[i % groups, i % 10, 7 * i % 300, 1000 + i] for i in range(130)], dtype=torch.int32)
    new = torch.tensor([[3, 2], [8, -5]], dtype=torch.int32)
    kernel(entries.to(device), new.to(device), rows)
    update_rows(entries.to(device), new.to(device), expected)
    assert torch.equal(rows.offset_X, expected.offset_X)
    assert all(torch.equal(*pair) for pair in zip(rows.pages_XP, expected.pages_XP, strict=True))
    assert sum(int((t >= 1000).sum()) for t in rows.pages_XP) == 130
    kernel(entries[:0].to(device), new[:0].to(device), rows)
