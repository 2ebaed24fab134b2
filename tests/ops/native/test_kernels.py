"""Native norms, activations, rotary, linear layers and argmax against their references, at each level."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from quire.ops import activation as activations
from quire.ops import norm
from quire.ops.activation import ACTIVATIONS
from quire.ops.cache import read_rows, row_size
from quire.ops.dispatch import Case
from quire.ops.heads import heads
from quire.ops.native import kernels as native
from quire.ops.native import program
from quire.ops.native.kernels import Kernels
from quire.ops.sampling import draw_greedy

Of = Callable[[int], Kernels]
# Largest error over the largest magnitude: two units in the last place of the type, and float32's own sums.
BOUNDS = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
DTYPES = st.sampled_from(list(BOUNDS))
EXAMPLES = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
SIZES = st.one_of(st.integers(1, 70), st.sampled_from([100, 576, 2047, 2048, 2050]))


def close(got: Tensor, expected: Tensor, dtype: torch.dtype, terms: float = 1e-3) -> bool:
    """To within the dtype's bound of the largest number; `terms`: how large the terms are whose sum may be small."""
    spread = max(terms, expected.float().abs().max().item())
    return (got.float() - expected.float()).abs().max().item() <= BOUNDS[dtype] * spread


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@EXAMPLES
@given(tokens=st.integers(1, 40), size=SIZES, dtype=DTYPES, residual=st.booleans(), threads=st.integers(1, 3))
def test_norms(kernels: Of, tokens: int, size: int, dtype: torch.dtype, residual: bool, threads: int) -> None:
    x, w, b = randn(tokens, size, dtype=dtype), randn(size, dtype=dtype, seed=1), randn(size, dtype=dtype, seed=2)
    r = randn(tokens, size, dtype=dtype, seed=3) if residual else None
    k = kernels(threads)
    wide = randn(size, dtype=torch.float32, seed=4)
    pairs = [
        (k.rms_norm(x, r, w, 1e-5), norm.rms_norm(x, r, w, 1e-5)),
        (k.rms_norm(x, r, wide, 1e-5), norm.rms_norm(x, r, wide, 1e-5)),
        (k.layer_norm(x, r, w, b, 1e-5), norm.layer_norm(x, r, w, b, 1e-5)),
        (k.layer_norm(x, r, None, None, 1e-5), norm.layer_norm(x, r, None, None, 1e-5)),
    ]
    for (got, got_total), (expected, total) in pairs:
        assert torch.equal(got_total, total), "the residual stream is the same to the bit"
        assert size == 1 or close(got, expected, dtype), "of one number a LayerNorm is nothing but rounding"


@EXAMPLES
@given(tokens=st.integers(1, 20), size=SIZES, dtype=DTYPES, kind=st.sampled_from(sorted(program.KINDS)))
def test_activations(kernels: Of, tokens: int, size: int, dtype: torch.dtype, kind: str) -> None:
    x = randn(tokens, 2 * size, dtype=dtype) * 5
    k = kernels(2)
    assert close(k.activation(x, kind), activations.activation(x, kind), dtype)
    assert close(k.gated_activation(x, kind), activations.gated_activation(x, kind), dtype)


def test_every_activation_has_a_kernel() -> None:
    assert set(program.KINDS) == set(ACTIVATIONS)


@pytest.mark.parametrize("kind", sorted(program.KINDS))
def test_activations_at_the_ends(kernels: Of, kind: str) -> None:
    x = torch.tensor([[-math.inf, -1e30, -200.0, -90.0, -0.0, 0.0, 1e-30, 90.0, 200.0, 1e30, math.inf, math.nan]])
    got, expected = kernels(1).activation(x, kind), activations.activation(x, kind)
    finite = expected.isfinite() & x.isfinite()
    assert torch.allclose(got[finite], expected[finite], rtol=3e-6, atol=1e-6)
    assert got[0, -1].isnan()


@EXAMPLES
@given(
    tokens=st.integers(1, 30), queries=st.integers(1, 6), keys=st.integers(1, 3), half=st.integers(0, 40),
    rest=st.integers(0, 20), normed=st.booleans(), wide_norm=st.booleans(), dtype=DTYPES, int8=st.booleans(),
    block=st.integers(1, 5), data=st.data(),
)  # fmt: skip
def test_heads(
    kernels: Of, tokens: int, queries: int, keys: int, half: int, rest: int, normed: bool, wide_norm: bool,
    dtype: torch.dtype, int8: bool, block: int, data: st.DataObject,
) -> None:  # fmt: skip
    """Head norm, rotation and KV write as one operation, from views of one buffer."""
    size, blocks = max(2 * half + rest, 1), -(-tokens // block) + 2
    wide = randn(tokens, (queries + 2 * keys) * size, dtype=dtype)
    q, k, v = (x.unflatten(-1, (-1, size)) for x in wide.split([queries * size, keys * size, keys * size], -1))
    norm_dtype = torch.float32 if wide_norm else dtype
    norms = [randn(size, dtype=norm_dtype, seed=i) if normed else None for i in (1, 2)]
    turn = (torch.randint(0, 99, (tokens,)), torch.randn(2, 99, half)) if half else (None, None)
    slots = torch.tensor(data.draw(st.permutations(range(blocks * block)))[:tokens])
    slots[torch.tensor(data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)))] = -1
    kv = torch.zeros(2, blocks, block, keys, row_size(size, torch.int8) if int8 else size)
    kv = kv.to(torch.int8 if int8 else dtype)
    expected_kv = kv.clone()
    expected = heads(q, k, v, expected_kv, slots, *turn, *norms, 1e-5)
    got = kernels(3).heads(q, k, v, kv, slots, *turn, *norms, 1e-5)
    assert close(got, expected, dtype)
    assert torch.equal(kv[1], expected_kv[1]), "values are written as they are"
    read, expected_read = (read_rows(x[0], size) for x in (kv, expected_kv))
    # in int8 a last place of the key may move a number by one of its 127 steps
    assert close(read, expected_read, dtype) or (int8 and (read - expected_read).abs().max() <= read.abs().max() / 120)


@EXAMPLES
@given(
    tokens=st.one_of(st.integers(1, 20), st.sampled_from([63, 64, 65, 130, 300, 2500])), outputs=SIZES, inputs=SIZES,
    dtype=DTYPES, kind=st.sampled_from(["linear", "silu", "gelu", "relu2"]), gated=st.booleans(), bias=st.booleans(),
    plus=st.booleans(), wide=st.booleans(), threads=st.integers(1, 3),
)  # fmt: skip
def test_linear(
    kernels: Of, tokens: int, outputs: int, inputs: int, dtype: torch.dtype, kind: str, gated: bool, bias: bool,
    plus: bool, wide: bool, threads: int,
) -> None:  # fmt: skip
    rows = 2 * outputs if gated else outputs
    x = randn(tokens, inputs + 3, dtype=dtype)[:, :inputs]
    weight = (randn(rows, inputs, dtype=torch.float32, seed=1) / inputs**0.5).to(dtype)
    b = randn(rows, dtype=dtype, seed=2) if bias else None
    add = randn(tokens, outputs, dtype=dtype, seed=3) if plus else None
    out = torch.full((tokens, outputs + 5), 7.0, dtype=torch.float32 if wide else dtype)
    kernels(threads).pool.run(program.linear(x, weight, b, out[:, :outputs], tokens, kind, gated, add))
    expected = F.linear(x.double(), weight.double(), None if b is None else b.double())
    if gated:
        expected = ACTIVATIONS[kind](expected[:, :outputs]) * expected[:, outputs:]
    else:
        expected = ACTIVATIONS[kind](expected)
    if add is not None:
        expected = expected + add
    assert close(out[:, :outputs], expected, dtype, terms=1.0)
    assert (out[:, outputs:] == 7.0).all()


def test_linear_of_one_row_for_all_outputs(kernels: Of) -> None:
    """An expanded weight: its rows are no bytes apart."""
    for dtype in BOUNDS:
        x, row = randn(40, 64, dtype=dtype), randn(1, 64, dtype=dtype, seed=1)
        got = kernels(2).linear(x, row.expand(50, 64), None)
        assert close(got, (x.double() @ row.double().T).expand(40, 50), dtype, terms=1.0)


@EXAMPLES
@given(rows=st.integers(1, 40), vocab=st.one_of(st.integers(1, 300), st.just(9000)), dtype=DTYPES, data=st.data())
def test_argmax_is_the_greedy_draw(kernels: Of, rows: int, vocab: int, dtype: torch.dtype, data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 5))
    x = randn(rows, vocab, dtype=dtype, seed=seed).mul(data.draw(st.sampled_from([1, 0]))).clone()
    for value in data.draw(st.lists(st.sampled_from([math.nan, math.inf, -math.inf, 9.0]), max_size=4)):
        x[data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, vocab - 1))] = value
    index, best = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
    kernels(3).pool.run(program.argmax(x, index, best, rows))
    expected_index, expected = draw_greedy(x.float())
    assert torch.equal(index, expected_index)
    assert torch.equal(best.nan_to_num(123.0), expected.nan_to_num(123.0))


@EXAMPLES
@given(tokens=st.integers(1, 20), size=SIZES, dtype=DTYPES)
def test_gather(kernels: Of, tokens: int, size: int, dtype: torch.dtype) -> None:
    table, more = randn(11, size, dtype=dtype), randn(tokens, size, dtype=dtype, seed=1)
    ids = torch.randint(0, 9, (tokens,))
    out, plus = (torch.empty(tokens, size, dtype=dtype) for _ in range(2))
    pool = kernels(2).pool
    pool.run(program.gather(ids, table, out, tokens, offset=2))
    pool.run(program.gather(ids, table, plus, tokens, offset=2, add_TD=more))
    assert torch.equal(out, table[ids + 2])
    assert torch.equal(plus, table[ids + 2] + more)
    kernel = kernels(2)
    assert torch.equal(kernel.add(out, more), plus)
    assert close(kernel.embedding(ids, table, 2, more, 3.5), table[ids + 2] * 3.5 + more, dtype)
    assert torch.equal(kernel.embedding(ids, table, 2, None, 3.5), table[ids + 2] * 3.5)
    assert close(kernel.softcap(out * 9, 5.0), torch.tanh(out * 9 / 5.0) * 5.0, dtype)
    ids[0] = 10_000
    pool.run(program.gather(ids, table, out, tokens))
    assert not out[0].any(), "an id beyond the table reads nothing"


def test_a_program_reads_its_sizes_when_it_runs(kernels: Of) -> None:
    """One recording over buffers of 16 tokens serves any number of them, and touches no more."""
    x, w = torch.randn(16, 24), torch.randn(32, 24)
    hidden, out = torch.zeros(16, 32), torch.zeros(16, 32)
    recorded = program.Program(
        [program.linear(x, w, None, hidden, program.dim(0)), program.activation(hidden, out, "silu", False, -1)]
    )
    for tokens in (1, 5, 16, 3):
        hidden.zero_()
        out.zero_()
        recorded.dims.n[0] = tokens
        recorded.run(kernels(2).pool)
        assert torch.allclose(out[:tokens], F.silu(F.linear(x[:tokens], w)), atol=1e-4)
        assert not out[tokens:].any() and not hidden[tokens:].any()


def test_unknown_operations_are_refused(kernels: Of) -> None:
    with pytest.raises(RuntimeError, match="cannot run"):
        kernels(1).pool.run(program.make(99, 0, (), ()))


def test_reasons() -> None:
    cuda = Case(torch.device("cuda"), torch.float32)
    double = Case(torch.device("cpu"), torch.float64)
    assert "CPU" in str(native.refusal(cuda)) and "float64" in str(native.refusal(double))


def test_without_the_library_everything_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda: "the native library is not built: gone")
    case = Case(torch.device("cpu"), torch.float32, {"kind": "silu", "num_heads": 4, "num_kv_heads": 2})
    for supports in (native.refusal, native.supports_activation, native.supports_attention, native.supports_linear):
        assert supports(case) == "the native library is not built: gone"
