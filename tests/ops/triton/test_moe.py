"""The Triton kernels of mixtures of experts against the reference, in both ways to find an expert's tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quire.ops import moe as reference
from quire.ops.dispatch import Binder
from quire.ops.triton import moe as kernels
from quire.ops.triton.ahead import Ahead
from quire.ops.triton.launch import INTERPRETED
from quire.types.errors import ClientError

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-5, torch.float16: 2**-8}


def inputs(
    tokens: int, experts: int, size: int, width: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(tokens)
    shapes = ((tokens, size + 8), (tokens, experts), (experts * 2 * width, size), (experts * size, width))
    x, logits, gate_up, down = (torch.randn(*shape, generator=draw) for shape in shapes)
    made = (x, 2 * logits, gate_up / size**0.5, down / width**0.5)
    x, logits, gate_up, down = (tensor.to(device=device, dtype=dtype) for tensor in made)
    return x[:, :size], logits, gate_up, down


def check(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype
    assert torch.allclose(got.float(), expected.float(), rtol=TOLERANCE[got.dtype], atol=TOLERANCE[got.dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 8, 2), (5, 3, 3), (64, 6, 1), (65, 6, 2), (150, 4, 2)])
def test_it_is_the_reference(device: torch.device, dtype: torch.dtype, tokens: int, experts: int, top_k: int) -> None:
    given = inputs(tokens, experts, 72, 40, dtype, device)
    for normalised, kind in ((True, "silu"), (False, "gelu_pytorch_tanh")):
        got = kernels.moe(*given, top_k, normalised, kind)
        check(got, reference.moe(*given, top_k, normalised, kind))


def test_a_token_does_not_depend_on_its_neighbours(device: torch.device) -> None:
    x, logits, gate_up, down = inputs(40, 6, 64, 32, torch.float16, device)
    whole = kernels.moe(x, logits, gate_up, down, 2, True, "silu")
    few = kernels.moe(x[:33], logits[:33], gate_up, down, 2, True, "silu")
    assert torch.equal(whole[:33], few)


@pytest.mark.parametrize("tokens", [48, 200])
def test_all_tokens_may_choose_one_expert(device: torch.device, tokens: int) -> None:
    x, logits, gate_up, down = inputs(tokens, 5, 64, 32, torch.float32, device)
    logits[:, 4] += 100.0
    check(
        kernels.moe(x, logits, gate_up, down, 1, True, "silu"), reference.moe(x, logits, gate_up, down, 1, True, "silu")
    )


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_no_tokens_and_what_are_no_numbers(device: torch.device) -> None:
    given = inputs(100, 5, 64, 32, torch.float32, device)
    assert kernels.moe(given[0][:0], given[1][:0], *given[2:], 2, True, "silu").shape == (0, 64)
    given[1][7] = torch.nan
    out = kernels.moe(*given, 2, True, "silu")
    assert out[7].isnan().all() and out[8:].isfinite().all()


def test_nothing_is_looked_up_by_what_no_kernel_wrote(device: torch.device) -> None:
    """Where kernels are compiled ahead, who chose which expert is whatever lay in memory: here the largest integer."""
    given = inputs(100, 6, 64, 32, torch.float32, device)
    ahead = Ahead(device)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what is not initialised
    try:
        with ahead:
            assert kernels.moe(*given, 2, True, "silu").shape == (100, 64)
    finally:
        torch.use_deterministic_algorithms(False)
        ahead.close()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def test_what_is_refused(device: torch.device) -> None:
    shapes = {"experts": 8, "top_k": 2, "inputs": 64, "intermediate": 32, "kind": "silu"}
    binder = Binder(device, torch.bfloat16, {"moe": "triton"})
    assert binder.bind(reference.MOE, **shapes, bits=None) is kernels.moe
    with pytest.raises(ClientError, match="no kernel for experts in 8 bits"):
        binder.bind(reference.MOE, **shapes, bits=8)
    with pytest.raises(ClientError, match="1024 experts at most"):
        binder.bind(reference.MOE, **{**shapes, "experts": 2000}, bits=None)


@pytest.mark.skipif(INTERPRETED, reason="graphs need a GPU")
@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [4, 300])
def test_a_graph_captures_it(device: torch.device, tokens: int) -> None:
    given = inputs(tokens, 8, 256, 128, torch.bfloat16, device)
    kernels.moe(*given, 2, True, "silu")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = kernels.moe(*given, 2, True, "silu")
    for seed in range(2):  # the routing of a replay is its own
        fresh = torch.randn(given[1].shape, generator=torch.Generator().manual_seed(seed))
        given[1].copy_(fresh)
        graph.replay()
        check(got, reference.moe(*given, 2, True, "silu"))
