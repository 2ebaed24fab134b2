"""Changes to logits and logprobs in Triton against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from quire.ops import sampling
from quire.ops.sampling import IN_PROMPT, NEG_INF
from quire.ops.triton import changes, logprobs

# the interpreter computes with NumPy, which warns of what is meant: inf - inf, 0 to the power
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def logits_of(rows: int, vocab: int, device: torch.device, steps: int = 0) -> Tensor:
    x = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab)) * 3
    x[0, torch.arange(vocab) % 3 == 1] = NEG_INF
    return ((x * steps).round() / steps if steps else x).to(device)


@pytest.mark.parametrize(("vocab", "count"), [(37, 1), (3000, 5)])
@pytest.mark.parametrize("some", [False, True])
def test_edits(vocab: int, count: int, some: bool, device: torch.device) -> None:
    x, g = logits_of(6, vocab, device), torch.Generator().manual_seed(3)
    at = torch.tensor([4, 1, 2] if some else list(range(6)), device=device)
    ids = torch.stack([torch.randperm(vocab, generator=g)[:count] for _ in at]).to(device)
    values = torch.randn(len(at), count, generator=g).to(device)
    values[1, 0], values[2], ids[2] = NEG_INF, 0.0, 0
    until = torch.randint(3, 7, (len(at), count), generator=g).to(device)
    drawn = torch.full((len(at),), 4, device=device)
    expected = x.clone()
    part = expected[at]
    sampling.add_edits(part, ids, values, until, drawn)
    expected[at] = part
    changes.add_edits(x, ids, values, until, drawn, at if some else None)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("vocab", [37, 5003])
@pytest.mark.parametrize("some", [False, True])
def test_penalties(vocab: int, some: bool, device: torch.device) -> None:
    x, g = logits_of(5, vocab, device), torch.Generator().manual_seed(4)
    at = torch.tensor([4, 1, 2] if some else list(range(5)), device=device)
    lines = torch.tensor([7, 0, 3] if some else list(range(5)), device=device)
    counts = torch.randint(-4, 4, (8, vocab), generator=g).clamp_min(0).int()
    counts[torch.rand(8, vocab, generator=g) < 0.3] |= IN_PROMPT
    repetition, presence, frequency = (torch.rand(3, len(at), generator=g) + 0.6).to(device)
    counts = counts.to(device)
    expected = x.clone()
    part = expected[at]
    sampling.penalise(part, counts[lines], repetition, presence, frequency)
    expected[at] = part
    changes.penalise(x, counts, repetition, presence, frequency, at if some else None, lines if some else None)
    assert torch.equal(x, expected)


@pytest.mark.parametrize(("vocab", "words"), [(64, 2), (70, 3), (70, 1), (5003, 157)])
@pytest.mark.parametrize("some", [False, True])
def test_mask(vocab: int, words: int, some: bool, device: torch.device) -> None:
    x, g = logits_of(4, vocab, device), torch.Generator().manual_seed(5)
    at = torch.tensor([3, 1] if some else list(range(4)), device=device)
    bits = torch.randint(-(2**31), 2**31 - 1, (len(at), words), generator=g).int().to(device)
    expected = x.clone()
    expected[at] = expected[at].masked_fill(~sampling.allowed_bits(bits, vocab), NEG_INF)
    changes.mask(x, bits, at if some else None)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize(("vocab", "top", "steps"), [(1, 1, 0), (9, 20, 2), (3000, 20, 0), (5003, 5, 1), (2100, 0, 0)])
def test_logprobs(
    dtype: torch.dtype, normalise: bool, vocab: int, top: int, steps: int, device: torch.device
) -> None:  # fmt: skip
    """Of rows in any order; equal numbers by rising id, masked tokens last."""
    x = logits_of(6, vocab, device, steps).to(dtype)
    x[2, vocab // 2 :] = NEG_INF
    at = torch.tensor([5, 2, 0], device=device)
    token = torch.tensor([0, vocab // 3, vocab - 1], device=device)
    got = logprobs.token_logprobs(x, token, top, normalise, at)
    expected = sampling.token_logprobs(x[at].float(), token, top, normalise)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[2], expected[2])
    torch.testing.assert_close(got[1], expected[1], atol=1e-5, rtol=0, equal_nan=True)
    given = torch.tensor([[0, vocab - 1, vocab // 2]], device=device).repeat(6, 1)
    token = torch.arange(6, device=device) % vocab
    got = logprobs.token_logprobs(x, token, given, normalise)
    expected = sampling.token_logprobs(x.float(), token, given, normalise)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[2], expected[2])
    torch.testing.assert_close(got[1], expected[1], atol=1e-5, rtol=0, equal_nan=True)
    assert math.isfinite(got[1][3].max().item())
