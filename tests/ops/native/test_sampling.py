"""Native sampling against the reference: the same tokens, and exactly the same sets of survivors."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from quire.ops import sampling
from quire.ops.native import program
from quire.ops.native.kernels import Kernels
from quire.ops.sampling import NEG_INF, Noise

Of = Callable[[int], Kernels]


class Rows:
    """Parameters of some rows, drawn at random from what requests ask for."""

    def __init__(self, rows: int, vocab: int, seed: int, most: int | None = None) -> None:
        g = torch.Generator().manual_seed(seed)
        self.most = most or vocab

        def pick(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype)[torch.randint(len(values), (rows,), generator=g)]

        self.temperature = pick(1.0, 1.0, 0.3, 0.7, 1.9)
        self.log_min_p = pick(NEG_INF, NEG_INF, math.log(0.02), math.log(0.6))
        self.top_k = pick(0, 0, 1, 2, 5, 40, 300, self.most, vocab, dtype=torch.int64)
        self.top_p = pick(1.0, 1.0, 0.95, 0.5, 0.05, 1e-6, 0.999999, dtype=torch.float64)
        self.greedy = pick(0, 0, 0, 0, 1).bool()
        self.temperature[self.greedy], self.log_min_p[self.greedy] = 1.0, 0.0
        self.top_k[self.greedy], self.top_p[self.greedy] = 0, 1.0
        numbers = torch.randint(-(2**63), 2**63 - 1, (3, rows), generator=g)
        self.noise = Noise(numbers[0], numbers[1] & 7, numbers[2] & 0xFFFFF)

    def run(self, f: Callable[..., tuple[Tensor, Tensor, Tensor]], x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = x.clone()
        max_k = int(self.top_k.max())
        out = f(
            x, self.temperature, self.log_min_p, self.top_k, self.top_p, self.greedy, self.noise, max_k,
            bool((self.top_p < 1).any()),
        )  # fmt: skip
        return *out, x

    def check(self, kernels: Kernels, x: Tensor) -> Tensor:
        tokens, top, low, scaled = self.run(sampling.sample, x)
        got, got_top, got_low, got_scaled = self.run(kernels.sample, x)
        assert torch.equal(scaled.nan_to_num(7.0), got_scaled.nan_to_num(7.0)), "logits are scaled in place"
        assert torch.equal(top.nan_to_num(7.0), got_top.nan_to_num(7.0))
        assert torch.equal(scaled >= low.unsqueeze(1), scaled >= got_low.unsqueeze(1)), "survivors"
        assert torch.equal(tokens, got)
        return tokens


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 9), vocab=st.sampled_from([1, 2, 7, 63, 64, 65, 300, 1000, 5003]), seed=st.integers(0, 10**6),
    scale=st.sampled_from([0.01, 1.0, 4.0, 30.0]), steps=st.sampled_from([0, 2, 16]), hidden=st.booleans(),
    strange=st.sampled_from([None, None, math.nan, math.inf, NEG_INF]), threads=st.integers(1, 3),
)  # fmt: skip
def test_equals_the_reference(
    kernels: Of, rows: int, vocab: int, seed: int, scale: float, steps: int, hidden: bool, strange: float | None,
    threads: int,
) -> None:  # fmt: skip
    """`steps`: logits in so many steps of one, so that many are equal. `hidden`: masked tokens; `strange`: in a row."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, vocab, generator=g) * scale
    if steps:
        x = (x * steps).round() / steps
    if hidden:
        x[torch.rand(rows, vocab, generator=g) < 0.7] = NEG_INF
    if strange is not None:
        x[rows // 2, torch.randint(vocab, (3,), generator=g)] = strange
    Rows(rows, vocab, seed).check(kernels(threads), x)


@pytest.mark.parametrize("scale", [0.001, 1.0, 3.0, 9.0])
def test_large_vocabularies(kernels: Of, scale: float) -> None:
    """As peaked as a model's rows and as flat as noise: candidates are found by each of the ways there are."""
    g = torch.Generator().manual_seed(int(scale * 1000))
    x = torch.randn(24, 49152, generator=g) * scale
    x[12:, :20] += 4 * scale
    tokens = Rows(24, 49152, 5, most=9000).check(kernels(2), x)
    assert len(set(tokens.tolist())) > 8


def test_a_row_of_a_strided_buffer(kernels: Of) -> None:
    wide = torch.randn(6, 1100, generator=torch.Generator().manual_seed(2))
    Rows(6, 1000, 3).check(kernels(2), wide[:, 50:1050])
    parameters, x = Rows(6, 1000, 3), wide[:, 50:1050]
    before, expected = wide[:, :50].clone(), parameters.run(sampling.sample, x)
    got = kernels(2).sample(
        x, parameters.temperature, parameters.log_min_p, parameters.top_k, parameters.top_p, parameters.greedy,
        parameters.noise, 1000, True,
    )  # fmt: skip
    assert torch.equal(got[0], expected[0]) and torch.equal(x, expected[3])
    assert torch.equal(wide[:, :50], before)


def test_few_rows_are_left_to_the_reference(kernels: Of) -> None:
    """The kernel decides itself, nearly always; equal scores are what it must not decide."""
    rows, vocab = 4000, 200
    x = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(8)) * 2
    of = Rows(rows, vocab, 4)
    tokens, top, low = torch.empty(rows, dtype=torch.int64), torch.empty(rows), torch.empty(rows)
    op = program.sample(
        x, of.temperature, of.log_min_p, of.top_k, of.top_p, of.greedy, of.noise, tokens, top, low, rows
    )
    kernels(2).pool.run(op)
    assert (tokens < 0).sum() <= 4
    x[:] = math.nan
    kernels(2).pool.run(op)
    assert (tokens == -1).all()
