"""Products in Triton, against the references."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quire.ops import linear as references
from quire.ops.dispatch import Binder
from quire.ops.triton import invariant, linear
from quire.ops.triton.launch import INTERPRETED
from quire.types.errors import ClientError

# Triton's interpreter has no products of bfloat16.
DTYPES = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")


def case(tokens: int, outputs: int, inputs: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    x = torch.randn(tokens, 2 * inputs, device=device).to(dtype)[:, :inputs]
    weight = (torch.randn(outputs, inputs, device=device) * inputs**-0.5).to(dtype)
    return x, weight, torch.randn(outputs, device=device).to(dtype)


def check(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, kind: str = "") -> None:
    exact = references.linear(x.float(), weight.float(), None if bias is None else bias.float())
    if kind:
        exact = references.gated_activation(exact, kind)
    assert got.shape == exact.shape
    assert ((got.float() - exact).norm() / exact.norm()).item() < (2e-3 if x.dtype == torch.float16 else 1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs"),
    [(1, 48, 96), (1, 38, 1024), (2, 33, 128), (3, 64, 600), (9, 130, 512), (20, 96, 104), (50, 40, 1160)],
)
@pytest.mark.parametrize("biased", [False, True])
def test_linear(device: torch.device, dtype: torch.dtype, tokens: int, outputs: int, inputs: int, biased: bool) -> None:
    x, weight, bias = case(tokens, outputs, inputs, dtype, device)
    used = bias if biased else None
    assert linear.choose(tokens, outputs, inputs, False) is not None
    got = linear.linear(x, weight, used)
    assert got.dtype == dtype
    check(got, x, weight, used)
    wide = linear.linear(x, weight, used, torch.float32)
    assert wide.dtype == torch.float32 and torch.equal(wide, got.float())
    assert torch.equal(linear.linear(x.unsqueeze(1), weight, used), got.unsqueeze(1))
    assert linear.linear(x[:0], weight, used).shape == (0, outputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["silu", "gelu_new"])
@pytest.mark.parametrize(("tokens", "outputs", "inputs"), [(1, 96, 64), (2, 24, 96), (5, 66, 128), (40, 64, 200)])
@pytest.mark.parametrize("biased", [False, True])
def test_gated_linear(
    device: torch.device, dtype: torch.dtype, kind: str, tokens: int, outputs: int, inputs: int, biased: bool
) -> None:
    x, weight, bias = case(tokens, outputs, inputs, dtype, device)
    used = bias if biased else None
    check(linear.gated_linear(x, weight, used, kind), x, weight, used, kind)


def test_more_tokens_are_left_to_torch(device: torch.device) -> None:
    x, weight, bias = case(linear.MOST + 1, 16, 32, torch.float16, device)
    assert linear.choose(len(x), 16, 32, False) is None
    assert torch.equal(linear.linear(x, weight, bias), references.linear(x, weight, bias))
    check(linear.gated_linear(x, weight, bias, "silu"), x, weight, bias, "silu")


def test_a_token_does_not_depend_on_others(device: torch.device) -> None:
    for tokens in (2, 13):
        x, weight, _ = case(tokens, 48, 512, torch.float16, device)
        other = torch.cat((x[:1], torch.randn_like(x[1:])))
        assert torch.equal(linear.linear(x, weight, None)[0], linear.linear(other, weight, None)[0])


def same(a: Tensor, b: Tensor) -> bool:
    """To the bit, on a GPU: the interpreter's products are NumPy's, which order their sums by the shape."""
    return torch.allclose(a, b, rtol=2e-3, atol=2e-3) if INTERPRETED else torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "inputs"), [(48, 128), (80, 1040), (200, 600)])
def test_invariant(device: torch.device, dtype: torch.dtype, outputs: int, inputs: int) -> None:
    """The same bits for a token alone and among others, whichever kernel serves them."""
    x, weight, bias = case(600 if not INTERPRETED else 140, outputs, inputs, dtype, device)
    everything = invariant.linear(x, weight, bias)
    check(everything, x, weight, bias)
    for tokens in (1, 7, 64, 65, 130, 520):
        part = x[:tokens]
        assert same(invariant.linear(part, weight, bias), everything[:tokens])
    assert same(invariant.linear(x[3:4], weight, bias, torch.float32), everything[3:4].float())
    assert invariant.linear(x[:0], weight, bias).shape == (0, outputs)
    both = torch.cat((weight, weight.flip(0)))
    gated = invariant.gated_linear(x, both, None, "silu")
    assert same(invariant.gated_linear(x[:1], both, None, "silu"), gated[:1])


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="no CUDA device")
@pytest.mark.parametrize(("outputs", "inputs"), [(6144, 4096), (4096, 14336), (28672, 4096), (2048, 2048)])
def test_invariant_on_matrices_of_models(device: torch.device, outputs: int, inputs: int) -> None:
    x, weight, _ = case(4096, outputs, inputs, torch.bfloat16, device)
    everything = invariant.linear(x, weight, None)
    for tokens in (1, 7, 64, 65, 256, 512, 513, 2048):
        assert torch.equal(invariant.linear(x[-tokens:], weight, None), everything[-tokens:]), tokens


def test_who_is_chosen(device: torch.device) -> None:
    free, forced = Binder(device, torch.bfloat16), Binder(device, torch.bfloat16, {"linear": "invariant"})
    assert free.bind(references.LINEAR, inputs=8, outputs=8) is not invariant.linear
    assert forced.bind(references.LINEAR, inputs=8, outputs=8) is invariant.linear
    with pytest.raises(ClientError, match="needs inputs in eights, not 12"):
        forced.bind(references.LINEAR, inputs=12, outputs=8)
    asked = Binder(device, torch.float16, {"linear": "triton"})
    assert asked.bind(references.LINEAR, inputs=8, outputs=8) is linear.linear
