"""Mixtures of experts: the op `moe`, from a router's logits to the weighted sum of the chosen experts' outputs.

Owns: its meaning, routing and grouped computation in one. Knows no layers and no names.
Facts of its `Case`: experts, top_k, inputs, intermediate, kind, bits (None: plain weights).

Shape legend: T tokens, X experts of a token, E experts, D hidden, F intermediate size of an expert.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quire.ops import native, triton
from quire.ops.activation import gated_activation
from quire.ops.dispatch import REGISTRY
from quire.ops.linear import QuantizedWeight, linear, quantized_linear

Weight = Tensor | QuantizedWeight


def route(logits_TE: Tensor, top_k: int, normalised: bool) -> tuple[Tensor, Tensor]:
    """The `top_k` most likely experts of each token: their probabilities in float32 (`normalised`: scaled to sum to 1)
    and their numbers (int64), both (T, X)."""
    weights_TX, experts_TX = logits_TE.float().softmax(-1).topk(top_k, -1)
    if normalised:
        weights_TX = weights_TX / weights_TX.sum(-1, keepdim=True)
    return weights_TX, experts_TX


def part(weight: Weight, expert: int, experts: int) -> Weight:
    """The matrix of one expert: those of all lie one below the other."""
    rows = weight.shape[0] // experts
    if isinstance(weight, Tensor):
        return weight[expert * rows : (expert + 1) * rows]
    return weight.rows(expert * rows, (expert + 1) * rows)


def product(x_TD: Tensor, weight: Weight) -> Tensor:
    return linear(x_TD, weight, None) if isinstance(weight, Tensor) else quantized_linear(x_TD, weight, None)


def moe(
    x_TD: Tensor, logits_TE: Tensor, gate_up: Weight, down: Weight, top_k: int, normalised: bool, kind: str
) -> Tensor:
    """(T, D): sum over a token's experts (`route`) of weight * down(`kind`(gate(x)) * up(x)), arXiv:2401.04088.

    `gate_up` (E * 2F, D): of each expert the gate's rows, then the other ones; `down` (E * D, F). An expert's own
    output is rounded as `linear`'s are, the weighted sum is made in float32 and rounded once.
    """
    experts = logits_TE.shape[-1]

    def block(x_ND: Tensor, expert: int) -> Tensor:
        hidden_NF = gated_activation(product(x_ND, part(gate_up, expert, experts)), kind)
        return product(hidden_NF, part(down, expert, experts))

    weights_TX, experts_TX = route(logits_TE, top_k, normalised)
    if x_TD.device.type == "cpu":
        return by_expert(x_TD, weights_TX, experts_TX, experts, block)
    return everywhere(x_TD, weights_TX, experts_TX, experts, block)


def by_expert(
    x_TD: Tensor, weights_TX: Tensor, experts_TX: Tensor, experts: int, block: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """Each expert sees the tokens that chose it, those without any are left out. The host must know who chose whom."""
    order_N = experts_TX.flatten().argsort(stable=True)
    token_N, weight_N = order_N // experts_TX.shape[1], weights_TX.flatten()[order_N]
    sum_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
    at = 0
    for expert, count in enumerate(torch.bincount(experts_TX.flatten(), minlength=experts).tolist()):
        if count:
            mine = slice(at, at + count)
            y_ND = block(x_TD[token_N[mine]], expert).float() * weight_N[mine].unsqueeze(-1)
            sum_TD.index_add_(0, token_N[mine], y_ND)
            at += count
    return sum_TD.to(x_TD.dtype)


def everywhere(
    x_TD: Tensor, weights_TX: Tensor, experts_TX: Tensor, experts: int, block: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """Every expert sees every token: more work, but its shapes are static and the host need know nothing, so that a
    graph can capture it."""
    weights_TE = torch.zeros((x_TD.shape[0], experts), device=x_TD.device).scatter_(1, experts_TX, weights_TX)
    sum_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
    for expert in range(experts):
        sum_TD += block(x_TD, expert).float() * weights_TE[:, expert].unsqueeze(-1)
    return sum_TD.to(x_TD.dtype)


MOE = REGISTRY.op("moe", moe)
native.register(MOE, "supports_moe")
triton.register(MOE, "moe:moe", "supports_moe")
