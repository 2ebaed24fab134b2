"""Counter-based random numbers: Philox4x32-10, and the Gumbel noise of sampling that is made from it.

Owns: the generator and the layout of its counters. Knows nothing of logits, rows or requests.

Philox is from Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). It is a pure
function of (key, counter), so the noise of a token depends on its request's seed, sample index, position and token id
only: it is the same in any batch, on any device, and when a dropped step is drawn again.

Words are kept in int64 tensors with values in [0, 2^32), because torch has no unsigned 32-bit arithmetic everywhere.
The product of two words wraps modulo 2^64, whose bits are right whatever the sign.

Shape legend: S rows, V vocabulary, N single (row, token) pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

Words = tuple[Tensor, Tensor, Tensor, Tensor]

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)  # golden ratio, sqrt(3) - 1


def philox4x32(counter: Words, key: tuple[Tensor, Tensor], rounds: int = 10) -> Words:
    """Four pseudo-random words for each counter.

    counter: four int64 tensors of words; key: two; all broadcast against each other, and they are left unexpanded as
    long as possible: what is equal along a row is computed once in the first rounds.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    m0, m1 = _MULTIPLIERS
    for i in range(rounds):
        if i:
            k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
        p0, p1 = c0 * m0, c2 * m1
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
    return c0, c1, c2, c3


def uniform(words: Tensor) -> Tensor:
    """float32 in the open interval (0, 1) from words in [0, 2^32): 2^-33 at least, 1 - 2^-24 at most.

    Both operations are exact or rounded once, so the value is the same on every device. Near 0 the steps are 2^-32.
    """
    return (words.to(torch.float32) * 2.0**-32 + 2.0**-33).clamp_max_(1.0 - 2.0**-24)


def gumbel(words: Tensor) -> Tensor:
    """Standard Gumbel noise, float32, between -2.9 and 22.9.

    -log(-log(1 - u)) rather than -log(-log(u)): the large values, which decide who wins, come from u near 0, where
    float32 resolves 2^-32; near 1 it would resolve 2^-24 only, and a large vocabulary would see ties.
    """
    return -torch.log(-torch.log1p(-uniform(words)))


def _key(seed: Tensor) -> tuple[Tensor, Tensor]:
    return seed & _MASK, (seed >> 32) & _MASK


def gumbel_rows(seed_S: Tensor, sample_S: Tensor, position_S: Tensor, vocab_size: int) -> Tensor:
    """Noise of every token of each row, float32 (S, V). All arguments int64; the seed's 64 bits are the key."""
    quads = torch.arange((vocab_size + 3) // 4, device=seed_S.device).unsqueeze(0)
    column = [t.unsqueeze(1) for t in (position_S, sample_S, *_key(seed_S))]
    position, sample, k0, k1 = column
    words = philox4x32((quads, position & _MASK, sample & _MASK, torch.zeros_like(sample)), (k0, k1))
    return gumbel(torch.stack(words, dim=-1).flatten(1)[:, :vocab_size])


def gumbel_at(seed_N: Tensor, sample_N: Tensor, position_N: Tensor, token_N: Tensor) -> Tensor:
    """Noise of single tokens, float32 (N,): the same values that `gumbel_rows` has at these tokens. All int64."""
    counter = (token_N >> 2, position_N & _MASK, sample_N & _MASK, torch.zeros_like(token_N))
    words = torch.stack(philox4x32(counter, _key(seed_N)), dim=-1)
    return gumbel(words.gather(-1, (token_N & 3).unsqueeze(-1)).squeeze(-1))
