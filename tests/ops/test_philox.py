"""Philox against the known answers of the Random123 library, and the noise made from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quire.ops.philox import gumbel, gumbel_at, gumbel_rows, philox4x32, uniform

FF = 0xFFFFFFFF
# kat_vectors of Random123: philox4x32, 10 rounds
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((FF, FF, FF, FF), (FF, FF), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def plain_philox(counter, key):
    """The paper's round function on Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & FF, (p0 >> 32) ^ c[3] ^ k[1], p0 & FF]
        k = [(k[0] + 0x9E3779B9) & FF, (k[1] + 0xBB67AE85) & FF]
    return tuple(c)


def words(*values):
    return tuple(torch.tensor([v], dtype=torch.int64) for v in values)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    assert tuple(int(w) for w in philox4x32(words(*counter), words(*key))) == expected  # type: ignore[arg-type]
    assert plain_philox(counter, key) == expected


def test_fewer_rounds_differ():
    """The check above would see a wrong number of rounds."""
    assert int(philox4x32(words(0, 0, 0, 0), words(0, 0), rounds=7)[0]) != KNOWN[0][2][0]  # type: ignore[arg-type]


def test_counter_layout_and_full_seed():
    """key = seed (low word first), counter = (token // 4, position, sample, 0), lane = token % 4."""
    seed, sample, position, vocab = 0xDEADBEEF_01234567, 3, 70_000, 23
    signed = seed - 2**64
    rows = gumbel_rows(*(torch.tensor([v]) for v in (signed, sample, position)), vocab)
    expected = [plain_philox((t // 4, position, sample, 0), (seed & FF, seed >> 32))[t % 4] for t in range(vocab)]
    assert torch.equal(rows[0], gumbel(torch.tensor(expected)))


def test_single_tokens_equal_rows():
    generator = torch.Generator().manual_seed(1)
    seed, sample, position = (torch.randint(0, 2**31, (5,), generator=generator) for _ in range(3))
    full = gumbel_rows(seed, sample, position, 1001)
    row = torch.randint(0, 5, (300,), generator=generator)
    token = torch.randint(0, 1001, (300,), generator=generator)
    assert torch.equal(gumbel_at(seed[row], sample[row], position[row], token), full[row, token])


def test_noise_depends_on_each_key_alone():
    def noise(seed, sample, position):
        return gumbel_rows(*(torch.tensor([v]) for v in (seed, sample, position)), 64)

    base = noise(1, 2, 3)
    assert torch.equal(base, noise(1, 2, 3))
    for other in (noise(2, 2, 3), noise(1 + 2**40, 2, 3), noise(1, 3, 3), noise(1, 2, 4)):
        assert not torch.isclose(base, other).any()


def test_uniform_is_open():
    u = uniform(torch.tensor([0, 1, FF - 1, FF]))
    assert u.min() > 0 and u.max() < 1
    assert u.dtype == torch.float32
    assert torch.isfinite(gumbel(torch.tensor([0, FF]))).all()


def test_gumbel_distribution():
    """Mean Euler's gamma, variance pi^2 / 6, and the distribution function at a few quantiles."""
    g = gumbel_rows(torch.tensor([7]), torch.tensor([0]), torch.tensor([11]), 200_000)[0].double().numpy()
    assert g.mean() == pytest.approx(np.euler_gamma, abs=0.012)
    assert g.var() == pytest.approx(np.pi**2 / 6, abs=0.03)
    for x in (-1.0, 0.0, 1.0, 3.0):
        assert (g <= x).mean() == pytest.approx(np.exp(-np.exp(-x)), abs=0.005)
