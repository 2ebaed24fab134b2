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
    for g, s in enumerate(at.tolist()):
        one = slice(g, g + 1)
        sampling.add_edits(expected[s : s + 1], ids[one], values[one], until[one], drawn[one])
    for add_edits in (changes.add_edits, sampling.add_edits):
        got = x.clone()
        add_edits(got, ids, values, until, drawn, at if some else None)
        assert torch.equal(got, expected)


@pytest.mark.parametrize(("count", "length"), [(1, 2), (70, 4)])
@pytest.mark.parametrize("some", [False, True])
def test_words(count: int, length: int, some: bool, device: torch.device) -> None:
    """Of two tokens, so that many match; one word twice, one without tokens."""
    x, g = logits_of(6, 40, device), torch.Generator().manual_seed(7)
    at = torch.tensor([4, 1, 2] if some else list(range(6)), device=device)
    words = torch.randint(0, 2, (len(at), count, length), generator=g)
    words[:, :, 0] = torch.randint(0, 40, (len(at), count), generator=g)
    ends = torch.randint(1, length + 1, (len(at), count, 1), generator=g)
    words[torch.arange(length) >= ends] = -1
    words[0, 0], words[:, -1] = -1, words[:, 0]
    tail = torch.randint(0, 2, (len(at), length - 1), generator=g)
    tail[1] = -2
    expected = x.clone()
    for i, s in enumerate(at.tolist()):
        for word in words[i].tolist():
            ahead = [token for token in word[1:] if token >= 0]
            if word[0] >= 0 and ahead == tail[i].tolist()[: len(ahead)]:
                expected[s, word[0]] = NEG_INF
    assert 0 < int((expected != x).sum()) < x.numel() * 0.7
    for forbid_words in (changes.forbid_words, sampling.forbid_words):
        got = x.clone()
        forbid_words(got, words.to(device), tail.to(device), at if some else None)
        assert torch.equal(got, expected)


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
    given = (
        counts if some else counts[:5],
        repetition,
        presence,
        frequency,
        at if some else None,
        lines if some else None,
    )
    for penalise in (changes.penalise, sampling.penalise):
        got = x.clone()
        penalise(got, *given)
        assert torch.equal(got, expected)


@pytest.mark.parametrize(("vocab", "words"), [(64, 2), (70, 3), (70, 1), (5003, 157)])
@pytest.mark.parametrize("some", [False, True])
def test_mask(vocab: int, words: int, some: bool, device: torch.device) -> None:
    x, g = logits_of(4, vocab, device), torch.Generator().manual_seed(5)
    at = torch.tensor([3, 1] if some else list(range(4)), device=device)
    lines = torch.tensor([2, 4] if some else list(range(4)), device=device)
    bits = torch.randint(-(2**31), 2**31 - 1, (5 if some else 4, words), generator=g).int().to(device)
    expected = x.clone()
    expected[at] = expected[at].masked_fill(~sampling.allowed_bits(bits[lines], vocab), NEG_INF)
    assert not torch.equal(x, expected)
    for mask in (changes.mask, sampling.mask):
        got = [x.clone() for _ in range(2)]
        mask(got[0], bits, at if some else None, lines if some else None)
        mask(got[1], bits[lines], at if some else None)
        assert torch.equal(got[0], expected) and torch.equal(got[1], expected)


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
    assert torch.equal(sampling.token_logprobs(x, token, top, normalise, at)[0], got[0])
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


def test_all_logprobs_are_the_references(device: torch.device) -> None:
    x = logits_of(2, 300, device)
    token = torch.tensor([5, 9], device=device)
    for got, expected in zip(
        logprobs.token_logprobs(x, token, 300, True), sampling.token_logprobs(x, token, 300, True), strict=True
    ):
        assert torch.equal(got, expected) and len(got) == 2
