"""The sampler: every parameter against a plain reference, rows of many kinds together, faults kept in their row."""

from __future__ import annotations

import math
from importlib.metadata import EntryPoint

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from quire.ops.philox import gumbel_rows
from quire.runner import processors as processors_module
from quire.runner.logits import load_processors
from quire.runner.sampler import Sampler
from quire.runner.sampling_state import Needs
from quire.types.errors import ClientError
from quire.types.params import SamplingParams
from quire.types.plan import NewRow, StepResult, decode, encode, ints

V = 24
INF = float("inf")


def params_of(bad_words_token_ids=(), **fields):
    p = SamplingParams(**fields)
    p.bad_words_token_ids = [list(word) for word in bad_words_token_ids]
    return p


def new_row(row, params, prompt=(1, 2, 3), output=(), seed=0, sample=0, eos=()):
    tokens = [*prompt, *output]
    kept = ints(tokens) if params.needs_history else ints()
    return NewRow(row, params, seed, sample, len(prompt), len(tokens), kept, eos)


def sample(rows, logits, sampler=None, max_rows=16, at=None):
    """Draws for new rows at device rows `at` (default: backwards from the last one) -> (Finished, state)."""
    sampler = sampler or Sampler(V, "cpu")
    state = sampler.new_state(max_rows, 64)
    at = at or [max_rows - 1 - i for i in range(len(rows))]
    for a, row in zip(at, rows, strict=True):
        state.add(replace(row, row=a))
    positions = torch.tensor([r.length for r in rows])
    sampled = sampler(torch.tensor(np.array(logits), dtype=torch.float32), ints(at), positions, state)
    state.append(ints(at), sampled.tokens_S)
    return sampled.finish(), state


# --- every parameter against a plain reference ---


def plain(logits, r, prompt, output):
    """(scaled logits with -inf where dropped, whether a float's width decides) in float64, step by step."""
    p, x = r.params, np.array(logits, dtype=np.float64)
    if p.allowed_token_ids is not None:
        x[[t for t in range(V) if t not in p.allowed_token_ids]] = -INF
    for *begin, last in p.bad_words_token_ids:
        if not begin or output[-len(begin) :] == begin:
            x[last] = -INF
    if len(output) < p.min_tokens:
        x[sorted({*p.all_stop_token_ids, *r.eos_token_ids})] = -INF
    for token, bias in (p.logit_bias or {}).items():
        x[token] += bias
    for token in {*prompt, *output}:
        x[token] = x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
    for token in set(output):
        x[token] -= p.frequency_penalty * output.count(token) + p.presence_penalty
    if p.greedy:
        return x, False
    x /= p.temperature
    close = False
    probs = np.exp(x - x.max())
    x[probs < p.min_p * (1 - 1e-6)] = -INF
    close |= p.min_p > 0 and np.min(np.abs(probs - p.min_p)) < 1e-5 and p.min_p < 1
    if p.top_k and p.top_k < V:
        kth = np.sort(x)[::-1][p.top_k - 1]
        close |= np.sum(np.abs(x - kth) < 1e-5) > 1
        x[x < kth] = -INF
    if p.top_p < 1:
        probs = np.exp(x - x.max())
        probs /= probs.sum()
        ahead = np.array([probs[x > value].sum() for value in x])
        close |= bool(np.min(np.abs(ahead - p.top_p)) < 1e-5)
        close |= len(np.unique(np.round(x[np.isfinite(x)], 5))) < np.isfinite(x).sum()
        x[ahead >= p.top_p] = -INF
    return x, bool(close)


@st.composite
def any_params(draw):
    some = draw(st.sets(st.sampled_from("abcdefghij"), max_size=5))
    ids = st.integers(0, V - 1)
    fields = {"temperature": draw(st.sampled_from([0.0, 0.3, 0.7, 1.0, 1.9])), "max_tokens": 30}
    if "a" in some:
        fields["top_k"] = draw(st.integers(1, V + 3))
    if "b" in some:
        fields["top_p"] = draw(st.floats(0.05, 0.99))
    if "c" in some:
        fields["min_p"] = draw(st.floats(0.01, 0.9))
    if "d" in some:
        fields["repetition_penalty"] = draw(st.sampled_from([0.5, 1.3, 2.0]))
    if "e" in some:
        fields["presence_penalty"] = draw(st.sampled_from([-1.5, 0.7, 2.0]))
    if "f" in some:
        fields["frequency_penalty"] = draw(st.sampled_from([-0.6, 0.4, 1.1]))
    if "g" in some:
        fields["logit_bias"] = draw(st.dictionaries(ids, st.sampled_from([-100.0, -2.0, 3.5, 100.0]), max_size=5))
    if "h" in some:
        fields["allowed_token_ids"] = draw(st.lists(ids, min_size=9, max_size=20, unique=True))
    if "i" in some:
        words = st.lists(st.integers(0, 3), min_size=1, max_size=3)
        fields["bad_words_token_ids"] = draw(st.lists(words, min_size=1, max_size=3))
    if "j" in some:
        fields["min_tokens"] = draw(st.integers(1, 5))
        fields["stop_token_ids"] = draw(st.lists(ids, max_size=2))
    return params_of(**fields)


@st.composite
def any_row(draw):
    params = draw(any_params())
    prompt = draw(st.lists(st.integers(0, V - 1), min_size=1, max_size=6))
    output = draw(st.lists(st.integers(0, 3), max_size=6))
    seed = draw(st.integers(0, 2**64 - 1))
    eos = tuple(draw(st.lists(st.integers(0, V - 1), max_size=2)))
    logits_seed = draw(st.integers(0, 2**31))
    row = new_row(0, params, prompt, output, seed, draw(st.integers(0, 5)), eos)
    return row, prompt, output, np.random.default_rng(logits_seed).normal(scale=2.5, size=V)


def with_all_logits(params):
    params = params.clone()
    params.logprobs = -1
    return params


@settings(max_examples=200, deadline=None)
@given(st.lists(any_row(), min_size=1, max_size=4))
def test_rows_of_any_kind_equal_the_plain_reference(cases):
    rows, logits = [c[0] for c in cases], [c[3] for c in cases]
    shown = [replace(r, params=with_all_logits(r.params)) for r in rows]
    done, _ = sample(shown, logits, Sampler(V, "cpu", logprobs_mode="processed_logits"))
    bare, _ = sample(rows, logits)
    failed = dict(done.failed)
    for s, (r, prompt, output, raw) in enumerate(cases):
        with np.errstate(invalid="ignore"):
            x, close = plain(raw, r, prompt, output)
        if not np.isfinite(x).any():
            assert "every token is masked" in failed[s]
            continue
        assert s not in failed
        line, token = done.logprobs[s], int(done.tokens[s, 0])
        got = np.full(V, np.nan)
        got[line.ids[0]] = line.values[0]
        if not close:
            np.testing.assert_allclose(got, x, atol=2e-4)
        if r.params.greedy:
            score = got
        else:
            seed = r.seed - 2**64 if r.seed >= 2**63 else r.seed
            noise = gumbel_rows(*(torch.tensor([v]) for v in (seed, r.sample_index, r.length)), V)
            score = got + noise[0].numpy().astype(np.float64)
        assert score[token] >= score.max() - 1e-4
        assert bare.tokens[s, 0] == token
        alone, _ = sample([shown[s]], [raw], Sampler(V, "cpu", logprobs_mode="processed_logits"), at=[2])
        assert alone.tokens[0, 0] == token
        again = np.full(V, np.nan)
        again[alone.logprobs[0].ids[0]] = alone.logprobs[0].values[0]
        assert np.array_equal(again, got), "the other rows changed this row's logits"


def test_a_greedy_batch_needs_nothing_but_an_argmax():
    rows = [new_row(0, params_of(temperature=0.0)) for _ in range(3)]
    done, state = sample(rows, np.eye(V)[[5, 0, 23]])
    assert done.tokens.tolist() == [[5], [0], [23]] and done.tokens.dtype == np.int32
    assert done.logprobs is None and done.failed == () and done.accepted.tolist() == [1, 1, 1]
    assert not state.needs.any()


def test_min_tokens_masks_end_tokens_until_reached():
    p = params_of(temperature=0.0, min_tokens=2, stop_token_ids=[4], ignore_eos=True)
    logits = np.zeros(V)
    logits[[4, 7, 9]] = 3, 2, 1
    tokens = [sample([new_row(0, p, output=[9] * n, eos=(7,))], [logits])[0].tokens[0, 0] for n in range(4)]
    assert tokens == [9, 9, 4, 4]


def test_bad_words_look_at_the_output_only():
    p = params_of([[3, 5]], temperature=0.0)
    logits = np.zeros(V)
    logits[[5, 6]] = 2, 1
    draws = [(1, 3), ()], [(1, 2), (3,)], [(1, 2), (3, 4)]
    tokens = [sample([new_row(0, p, prompt, output)], [logits])[0].tokens[0, 0] for prompt, output in draws]
    assert tokens == [5, 6, 5]


# --- noise ---


def test_noise_is_keyed_by_seed_sample_index_and_position():
    p = params_of(temperature=1.0)

    def draws(seed=7, index=0, rows=40, first=3):
        many = [new_row(0, p, prompt=[1] * (first + i), seed=seed, sample=index) for i in range(rows)]
        return sample(many, np.zeros((rows, V)), max_rows=64)[0].tokens[:, 0].tolist()

    base = draws()
    assert base == draws()
    assert base[5:25] == draws(rows=20, first=8)
    assert len(set(base)) > 10
    for other in (draws(seed=8), draws(index=1), draws(seed=7 + 2**32)):
        assert sum(a == b for a, b in zip(base, other, strict=True)) < 12


def test_distribution_of_the_whole_sampler():
    """6,000 draws at temperature 0.7 with top_p against the plain probabilities: chi-square, 99.9 % quantile."""
    rows = 6000
    logits = np.linspace(0, 4, V)[np.random.default_rng(0).permutation(V)]
    p = params_of(temperature=0.7, top_p=0.9)
    many = [new_row(0, p, prompt=[1] * (1 + i % 50), seed=i) for i in range(rows)]
    done, _ = sample(many, np.tile(logits, (rows, 1)), max_rows=rows)
    x, close = plain(logits, new_row(0, p), [1], [])
    assert not close
    expected = np.exp(x - x.max()) / np.exp(x - x.max()).sum() * rows
    seen = np.bincount(done.tokens[:, 0], minlength=V)
    on = expected > 0
    degrees = on.sum() - 1
    assert degrees >= 8 and seen[~on].sum() == 0
    chi = ((seen - expected)[on] ** 2 / expected[on]).sum()
    assert chi < degrees + 3.1 * math.sqrt(2 * degrees) + 6


# --- histories ---


def drawing(params, logits, steps, state_sampler=None):
    """Draws `steps` tokens with the same logits each time through append."""
    sampler = state_sampler or Sampler(V, "cpu")
    state = sampler.new_state(4, 64)
    state.add(new_row(1, params, eos=(0,)))
    out = []
    for n in range(steps):
        sampled = sampler(
            torch.tensor(np.array([logits]), dtype=torch.float32), ints([1]), torch.tensor([3 + n]), state
        )
        state.append(ints([1]), sampled.tokens_S)
        out.append(int(sampled.finish().tokens[0, 0]))
    return out, state


PENALISED = {"presence_penalty": 1.0, "frequency_penalty": 0.7, "repetition_penalty": 1.4, "max_tokens": 40}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_appended_tokens_equal_tokens_known_from_the_start(temperature):
    """A row that comes back after preemption, with its output in `tokens`, goes on as if it had never left."""
    logits = np.random.default_rng(1).normal(scale=2, size=V)
    params = params_of([[11, 12], [3]], temperature=temperature, **PENALISED)
    out, state = drawing(params, logits, 12)
    assert state.tokens(1) == ([1, 2, 3], out)
    assert len(set(out)) > 3
    for n in range(12):
        assert sample([new_row(0, params, output=out[:n], eos=(0,))], [logits])[0].tokens[0, 0] == out[n]


def test_forks_copy_parameters_and_histories_and_then_part():
    sampler, rng = Sampler(V, "cpu"), np.random.default_rng(2)
    state = sampler.new_state(8, 64)
    a, b = params_of([[2, 3]], temperature=1.0, seed=1, **PENALISED), params_of(temperature=0.8, top_k=3)
    state.add(new_row(0, a, output=[5, 2], seed=11))
    state.add(new_row(1, b, prompt=[4], output=[6, 6, 6, 6], seed=12))
    state.fork(ints([[0, 1, 2], [1, 0, 3], [0, 5, 4]], (3, 3)))  # 0 and 1 change places: sources are read first
    expected = [
        new_row(1, a, output=[5, 2], seed=11, sample=2),
        new_row(0, b, prompt=[4], output=[6, 6, 6, 6], seed=12, sample=3),
        new_row(5, a, output=[5, 2], seed=11, sample=4),
    ]
    logits = rng.normal(size=(3, V))
    at = ints([1, 0, 5])
    sampled = sampler(torch.tensor(logits, dtype=torch.float32), at, torch.tensor([5, 5, 5]), state)
    done, _ = sample(expected, logits)
    assert sampled.finish().tokens.tolist() == done.tokens.tolist()
    state.append(at, sampled.tokens_S)
    first, second = int(done.tokens[0, 0]), int(done.tokens[2, 0])
    assert state.tokens(1)[1] == [5, 2, first] and state.tokens(5)[1] == [5, 2, second]
    state.retire(ints([1]))
    assert state.tokens(5)[1] == [5, 2, second]
    assert not state.needs[1] and state.params[1] is None
    assert all(1 not in table for table in (state.counts, state.history, state.words))


def test_a_row_number_used_again_keeps_nothing():
    sampler = Sampler(V, "cpu")
    state = sampler.new_state(2, 64)
    first = params_of([[1], [3, 4, 5]], temperature=0.0, logit_bias={2: 5.0}, allowed_token_ids=[2], **PENALISED)
    state.add(new_row(0, first, prompt=[4, 5, 9, 1]))
    state.retire(ints([0]))
    state.add(new_row(0, params_of(temperature=0.0, frequency_penalty=1.0, logit_bias={20: 0.1}), output=[9]))
    logits = torch.zeros(1, V)
    logits[0, [1, 9, 8]] = torch.tensor([0.9, 1.8, 0.7])
    sampled = sampler(logits, ints([0]), torch.tensor([4]), state)
    assert sampled.finish().tokens[0, 0] == 1
    assert state.needs[0] == Needs.PENALTIES | Needs.HISTORY | Needs.EDITS


def test_no_histories_unless_asked_for():
    _, state = drawing(params_of(temperature=1.0, logit_bias={1: 2.0}), np.zeros(V), 2)
    assert 1 not in state.history and 1 not in state.counts
    _, state = drawing(params_of([[1, 2]], temperature=1.0), np.zeros(V), 2)
    assert 1 in state.history and 1 not in state.counts


def test_a_token_beyond_the_end_does_not_leave_the_table():
    """At depth 2 one token more than max_tokens may be drawn; it is dropped by the core."""
    params = params_of(temperature=0.0, presence_penalty=1.0, max_tokens=2)
    out, _ = drawing(params, np.arange(V), 4)
    assert len(out) == 4


# --- logprobs ---


def test_logprobs_of_a_mixed_batch():
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(5, V)) * 2
    logits[3, :] = 0.25  # all equal
    kinds = [
        params_of(temperature=0.0, logprobs=3),
        params_of(temperature=1.5, top_k=2),
        params_of(temperature=1.5, logprobs=-1, presence_penalty=2.0),
        params_of(temperature=0.0, logprobs=4),
        params_of(temperature=0.6, logprobs=0),
    ]
    done, _ = sample([new_row(0, p, seed=i) for i, p in enumerate(kinds)], logits)
    assert done.logprobs is not None and done.logprobs[1] is None
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for s, k in ((0, 3), (2, V), (3, 4), (4, 0)):
        line, token = done.logprobs[s], done.tokens[s, 0]
        assert line.ids.shape == line.values.shape == (1, 1 + k)
        assert line.ids.dtype == np.int32 and line.values.dtype == np.float32 and line.ranks.dtype == np.int32
        assert line.ids[0, 0] == token
        assert line.ids[0, 1:].tolist() == np.argsort(-logits[s], kind="stable")[:k].tolist()
        np.testing.assert_allclose(line.values[0], expected[s][line.ids[0]], atol=1e-5)
        assert line.ranks[0] == 1 + (logits[s] > logits[s][token]).sum()


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_logprobs_modes(temperature):
    logits = np.random.default_rng(4).normal(size=V)
    p = params_of(temperature=temperature, top_k=5, logit_bias={7: 1.5}, logprobs=-1)
    got = {}
    for mode in ("raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"):
        done, _ = sample([new_row(0, p)], [logits], Sampler(V, "cpu", logprobs_mode=mode))
        line = done.logprobs[0]
        got[mode] = np.zeros(V)
        got[mode][line.ids[0]] = line.values[0]
    x, _ = plain(logits, new_row(0, p), [1, 2, 3], [])
    lse = {"raw": np.log(np.exp(logits).sum()), "processed": np.log(np.exp(x).sum())}
    np.testing.assert_allclose(got["raw_logits"], logits, atol=1e-5)
    np.testing.assert_allclose(got["raw_logprobs"], logits - lse["raw"], atol=1e-5)
    np.testing.assert_allclose(got["processed_logits"], x, atol=1e-5)
    np.testing.assert_allclose(got["processed_logprobs"], x - lse["processed"], atol=1e-5)
    with pytest.raises(ClientError, match="raw_logprobs"):
        Sampler(V, "cpu", logprobs_mode="raw")


def test_logprobs_of_given_tokens():
    p = params_of(temperature=1.0, logprob_token_ids=[9, 4])
    done, _ = sample([new_row(0, p), new_row(0, params_of(temperature=0.0, logprobs=1))], np.zeros((2, V)))
    assert done.logprobs[0].ids[0, 1:].tolist() == [9, 4]
    np.testing.assert_allclose(done.logprobs[0].values, -math.log(V), atol=1e-5)
    assert done.logprobs[1].ids.shape == (1, 2)


def test_prompt_logprobs_of_a_chunk():
    sampler = Sampler(V, "cpu")
    state = sampler.new_state(4, 64)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    state.add(new_row(2, params_of(temperature=1.0, prompt_logprobs=2), prompt))
    logits = np.random.default_rng(5).normal(size=(3, V))
    got = sampler.prompt_logprobs(torch.tensor(logits, dtype=torch.float32), 2, 4, state)
    assert (got.row, got.start) == (2, 4)
    assert got.logprobs.ids[:, 0].tolist() == prompt[4:7]
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(got.logprobs.values, np.take_along_axis(expected, got.logprobs.ids, 1), atol=1e-5)
    assert got.logprobs.ids[:, 1].tolist() == logits.argmax(-1).tolist()
    assert got.logprobs.ranks.tolist() == [1 + (r > r[t]).sum() for r, t in zip(logits, prompt[4:7], strict=True)]


def test_the_result_travels_as_bytes():
    p = params_of(temperature=0.0, logprobs=2)
    done, _ = sample([new_row(0, p), new_row(0, params_of())], np.zeros((2, V)))
    result = StepResult(3, *done)
    back = decode(encode(result), StepResult)
    assert back.tokens.tolist() == result.tokens.tolist()
    assert back.logprobs[1] is None and back.logprobs[0].ids.tolist() == result.logprobs[0].ids.tolist()


# --- faults and processors ---


def three_rows(middle, *, temperature=0.0, sampler=None, logits=None):
    """The middle row between two plain ones -> Finished."""
    plain_row = params_of(temperature=temperature, logprobs=1)
    logits = np.tile(np.arange(V), (3, 1)) / 4 if logits is None else logits
    rows = [new_row(0, plain_row, seed=1), new_row(0, middle, output=[8, 9], seed=2), new_row(0, plain_row, seed=3)]
    return sample(rows, logits, sampler)[0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("where", ["one", "all"])
def test_nan_logits_fail_their_row_only(temperature, where):
    logits = np.tile(np.arange(V), (3, 1)) / 4
    sound = three_rows(params_of(temperature=temperature), temperature=temperature, logits=logits.copy())
    logits[1, 5 if where == "one" else slice(None)] = np.nan
    done = three_rows(params_of(temperature=temperature), temperature=temperature, logits=logits)
    assert [(s, "NaN" in text) for s, text in done.failed] == [(1, True)]
    assert done.tokens[[0, 2]].tolist() == sound.tokens[[0, 2]].tolist()
    assert done.logprobs[1] is None and done.logprobs[0] is not None
    assert 0 <= done.tokens[1, 0] < V


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_with_every_token_masked_fails(temperature):
    params = params_of([[4]], temperature=temperature, allowed_token_ids=[4, 6], min_tokens=9, stop_token_ids=[6])
    done = three_rows(params, temperature=temperature)
    assert [(s, "every token is masked" in text) for s, text in done.failed] == [(1, True)]


def test_request_processors_get_what_they_ask_for():
    seen = []

    def two(output_ids, logits_V):
        seen.append(output_ids)
        logits_V[3] = 50.0
        return logits_V

    def three(prompt_ids, output_ids, logits_V):
        seen.append((prompt_ids, output_ids))
        return logits_V + torch.nn.functional.one_hot(torch.tensor(6), V) * 100

    assert three_rows(params_of(temperature=0.0, logits_processors=[two])).tokens[:, 0].tolist() == [23, 3, 23]
    assert three_rows(params_of(temperature=0.0, logits_processors=[two, three])).tokens[:, 0].tolist() == [23, 6, 23]
    assert seen == [[8, 9], [8, 9], ([1, 2, 3], [8, 9])]


@pytest.mark.parametrize("fault", ["raises", "shape", "none", "nan"])
def test_a_faulty_request_processor_fails_its_row_only(fault):
    def bad(output_ids, logits_V):
        logits_V.fill_(-1.0)
        if fault == "raises":
            raise KeyError("first line\nsecond line")
        return {"shape": logits_V[:-1], "none": None, "nan": logits_V * float("nan")}[fault]

    done = three_rows(params_of(temperature=0.0, logits_processors=[bad]))
    assert [s for s, _ in done.failed] == [1]
    text = done.failed[0][1]
    assert "\n" not in text
    expected = {"raises": "KeyError: 'first line", "shape": "must return logits of shape", "none": "got NoneType"}
    assert expected.get(fault, "NaN") in text
    assert done.tokens[[0, 2], 0].tolist() == [23, 23]


class Booster:
    """Raises the logit of `extra_args["boost"]`, fails on demand, and notes its calls."""

    def __init__(self, vocab_size, device):
        self.boost, self.calls, self.fail_in = {}, [], {}

    @classmethod
    def validate(cls, params):
        if "boost" in (params.extra_args or {}) and not isinstance(params.extra_args["boost"], int):
            raise ValueError("boost must be a token id")

    def add(self, row, params):
        extra = params.extra_args or {}
        if extra.get("fail") == "add":
            raise RuntimeError("no room")
        if "boost" in extra:
            self.boost[row] = extra["boost"]
            self.fail_in[row] = extra.get("fail")
        return row in self.boost

    def fork(self, source, destination):
        self.boost[destination], self.fail_in[destination] = self.boost[source], self.fail_in[source]

    def retire(self, row):
        del self.boost[row], self.fail_in[row]

    def apply(self, logits_GV, rows, history):
        self.calls.append(list(rows))
        for line, row in enumerate(rows):
            logits_GV[line, self.boost[row]] += 100
            if self.fail_in[row] == "apply":
                raise RuntimeError(f"cannot boost {row}")
            if self.fail_in[row] == "history":
                assert history(row) == ([1, 2, 3], [8])
        return logits_GV


def boosted(boost, fail=None, **fields):
    return params_of(temperature=0.0, extra_args={"boost": boost, "fail": fail}, **fields)


def engine_sampler():
    booster = Booster(V, "cpu")
    return booster, Sampler(V, "cpu", engine_processors=[booster])


def test_engine_processors_see_their_rows_in_one_call():
    booster, sampler = engine_sampler()
    rows = [new_row(0, boosted(5)), new_row(0, params_of(temperature=0.0)), new_row(0, boosted(6))]
    done, state = sample(rows, np.tile(np.arange(V), (3, 1)), sampler, at=[3, 4, 7])
    assert done.tokens[:, 0].tolist() == [5, 23, 6]
    assert booster.calls == [[3, 7]]
    state.fork(ints([[7, 8, 1]], (1, 3)))
    state.retire(ints([3, 4, 7]))
    assert booster.boost == {8: 6}
    sampled = sampler(torch.zeros(1, V), ints([8]), torch.tensor([4]), state)
    assert sampled.finish().tokens[0, 0] == 6


@pytest.mark.parametrize("fail", ["add", "apply", "history"])
def test_a_faulty_engine_processor_fails_the_row_at_fault(fail):
    _, sampler = engine_sampler()
    kept = {"presence_penalty": 0.1} if fail == "history" else {}
    rows = [new_row(0, boosted(4)), new_row(0, boosted(5, fail, **kept), output=[8]), new_row(0, boosted(6))]
    done, state = sample(rows, np.tile(np.arange(V), (3, 1)), sampler, at=[0, 1, 2])
    assert done.tokens[[0, 2], 0].tolist() == [4, 6]
    if fail == "history":
        assert not done.failed and done.tokens[1, 0] == 5
        return
    assert [s for s, _ in done.failed] == [1]
    assert "Booster" in done.failed[0][1] and "RuntimeError" in done.failed[0][1]
    state.retire(ints([1]))
    state.add(new_row(1, boosted(7)))  # the row's number is sound again
    assert not sampler(torch.zeros(1, V), ints([1]), torch.tensor([4]), state).finish().failed


def test_processors_are_found(monkeypatch):
    point = EntryPoint("boost", f"{__name__}:Booster", "quire.logits_processors")
    monkeypatch.setattr(point.__class__, "load", lambda self: Booster)
    monkeypatch.setattr(processors_module.plugins, "found", lambda group: [point] if group == point.group else [])
    found = load_processors([Booster], V, torch.device("cpu"))
    assert [type(p) for p in found] == [Booster, Booster]
    with pytest.raises(ClientError, match=r"no\.such:Thing"):
        load_processors(["no.such:Thing"], V, torch.device("cpu"))
    with pytest.raises(ClientError, match="must be classes, or names"):
        load_processors([3], V, torch.device("cpu"))


def test_state_made_without_the_processors_is_a_mistake():
    _, sampler = engine_sampler()
    state = Sampler(V, "cpu").new_state(2, 8)
    with pytest.raises(AssertionError, match="processors"):
        sampler(torch.zeros(1, V), ints([0]), torch.tensor([1]), state)
