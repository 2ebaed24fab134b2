"""The sampling ops against plain numpy, and the exactness that they promise: one result whatever the way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.ops.philox import gumbel_rows
from quire.ops.sampling import (
    IN_PROMPT,
    NEG_INF,
    Noise,
    add_edits,
    draw,
    draw_greedy,
    forbid_words,
    penalise,
    thresholds,
    token_logprobs,
    top_logits,
)

INF = float("inf")


def noise_of(rows, seed=3):
    return Noise(torch.arange(rows) + seed, torch.zeros(rows, dtype=torch.int64), torch.full((rows,), 17))


def cut(x, min_p, top_k, top_p, static=False, max_k=None):
    """thresholds() with lists; NaN-free rows."""
    log_min_p = torch.tensor([np.log(p) if p else NEG_INF for p in min_p], dtype=torch.float32)
    max_k = max(top_k) if max_k is None else max_k
    arguments = log_min_p, torch.tensor(top_k), torch.tensor(top_p, dtype=torch.float64)
    return thresholds(x, *arguments, max_k, any(p < 1 for p in top_p), static)[0]


def plain_survivors(x, min_p, top_k, top_p):
    """Ids that survive, in float64 by sorting, equal logits together. None where a float's width decides."""
    x = np.asarray(x, dtype=np.float64)
    p = np.exp(x - x.max())
    p /= p.sum()
    alive = p >= min_p * p.max() * (1 - 1e-6)
    if 0 < top_k < len(x):
        alive &= x >= np.sort(x)[::-1][top_k - 1]
    if top_p < 1:
        q = np.where(alive, p, 0) / p[alive].sum()
        ahead = np.array([q[x > value].sum() for value in x])  # the mass of strictly likelier tokens
        if np.min(np.abs(ahead - top_p)) < 1e-5:
            return None
        # a group of equal tokens is entered if the mass before its first member is short of top_p
        alive &= ahead < top_p
    return set(np.flatnonzero(alive).tolist())


rows_of_logits = st.lists(
    st.lists(st.integers(-20, 20).map(lambda i: i / 4), min_size=11, max_size=11), min_size=1, max_size=4
)


@settings(max_examples=150, deadline=None)
@given(rows_of_logits, st.data())
def test_thresholds_equal_plain_sorting(logits, data):
    x = torch.tensor(logits, dtype=torch.float32)
    n = len(logits)
    min_p = data.draw(st.lists(st.sampled_from([0.0, 0.0, 0.03, 0.31, 1.0]), min_size=n, max_size=n))
    top_k = data.draw(st.lists(st.sampled_from([0, 0, 1, 2, 5, 11, 40]), min_size=n, max_size=n))
    top_p = data.draw(st.lists(st.sampled_from([1.0, 1.0, 0.977, 0.613, 0.107, 1e-6]), min_size=n, max_size=n))
    low = cut(x, min_p, top_k, top_p)
    for s in range(n):
        expected = plain_survivors(logits[s], min_p[s], top_k[s], top_p[s])
        if expected is not None:
            assert set(torch.nonzero(x[s] >= low[s]).flatten().tolist()) == expected
    assert torch.equal(low, cut(x, min_p, top_k, top_p, static=True))
    assert torch.equal(low, cut(x, min_p, top_k, top_p, max_k=11))


@pytest.mark.parametrize("scale", [0.01, 1.0, 6.0])
def test_nucleus_wider_than_the_first_look(scale):
    """Flat rows need the full sort, peaked rows do not; both give the threshold that a full sort gives."""
    x = torch.randn(5, 3000, generator=torch.Generator().manual_seed(2)) * scale
    top_p = [0.9, 0.5, 1.0, 0.05, 0.999]
    low = cut(x, [0.0] * 5, [0, 700, 0, 0, 0], top_p)
    assert torch.equal(low, cut(x, [0.0] * 5, [0, 700, 0, 0, 0], top_p, static=True))
    for s, (k, p) in enumerate(zip([0, 700, 0, 0, 0], top_p, strict=True)):
        expected = plain_survivors(x[s].tolist(), 0.0, k, p)
        if expected is not None:
            assert int((x[s] >= low[s]).sum()) == len(expected)
        alone = cut(x[s : s + 1], [0.0], [k], [p])
        assert torch.equal(low[s : s + 1], alone)


def test_truncation_with_infinite_logits():
    x = torch.tensor([[0.0, INF, 1.0, INF], [NEG_INF, 2.0, NEG_INF, 1.9]])
    low = cut(x, [0.0, 0.0], [3, 0], [0.5, 0.5])
    assert (x >= low.unsqueeze(1)).tolist() == [[False, True, False, True], [False, True, False, False]]


@pytest.mark.parametrize("vocab", [5, 1001])
def test_every_way_of_drawing_gives_the_same_token(vocab):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(40, vocab, generator=generator) * 3
    low = x.sort(-1).values[torch.arange(40), torch.randint(0, vocab, (40,), generator=generator)]
    greedy = torch.arange(40) % 5 == 0
    low = torch.where(greedy, x.amax(-1), low)
    noise = noise_of(40)
    tokens = draw(x, low, greedy, noise, static=False)
    assert torch.equal(tokens, draw(x, low, greedy, noise, static=True))
    assert torch.equal(tokens[greedy], x[greedy].argmax(-1))
    score = gumbel_rows(*noise, vocab) + x
    score[x < low.unsqueeze(1)] = NEG_INF
    assert torch.equal(tokens[~greedy], score[~greedy].argmax(-1))
    assert len(set(tokens.tolist())) > 3
    order = torch.randperm(40, generator=generator)[:7]
    assert torch.equal(tokens[order], draw(x[order], low[order], greedy[order], noise.take(order), static=False))


def test_equal_scores_go_to_the_lowest_id():
    x = torch.tensor([[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    assert draw_greedy(x)[0].tolist() == [1, 0]
    greedy = torch.tensor([True, True])
    for static in (True, False):
        assert draw(x, x.amax(-1), greedy, noise_of(2), static).tolist() == [1, 0]


def test_rows_without_survivors_do_not_disturb():
    x = torch.tensor([[float("nan")] * 3, [0.0, 5.0, 1.0], [NEG_INF] * 3])
    greedy = torch.tensor([False, True, False])
    log_min_p, top_k, top_p = torch.tensor([NEG_INF, 0.0, NEG_INF]), torch.tensor([0, 0, 2]), torch.ones(3).double()
    low, top = thresholds(x, log_min_p, top_k, top_p, max_k=2, nucleus=False, static=False)
    tokens = draw(x, low, greedy, noise_of(3), static=False)
    assert tokens[1] == 1
    assert ((tokens >= 0) & (tokens < 3)).all()
    assert torch.isnan(top[0]) and top[2] == NEG_INF


def test_distribution_chi_square():
    """100,000 draws under top_k against their softmax: chi-square below its 99.9 % quantile (6 degrees: 22.46)."""
    count, x_V = 100_000, torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -9.0, 1.5, 0.25, -0.5])
    x = x_V.expand(count, -1)
    low = cut(x[:1], [0.0], [7], [1.0]).expand(count)
    noise = Noise(torch.full((count,), 99), torch.arange(count) % 8, torch.arange(count) // 8)
    tokens = draw(x, low, torch.zeros(count, dtype=torch.bool), noise, static=False).numpy()
    p = np.where(x_V.numpy() >= float(low[0]), np.exp(x_V.numpy()), 0)
    p /= p.sum()
    seen = np.bincount(tokens, minlength=9)
    assert seen[p == 0].sum() == 0
    on = p > 0
    assert on.sum() == 7
    chi = (((seen - count * p) ** 2)[on] / (count * p)[on]).sum()
    assert chi < 22.46
    wrong = np.roll(p[on], 1)
    assert (((seen[on] - count * wrong) ** 2) / (count * wrong)).sum() > 1000  # the test can fail


def test_penalties():
    logits = torch.tensor([[2.0, -2.0, 1.0, -1.0, 0.0]]).repeat(2, 1)
    counts = torch.tensor([[IN_PROMPT, 2, IN_PROMPT + 1, 0, 1], [IN_PROMPT, 2, IN_PROMPT + 1, 0, 1]], dtype=torch.int32)
    penalise(logits, counts, torch.tensor([2.0, 1.0]), torch.tensor([0.25, 0.0]), torch.tensor([0.5, 0.0]))
    # prompt only: repetition alone; twice drawn: -2 * 2 - 2 * 0.5 - 0.25; both: 1 / 2 - 0.5 - 0.25
    assert logits[0].tolist() == [1.0, -5.25, -0.25, -1.0, -0.75]
    assert logits[1].tolist() == [2.0, -2.0, 1.0, -1.0, 0.0]


def test_edits_end():
    logits = torch.zeros(3, 4)
    ids, values = torch.tensor([[1, 3, 0]] * 3), torch.tensor([[NEG_INF, 2.0, 0.0]] * 3)
    add_edits(logits, ids, values, torch.tensor([[5, 2**62, 2**62]] * 3), torch.tensor([4, 5, 6]))
    assert logits[:, 1].tolist() == [NEG_INF, 0.0, 0.0]
    assert logits[:, 3].tolist() == [2.0] * 3
    assert (logits[:, [0, 2]] == 0).all()


def test_words_complete_only_after_their_begin():
    """Words [7 8 2] and [8 3], each back to front."""
    words = torch.tensor([[[2, 8, 7], [3, 8, -1], [-1, -1, -1]]]).repeat(4, 1, 1)
    tail = torch.tensor([[8, 7], [8, 6], [7, 8], [8, -2]])
    logits = torch.zeros(4, 9)
    forbid_words(logits, words, tail)
    masked = [torch.nonzero(row == NEG_INF).flatten().tolist() for row in logits]
    assert masked == [[2, 3], [3], [], [3]]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([0.0, -0.0, 1.5, -1.5, 2.0**-130, -7.0, NEG_INF, INF]), min_size=6, max_size=6))
def test_top_logits_order(row):
    values, ids = top_logits(torch.tensor([row]), 6)
    assert ids[0].tolist() == sorted(range(6), key=lambda i: (-row[i], i))
    assert values[0].tolist() == [row[i] for i in ids[0].tolist()]


def test_token_logprobs():
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(5))
    x[:, 9] = x[:, 4]
    expected = x.double().log_softmax(-1)
    ids, values, ranks = token_logprobs(x, torch.tensor([4, 9, 0]), 5, normalise=True)
    assert ids.shape == values.shape == (3, 6)
    for s, token in enumerate([4, 9, 0]):
        assert ids[s, 0] == token
        assert ids[s, 1:].tolist() == expected[s].sort(descending=True, stable=True).indices[:5].tolist()
        assert torch.allclose(values[s].double(), expected[s][ids[s]], atol=1e-5)
        assert ranks[s] == 1 + int((x[s] > x[s, token]).sum())
    ids, values, _ = token_logprobs(x, torch.tensor([4, 9, 0]), torch.tensor([[1, 2]] * 3), normalise=False)
    assert ids.tolist() == [[4, 1, 2], [9, 1, 2], [0, 1, 2]]
    assert torch.equal(values[0], x[0, [4, 1, 2]])


def test_nothing_reads_a_value():
    """Tensors without values: what waits for the device, or has a size that depends on values, raises."""
    s, v = 3, 40

    def meta(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    whole = torch.int64
    x, rows, index = meta(s, v), meta(s), meta(s, dtype=whole)
    noise = Noise(index, index, index)
    add_edits(x, meta(s, 5, dtype=whole), meta(s, 5), meta(s, 5, dtype=whole), index)
    forbid_words(x, meta(s, 2, 3, dtype=whole), meta(s, 2, dtype=whole))
    penalise(x, meta(s, v, dtype=torch.int32), rows, rows, rows)
    assert draw_greedy(x)[0].shape == (s,)
    low, top = thresholds(x, rows, index, rows.double(), max_k=8, nucleus=True, static=True)
    assert low.shape == top.shape == (s,)
    assert draw(x, low, meta(s, dtype=torch.bool), noise, static=True).shape == (s,)
    ids, values, ranks = token_logprobs(x, index, 4, normalise=True)
    assert (ids.shape, values.shape, ranks.shape) == ((s, 5), (s, 5), (s,))
    with pytest.raises((RuntimeError, NotImplementedError)):
        draw(x, low, meta(s, dtype=torch.bool), noise, static=False)
