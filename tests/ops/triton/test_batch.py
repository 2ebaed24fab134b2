"""The inputs of a decode step, Triton against the reference."""

from __future__ import annotations

import pytest
import torch

from quire.ops.batch import ON_DEVICE, PADDING, DecodeBuffers, Rows, decode_batch


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
