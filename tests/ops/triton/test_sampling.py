"""Sampling in Triton against the reference. Tokens of draws with noise may differ only where the reference's two best
scores are nearer than the last places of a logarithm can tell: 1e-5."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quire.ops import sampling
from quire.ops.philox import gumbel_rows
from quire.ops.sampling import NEG_INF, Kind, Noise, Out, Real, Whole
from quire.ops.triton import sampling as ours

# the interpreter computes with NumPy, which warns of what is meant: inf - inf, 0 to the power
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

NEAR = 1e-5
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def noise_of(rows: int, seed: int, device: torch.device) -> Noise:
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
def test_greedy(dtype: torch.dtype, rows: int, vocab: int, device: torch.device) -> None:
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


def test_greedy_of_a_strided_buffer(device: torch.device) -> None:
    wide = torch.randn(4, 3100, generator=torch.Generator().manual_seed(1)).to(device)
    assert torch.equal(ours.draw_greedy(wide[:, 64:3064])[0], wide[:, 64:3064].argmax(-1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab", "scale"), [(3, 5, 1.0), (12, 1001, 3.0), (5, 5003, 0.1), (4, 4099, 12.0)])
def test_noise(dtype: torch.dtype, rows: int, vocab: int, scale: float, device: torch.device) -> None:
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


def test_noise_of_rows_that_cannot_be_drawn(device: torch.device) -> None:
    x = torch.randn(5, 3000, generator=torch.Generator().manual_seed(6)).to(device)
    x[1, [5, 2500]], x[2], x[3, [7, 2900]] = float("nan"), NEG_INF, float("inf")
    x[4, :] = NEG_INF
    x[4, 2999] = -3.0
    ones, greedy = torch.ones(5, device=device), torch.zeros(5, dtype=torch.bool, device=device)
    tokens, top = ours.draw_noise(x, ones, greedy, noise_of(5, 1, device))
    assert torch.equal(top.nan_to_num(99.0), x.amax(-1).nan_to_num(99.0)) and top[1].isnan()
    assert tokens[2] == 0 and tokens[3] == 7 and tokens[4] == 2999
    assert ((tokens >= 0) & (tokens < 3000)).all()


class Rows:
    """Parameters of some rows, drawn at random from what requests ask for."""

    def __init__(self, rows: int, vocab: int, seed: int, device: torch.device, most: int | None = None) -> None:
        g = torch.Generator().manual_seed(seed)

        def pick(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype)[torch.randint(len(values), (rows,), generator=g)].to(device)

        self.temperature = pick(1.0, 1.0, 0.3, 0.7, 1.9)
        self.log_min_p = pick(NEG_INF, NEG_INF, math.log(0.02), math.log(0.6))
        self.top_k = pick(0, 0, 1, 2, 5, 40, 300, most or vocab, vocab, dtype=torch.int64)
        self.top_p = pick(1.0, 1.0, 0.95, 0.5, 0.05, 1e-6, 0.999999, dtype=torch.float64)
        self.greedy = pick(0, 0, 0, 0, 1).bool()
        self.temperature[self.greedy], self.log_min_p[self.greedy] = 1.0, 0.0
        self.top_k[self.greedy], self.top_p[self.greedy] = 0, 1.0
        self.noise = noise_of(rows, seed, device)

    def run(self, f: Callable[..., tuple[Tensor, Tensor, Tensor]], x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = x.clone()
        torch.full((1 << 20,), 1 << 40, device=x.device)  # memory that was used before: nothing may count on zeros
        parameters = self.temperature, self.log_min_p, self.top_k, self.top_p, self.greedy, self.noise
        return *f(x, *parameters, int(self.top_k.max()), bool((self.top_p < 1).any()), True), x

    def tables(self) -> tuple[Tensor, Tensor]:
        """As in SamplingState, rows in order."""
        zeros = torch.zeros_like(self.top_p)
        real = {Real.TEMPERATURE: self.temperature, Real.LOG_MIN_P: self.log_min_p, Real.TOP_P: self.top_p}
        whole = {
            Whole.SEED: self.noise.seed, Whole.SAMPLE: self.noise.sample, Whole.TOP_K: self.top_k,
            Whole.GREEDY: self.greedy, Whole.PROMPT_LENGTH: zeros,
        }  # fmt: skip
        reals = torch.stack([real.get(c, zeros).double() for c in Real], 1)
        return reals, torch.stack([whole[c].long() for c in Whole], 1)

    def check(self, x: Tensor) -> Tensor:
        """Rows with NaN, or wholly masked, are compared by their largest logit alone."""
        tokens, top, low, scaled = self.run(sampling.sample, x)
        got, got_top, got_low, got_scaled = self.run(ours.sample, x)
        assert torch.equal(scaled.nan_to_num(7.0), got_scaled.nan_to_num(7.0)), "logits are scaled in place"
        assert torch.equal(top.nan_to_num(7.0), got_top.nan_to_num(7.0))
        assert ((got >= 0) & (got < x.shape[1])).all()
        good = top > NEG_INF
        assert torch.equal((scaled >= low[:, None])[good], (scaled >= got_low[:, None])[good]), "survivors"
        cut = good & (scaled < low[:, None]).any(
            -1
        )  # a nucleus of all tokens has no threshold there, and its least here
        assert torch.equal(low[cut], got_low[cut]), "thresholds"
        score = scaled + gumbel_rows(*self.noise, x.shape[1]).masked_fill(self.greedy[:, None], 0.0)
        score[scaled < low[:, None]] = NEG_INF
        assert_tokens(got[good], tokens[good], score[good])
        return got


@pytest.mark.parametrize("strange", [None, math.nan, math.inf, NEG_INF])
@pytest.mark.parametrize("vocab", [1, 2, 7, 127, 300, 2049, 5003])
def test_equals_the_reference(vocab: int, strange: float | None, device: torch.device) -> None:
    """Peaked and flat rows, many equal logits, masked tokens, numbers that are not finite."""
    g = torch.Generator().manual_seed(vocab)
    for seed, (scale, steps, hidden) in enumerate(
        [(1.0, 0, False), (30.0, 2, True), (0.01, 16, False), (4.0, 0, True)]
    ):
        x = torch.randn(6, vocab, generator=g) * scale
        if steps:
            x = (x * steps).round() / steps
        if hidden:
            x[torch.rand(6, vocab, generator=g) < 0.7] = NEG_INF
        if strange is not None:
            x[3, torch.randint(vocab, (3,), generator=g)] = strange
        Rows(6, vocab, seed + 10 * vocab, device).check(x.to(device))


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(3000, 1.0, 0.0), (0, 0.9999, 0.0), (2500, 0.8, 0.001)])
def test_more_candidates_than_the_list_holds(
    top_k: int, top_p: float, min_p: float, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "LIST", 1024)
    x = torch.randn(4, 5003, generator=torch.Generator().manual_seed(top_k))
    x[1], x[2, 100:4900], x[3, 7] = (x[1] * 2).round(), 0.25, math.inf
    rows = Rows(4, 5003, 1, device)
    rows.greedy[:], rows.top_k[:], rows.top_p[:] = False, top_k, top_p
    rows.log_min_p[:] = math.log(min_p) if min_p else NEG_INF
    rows.check(x.to(device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 12])
def test_a_step(dtype: torch.dtype, rows: int, device: torch.device) -> None:
    """Parameters by row from tables, results to every place, padding rows; a row alone as among others, bit for bit."""
    vocab, g = 3000, torch.Generator().manual_seed(rows)
    x = (torch.randn(rows, vocab, generator=g) * 3).to(device, dtype)
    of = Rows(rows, vocab, 5, device)
    at = torch.randperm(rows + 3, generator=g)[:rows].to(device)
    reals = torch.zeros(rows + 3, len(Real), dtype=torch.float64, device=device)
    wholes = torch.zeros(rows + 3, len(Whole), dtype=torch.int64, device=device)
    reals[at], wholes[at] = of.tables()
    if rows > 1:
        x[3, 5], x[4] = math.nan, NEG_INF

    def step(which: slice, rows_S: Tensor, greedy: bool = False) -> Out:
        count = len(rows_S)
        packed = torch.full((count, 2), -9, dtype=torch.int32, device=device)
        last, length = torch.full((2, rows + 4), -9, dtype=torch.int64, device=device)
        out = Out.new(count, device, low=not greedy)._replace(packed_S2=packed, last_X=last, length_X=length)
        positions = of.noise.position[which].int()
        ours.draw_step(x[which], rows_S.int(), positions, reals, wholes, out, Kind.GREEDY if greedy else Kind.TOP_P)
        return out

    before, out = x.clone(), step(slice(None), at)
    expected = of.run(ours.sample, x.float())
    assert torch.equal(before.nan_to_num(7.0), x.nan_to_num(7.0))
    for ours_is, theirs in zip(out, expected[:3], strict=False):
        assert torch.equal(ours_is.nan_to_num(7.0), theirs.nan_to_num(7.0))
    of.check(x.float())
    flags = [1 if math.isnan(v) else 2 if v == NEG_INF else 0 for v in out.top_S.tolist()]
    assert set(flags) == ({0, 1, 2} if rows > 1 else {0})
    assert out.packed_S2.tolist() == [list(pair) for pair in zip(out.tokens_S.tolist(), flags, strict=True)]
    untouched = torch.ones(rows + 4, dtype=torch.bool, device=device).index_fill_(0, at, False)
    for held, values in ((out.last_X, out.tokens_S), (out.length_X, of.noise.position)):
        assert torch.equal(held[at], values) and (held[untouched] == -9).all()
    for s in range(0, rows, 5):
        alone = step(slice(s, s + 1), at[s : s + 1])
        for one, many in zip(alone[:3], out[:3], strict=True):
            assert torch.equal(one.nan_to_num(7.0), many[s : s + 1].nan_to_num(7.0))
    padded = step(slice(0, 1), torch.tensor([rows + 3], device=device))
    assert padded.tokens_S.tolist() == [0] and padded.packed_S2.tolist() == [[0, 2]]
    step(slice(0, 1), torch.tensor([-1], device=device))
    greedy = step(slice(None), at, greedy=True)
    assert torch.equal(greedy.tokens_S, x.argmax(-1)) and torch.equal(greedy.last_X[at], greedy.tokens_S)
    assert torch.equal(greedy.packed_S2[:, 1], out.packed_S2[:, 1])
