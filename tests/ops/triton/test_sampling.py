"""Sampling in Triton against the reference. Tokens of draws with noise may differ only where the reference's two best
scores are nearer than the last places of a logarithm can tell: 1e-5."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quire.ops import sampling
from quire.ops.philox import gumbel_rows
from quire.ops.sampling import NEG_INF, Noise
from quire.ops.triton import sampling as ours

# the interpreter computes with NumPy, which warns of what is meant: inf - inf, 0 to the power
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

NEAR = 1e-5
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def noise_of(rows: int, seed: int, device: str) -> Noise:
    g = torch.Generator().manual_seed(seed)
    numbers = torch.randint(-(2**63), 2**63 - 1, (3, rows), generator=g)
    return Noise(numbers[0].to(device), (numbers[1] & 7).to(device), (numbers[2] & 0xFFFFF).to(device))


def assert_tokens(got: Tensor, expected: Tensor, score_SV: Tensor) -> None:
    """Equal, or the best and the second best score are too near to tell."""
    best = score_SV.topk(min(2, score_SV.shape[1]), dim=-1).values
    for s in (got != expected).nonzero().flatten().tolist():
        assert best[s, 0] - best[s, -1] < NEAR, (s, got[s], expected[s], best[s])
        assert best[s, 0] - score_SV[s, got[s]] < NEAR
    assert (got != expected).sum() <= max(1, len(got) // 50)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (3, 5), (2, 1000), (5, 2049), (2, 5003)])
def test_greedy(dtype: torch.dtype, rows: int, vocab: int, device: str) -> None:
    """Ties (of zeros with different signs too) go to the lowest id; NaN is the largest; a masked row has token 0."""
    g = torch.Generator().manual_seed(vocab)
    x = (torch.randn(rows, vocab, generator=g) * 4).round().div(2).to(device, dtype)
    x[rows // 2, torch.randint(vocab, (vocab // 2 + 1,), generator=g)] = NEG_INF
    if vocab > 5:
        x[0, 3:], x[0, :3], x[0, 700:702] = -0.0, NEG_INF, 0.0
    for strange in (None, float("nan"), float("inf"), NEG_INF):
        if strange is not None:
            x[-1] = NEG_INF if strange == NEG_INF else x[-1]
            x[-1, [vocab // 3, vocab - 1]] = strange
        tokens, top = ours.draw_greedy(x)
        expected, expected_top = sampling.draw_greedy(x)
        assert tokens.dtype == torch.int64 and top.dtype == torch.float32
        assert torch.equal(tokens, expected)
        assert torch.equal(top.nan_to_num(7.0), expected_top.float().nan_to_num(7.0))


def test_greedy_of_a_strided_buffer(device: str) -> None:
    wide = torch.randn(4, 3100, generator=torch.Generator().manual_seed(1)).to(device)
    assert torch.equal(ours.draw_greedy(wide[:, 64:3064])[0], wide[:, 64:3064].argmax(-1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab", "scale"), [(3, 5, 1.0), (40, 1001, 3.0), (9, 5003, 0.1), (6, 4099, 12.0)])
def test_noise(dtype: torch.dtype, rows: int, vocab: int, scale: float, device: str) -> None:
    g = torch.Generator().manual_seed(rows)
    logits = (torch.randn(rows, vocab, generator=g) * scale).to(device, dtype)
    logits[1, torch.rand(vocab, generator=g).to(device) < 0.6] = NEG_INF
    temperature = torch.tensor([1.0, 0.3, 0.7, 1.9])[torch.randint(4, (rows,), generator=g)].to(device)
    greedy, noise = (torch.arange(rows) % 5 == 2).to(device), noise_of(rows, vocab, device)
    tokens, top = ours.draw_noise(logits, temperature, greedy, noise)
    x = logits.float() / temperature[:, None]
    assert torch.equal(top, x.amax(-1))
    score = x + gumbel_rows(*noise, vocab).masked_fill(greedy[:, None], 0.0)
    assert_tokens(tokens, score.argmax(-1), score)
    assert torch.equal(tokens[greedy], x[greedy].argmax(-1))
    one = slice(rows // 2, rows // 2 + 1)
    alone = ours.draw_noise(logits[one], temperature[one], greedy[one], noise.take(one))
    assert torch.equal(alone[0], tokens[one]) and torch.equal(alone[1], top[one])


def test_noise_of_rows_that_cannot_be_drawn(device: str) -> None:
    x = torch.randn(5, 3000, generator=torch.Generator().manual_seed(6)).to(device)
    x[1, [5, 2500]], x[2], x[3, [7, 2900]] = float("nan"), NEG_INF, float("inf")
    x[4, :] = NEG_INF
    x[4, 2999] = -3.0
    ones, greedy = torch.ones(5, device=device), torch.zeros(5, dtype=torch.bool, device=device)
    tokens, top = ours.draw_noise(x, ones, greedy, noise_of(5, 1, device))
    assert torch.equal(top.nan_to_num(99.0), x.amax(-1).nan_to_num(99.0)) and top[1].isnan()
    assert tokens[2] == 0 and tokens[3] == 7 and tokens[4] == 2999
    assert ((tokens >= 0) & (tokens < 3000)).all()
