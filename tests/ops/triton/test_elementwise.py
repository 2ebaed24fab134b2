"""The Triton kernels beside the linear layers, against the references of their ops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quire.ops import activation as activations
from quire.ops import cache as caches
from quire.ops import heads as references
from quire.ops import linear as linears
from quire.ops import norm as norms
from quire.ops.dispatch import Binder
from quire.ops.triton import activation, cache, embedding, heads, norm
from quire.ops.triton.launch import INTERPRETED
from quire.types.errors import ClientError

# numpy tells of an exponential beyond float32, which a GPU and these formulas take for infinity.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Roundings of a number that both sides may do in another order. Triton's interpreter cuts a bfloat16 off instead of
# rounding it.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-6 if INTERPRETED else 2**-7, torch.float16: 2**-10}


def check(got: Tensor, expected: Tensor, scale: float = 1.0, dtype: torch.dtype | None = None) -> None:
    assert got.dtype == expected.dtype and got.shape == expected.shape
    tolerance = TOLERANCE[dtype or got.dtype] * scale
    assert torch.allclose(got.float(), expected.float(), rtol=tolerance, atol=tolerance)


def check_sum(got: Tensor, expected: Tensor) -> None:
    """Of two numbers: to the bit, where numbers are rounded."""
    if INTERPRETED and got.dtype == torch.bfloat16:
        check(got, expected)
    else:
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 100, 4096])
@pytest.mark.parametrize("residual", [False, True])
def test_norms(device: torch.device, dtype: torch.dtype, size: int, residual: bool) -> None:
    wide = torch.randn(size, device=device)
    x = torch.randn(5, size + 8, device=device).to(dtype)[:, :size]
    added = torch.randn(5, size, device=device).to(dtype) if residual else None
    weight, bias = torch.randn(2, size, device=device).to(dtype)
    for got, expected in (
        (norm.rms_norm(x, added, weight, 1e-5), norms.rms_norm(x, added, weight, 1e-5)),
        (norm.rms_norm(x, added, wide, 1e-5), norms.rms_norm(x, added, wide, 1e-5)),
        (norm.layer_norm(x, added, weight, bias, 1e-5), norms.layer_norm(x, added, weight, bias, 1e-5)),
        (norm.layer_norm(x, added, None, None, 1e-5), norms.layer_norm(x, added, None, None, 1e-5)),
    ):
        check(got[0], expected[0], 4)
        check_sum(got[1], expected[1])


def test_norm_of_heads_and_of_nothing(device: torch.device) -> None:
    x, weight = torch.randn(3, 4, 3, 16, device=device)[:, :, 1], torch.randn(16, device=device)
    check(norm.rms_norm(x, None, weight, 1e-6)[0], norms.rms_norm(x, None, weight, 1e-6)[0], 4)
    assert norm.rms_norm(x[:0], None, weight, 1e-6)[0].shape == (0, 4, 16)


def test_norms_wider_than_a_program_are_refused(device: torch.device) -> None:
    binder = Binder(device, torch.bfloat16, {"rms_norm": "triton"})
    assert binder.bind(norms.RMS_NORM, size=16384) is norm.rms_norm
    with pytest.raises(ClientError, match="16384 features at most, not 16385"):
        binder.bind(norms.RMS_NORM, size=16385)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", sorted(activations.ACTIVATIONS))
def test_activations(device: torch.device, dtype: torch.dtype, kind: str) -> None:
    x = torch.cat((torch.linspace(-9, 9, 2050), torch.tensor([1e-5, -1e-3, 30.0, -100.0]))).repeat(3, 1)
    x = x.to(device=device, dtype=dtype)
    both = torch.cat((x, torch.randn_like(x)), dim=1)
    check(activation.activation(x, kind), activations.activation(x, kind))
    check(activation.gated_activation(both, kind), activations.gated_activation(both, kind), 2)


@pytest.mark.parametrize("kind", ["relu", "relu2", "relu6", "silu"])
def test_activation_keeps_what_is_no_number(device: torch.device, kind: str) -> None:
    x = torch.full((1, 4), torch.nan, device=device)
    assert activation.activation(x, kind).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [100, 2304])
def test_embedding(device: torch.device, dtype: torch.dtype, size: int) -> None:
    table = torch.randn(50, size, device=device).to(dtype)
    ids = torch.randint(0, 48, (7,), device=device)
    added = torch.randn(7, size, device=device).to(dtype)
    assert torch.equal(embedding.embedding(ids, table, 0), linears.embedding(ids, table, 0))
    check_sum(embedding.embedding(ids, table, 2, added), linears.embedding(ids, table, 2, added))
    check_sum(embedding.embedding(ids, table, 2, None, 3.5), linears.embedding(ids, table, 2, None, 3.5))
    check(embedding.embedding(ids, table, 2, added, 3.5), linears.embedding(ids, table, 2, added, 3.5), 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("query_heads", "kv_heads", "size", "angles", "normed"),
    [(8, 2, 64, 32, False), (16, 8, 128, 64, True), (3, 3, 80, 16, True), (5, 1, 64, 0, False), (2, 2, 40, 0, True)],
)
@pytest.mark.parametrize("stored", [None, torch.float32])
@pytest.mark.parametrize("wide", [False, True])
def test_heads(
    device: torch.device, dtype: torch.dtype, query_heads: int, kv_heads: int, size: int, angles: int, normed: bool,
    stored: torch.dtype | None, wide: bool,
) -> None:  # fmt: skip
    tokens, pages, page = 6, 4, 4
    qkv = torch.randn(tokens, (query_heads + 2 * kv_heads) * size, device=device).to(dtype)
    parts = qkv.split([query_heads * size, kv_heads * size, kv_heads * size], dim=1)
    q, k, v = (x.unflatten(1, (-1, size)) for x in parts)
    kv = torch.randn(2, pages, page, kv_heads, size, device=device).to(stored or dtype)
    expected_kv = kv.clone()
    slots = torch.tensor([5, 0, -1, 15, 9, -1], device=device)
    positions = torch.tensor([3, 0, 7, 11, 2, 2], device=device)
    table = torch.randn(2, 12, angles, device=device) if angles else None
    weights: list[Tensor | None] = [None, None]
    if normed:
        weights = list(torch.randn(2, size, device=device).to(torch.float32 if wide else dtype))
    rest = (positions if angles else None, table, *weights, 1e-6)
    expected = references.heads(q, k, v, expected_kv, slots, *rest)
    got = heads.heads(q, k, v, kv, slots, *rest)
    assert got.is_contiguous()
    check(got, expected, 8)
    check(kv, expected_kv, 8, dtype)
    assert torch.equal(kv[1], expected_kv[1])


def test_heads_of_a_cache_in_int8(device: torch.device) -> None:
    q, k, v = (torch.randn(3, 2, 16, device=device) for _ in range(3))
    kv = torch.zeros(2, 2, 4, 2, caches.row_size(16, torch.int8), dtype=torch.int8, device=device)
    expected_kv, slots = kv.clone(), torch.tensor([1, 5, 7], device=device)
    assert torch.equal(heads.heads(q, k, v, kv, slots), references.heads(q, k, v, expected_kv, slots))
    assert torch.equal(kv, expected_kv)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
@pytest.mark.parametrize("targets", [[0, 3, 5], [6, 3, 5]], ids=["apart", "chained"])
def test_copies_of_pages(device: torch.device, dtype: torch.dtype, targets: list[int]) -> None:
    tensors = [torch.randint(-99, 99, (2, 7, 4, 3, 20), device=device).to(dtype) for _ in range(3)]
    expected = [x.clone() for x in tensors]
    ids = torch.tensor([1, 1, 6]), torch.tensor(targets)
    caches.copy_pages(expected, expected, *ids)
    cache.copy_pages(tensors, tensors, *ids)
    assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))
    host = [torch.zeros((2, 9, 4, 3, 20), dtype=dtype, pin_memory=device.type == "cuda") for _ in range(3)]
    cache.copy_pages(tensors, host, torch.tensor([2, 0]), torch.tensor([8, 1]))
    if device.type == "cuda":
        torch.cuda.synchronize()
    for there, here in zip(host, expected, strict=True):
        assert torch.equal(there[:, [8, 1]], here[:, [2, 0]].cpu()) and not there[:, 2:8].any()
    cache.copy_pages(host, tensors, torch.tensor([8]), torch.tensor([4]))
    assert all(torch.equal(x[:, 4], x[:, 2]) for x in tensors)
