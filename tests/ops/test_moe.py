"""The meaning of `moe`: against a plain loop over tokens, and its two ways to compute against each other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from quire.ops import moe as op
from quire.ops.linear import quantize_weight

E, D, F_, X = 5, 24, 16, 2


def inputs(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = ((tokens, D), (tokens, E), (E * 2 * F_, D), (E * D, F_))
    x, logits, gate_up, down = (torch.randn(*shape, generator=draw) for shape in shapes)
    return x, 2 * logits, gate_up / D**0.5, down / F_**0.5


def plain(x_TD: Tensor, logits_TE: Tensor, gate_up: Tensor, down: Tensor, normalised: bool) -> Tensor:
    out = torch.zeros_like(x_TD)
    for t, x in enumerate(x_TD):
        best = logits_TE[t].softmax(-1).sort(descending=True)
        total = best.values[:X].sum() if normalised else 1.0
        for value, e in zip(best.values[:X], best.indices[:X].tolist(), strict=True):
            gate, up = (gate_up.view(E, 2, F_, D)[e] @ x).unbind(0)
            out[t] += value / total * (down.view(E, D, F_)[e] @ (F.silu(gate) * up))
    return out


@pytest.mark.parametrize("tokens", [0, 1, 3, 40])
@pytest.mark.parametrize("normalised", [False, True])
def test_it_is_the_weighted_sum_of_the_chosen_experts(tokens: int, normalised: bool) -> None:
    given = inputs(tokens)
    expected = plain(*given, normalised)
    assert torch.allclose(op.moe(*given, X, normalised, "silu"), expected, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 40])
def test_what_a_graph_captures_is_the_same(tokens: int) -> None:
    x, logits, gate_up, down = inputs(tokens)

    def block(x_ND: Tensor, expert: int) -> Tensor:
        gate, up = (x_ND @ op.part(gate_up, expert, E).t()).chunk(2, -1)  # type: ignore[union-attr]
        return F.silu(gate) * up @ op.part(down, expert, E).t()  # type: ignore[union-attr]

    routed = op.route(logits, X, True)
    some, all_ = op.by_expert(x, *routed, E, block), op.everywhere(x, *routed, E, block)
    assert torch.allclose(some, all_, atol=1e-5)


def test_an_expert_nobody_chose_is_not_asked() -> None:
    x, logits, _, _ = inputs(6)
    logits[:, 3] = -100.0
    asked: list[int] = []
    op.by_expert(x, *op.route(logits, X, True), E, lambda x, e: asked.append(e) or x)
    assert 3 not in asked and len(asked) == len(set(asked))


@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 8)])
def test_experts_in_few_bits(bits: int, group: int) -> None:
    """As the same experts with weights that were rounded so."""
    x, logits, gate_up, down = inputs(9)
    quantized = [quantize_weight(weight, bits, group, dynamic=False) for weight in (gate_up, down)]
    expected = op.moe(x, logits, *(weight.dense() for weight in quantized), X, True, "silu")
    assert torch.allclose(op.moe(x, logits, *quantized, X, True, "silu"), expected, atol=1e-5)
