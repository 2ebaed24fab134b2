"""Native products and look-ups of quantized weights against their references, at each level."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from quire import LLM, SamplingParams
from quire.ops import linear as references
from quire.ops.linear import QuantizedWeight, quantize_tokens, quantize_weight
from quire.ops.native import program
from quire.ops.native.kernels import Kernels
from quire.ops.native.library import load

Of = Callable[[int], Kernels]
# Largest error over the largest magnitude: as for other products.
BOUNDS = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
DTYPES = st.sampled_from(list(BOUNDS))
EXAMPLES = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
TOKENS = st.one_of(st.integers(1, 20), st.sampled_from([32, 63, 64, 65, 70, 150]))
OUTPUTS = st.one_of(st.integers(1, 70), st.sampled_from([129, 576]))
# Inputs and the size of a group (0: all of them).
SHAPES = st.one_of(
    st.tuples(st.integers(1, 20).map(lambda n: 32 * n), st.just(32)),
    st.tuples(st.sampled_from([576, 2048, 4128]), st.just(32)),
    st.tuples(st.one_of(st.integers(1, 100).map(lambda n: 2 * n), st.sampled_from([576, 2050])), st.just(0)),
    st.tuples(st.just(96), st.sampled_from([6, 16, 48])),
)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(got: Tensor, expected: Tensor, dtype: torch.dtype, terms: float = 1e-3) -> bool:
    spread = max(terms, expected.float().abs().max().item())
    return (got.float() - expected.float()).abs().max().item() <= BOUNDS[dtype] * spread


def quantized(outputs: int, inputs: int, bits: int, group: int, dynamic: bool) -> QuantizedWeight:
    return quantize_weight(randn(outputs, inputs, seed=1) / inputs**0.5, bits, group, dynamic)


@EXAMPLES
@given(
    tokens=TOKENS, outputs=OUTPUTS, shape=SHAPES, dtype=DTYPES, bits=st.sampled_from([4, 8]), dynamic=st.booleans(),
    bias=st.booleans(), wide=st.booleans(), threads=st.integers(1, 3),
)  # fmt: skip
def test_linear(
    kernels: Of, tokens: int, outputs: int, shape: tuple[int, int], dtype: torch.dtype, bits: int, dynamic: bool,
    bias: bool, wide: bool, threads: int,
) -> None:  # fmt: skip
    inputs, group = shape
    x = randn(tokens, inputs + 3, dtype=dtype)[:, :inputs]
    weight = quantized(outputs, inputs, bits, group, dynamic)
    b = randn(outputs, dtype=dtype, seed=2) if bias else None
    to = torch.float32 if wide else None
    got = kernels(threads).quantized_linear(x, weight, b, to)
    expected = references.quantized_linear(x, weight, b, to)
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert close(got, expected, dtype if not (wide and dynamic) else torch.float32)


@EXAMPLES
@given(
    tokens=st.integers(1, 9), outputs=st.integers(1, 80), shape=SHAPES, dtype=DTYPES, bits=st.sampled_from([4, 8]),
    dynamic=st.booleans(), gated=st.booleans(),
)  # fmt: skip
def test_linear_with_all_around_it(
    kernels: Of, tokens: int, outputs: int, shape: tuple[int, int], dtype: torch.dtype, bits: int, dynamic: bool,
    gated: bool,
) -> None:  # fmt: skip
    """Activation, gate and residual in the same operation, into a part of a wider buffer."""
    x, rows = randn(tokens, shape[0], dtype=dtype), 2 * outputs if gated else outputs
    weight = quantized(rows, shape[0], bits, shape[1], dynamic)
    b, add = randn(rows, dtype=dtype, seed=2), randn(tokens, outputs, dtype=dtype, seed=3)
    out = torch.full((tokens, outputs + 5), 7.0, dtype=dtype)
    op = program.quantized_linear(x, weight, b, out[:, :outputs], tokens, "silu", gated, add)
    kernels(2).pool.run(op)
    if dynamic:
        expected = references.quantized_linear(x, weight, b, torch.float32)
    else:  # without the roundings between the operations that this is one of
        expected = F.linear(x.float(), weight.dense().to(dtype).float(), b.float())
    expected = F.silu(expected[:, :outputs]) * (expected[:, outputs:] if gated else 1)
    terms = max(1.0, float((expected.abs() + add.abs()).max()))
    assert close(out[:, :outputs], expected + add, dtype, terms)
    assert (out[:, outputs:] == 7.0).all()


@EXAMPLES
@given(tokens=st.integers(1, 9), inputs=st.integers(1, 300), dtype=DTYPES, threads=st.integers(1, 2))
def test_integer_sums_are_exact(kernels: Of, tokens: int, inputs: int, dtype: torch.dtype, threads: int) -> None:
    """Weights of one scale and a power of two: whatever is not exact shows."""
    x = randn(tokens, inputs, dtype=dtype)
    q = torch.randint(-128, 128, (37, inputs), dtype=torch.int8, generator=torch.Generator().manual_seed(inputs))
    weight = QuantizedWeight(q, torch.full((37, 1), 0.25), 8, True, inputs)
    xq, scale = quantize_tokens(x)
    expected = (xq.double() @ q.double().t()).float() * 0.25 * scale
    assert torch.equal(kernels(threads).quantized_linear(x, weight, None, torch.float32), expected)


def test_what_is_not_finite_stays_so(kernels: Of) -> None:
    x = randn(4, 64)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    x[3] = 0
    weight = quantized(9, 64, 8, 0, True)
    got = kernels(1).quantized_linear(x, weight, None)
    assert not got[1].isfinite().any() and not got[2].isfinite().any()
    assert got[0].isfinite().all() and not got[3].any()


def test_no_tokens(kernels: Of) -> None:
    assert kernels(1).quantized_linear(randn(0, 64), quantized(9, 64, 8, 0, True), None).shape == (0, 9)


@EXAMPLES
@given(tokens=st.integers(1, 20), size=st.integers(1, 600), dtype=DTYPES, bits=st.sampled_from([8, 8, 4]))
def test_embedding(kernels: Of, tokens: int, size: int, dtype: torch.dtype, bits: int) -> None:
    table = quantized(11, 2 * size if bits == 4 else size, bits, 0, True)
    ids = torch.randint(0, 9, (tokens,))
    got = kernels(2).quantized_embedding(ids, table, 2, dtype)
    assert torch.equal(got, references.quantized_embedding(ids, table, 2, dtype))
    more = torch.randn(tokens, table.shape[1]).to(dtype)
    got = kernels(2).quantized_embedding(ids, table, 2, dtype, more)
    torch.testing.assert_close(got, references.quantized_embedding(ids, table, 2, dtype, more))


def test_an_id_beyond_the_table_reads_nothing(kernels: Of) -> None:
    table = quantized(11, 40, 8, 0, True)
    assert not kernels(1).quantized_embedding(torch.tensor([11, -1, 99]), table, 0, torch.float32).any()


@pytest.mark.parametrize("name", ["int8", "int4", "int8_weight_only", "int4_weight_only"])
def test_a_quantized_model_is_recorded(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """And says the same as operation by operation, and as the references."""
    if isinstance(reason := load(), str):
        pytest.skip(reason)
    params = SamplingParams(temperature=0.0, max_tokens=12)
    questions = ["What is the capital of Peru?", "What is 17 + 25?", "Spell the word 'garden'."]
    conversations = [[{"role": "user", "content": question}] for question in questions]
    common: dict[str, Any] = {"quantization": name, "max_model_len": 128, "dtype": "float32"}

    def tokens(**options: Any) -> list[list[int]]:
        caplog.clear()
        with caplog.at_level(logging.INFO, "quire"), LLM("demo", **common, **options) as llm:
            outputs = llm.chat(conversations, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    recorded = tokens()
    assert "operation by operation" not in caplog.text
    assert recorded == tokens(enforce_eager=True)
    reference = tokens(ops={"*": "reference"})
    assert recorded == reference
