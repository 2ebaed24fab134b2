"""Parts of a model's own code that quire computes in fewer operations: gated feed-forward blocks, activations.

Owns: which modules are such blocks. A block is tried with small matrices in place of its own, on numbers of very
different size, so that anything else that it does (a factor, a clip) shows.
Shape legend: T tokens, D hidden, F intermediate.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from quire.layers.mlp import MLP, Activation
from quire.ops.activation import ACTIVATIONS

GATE, UP, BOTH, DOWN = "gate_proj", "up_proj", "gate_up_proj", "down_proj"
SIZES = (1e-3, 0.1, 1.0, 30.0, 3e3)


def activation_of(mlp: nn.Module) -> str | None:
    """The kind of a block's one activation."""
    acts = [module for name, module in mlp.named_children() if name.startswith("act")]
    return kind_of(acts[0]) if len(acts) == 1 else None


def replace_activations(body: nn.Module) -> None:
    """quire's operation in place of each activation that is one."""
    for path, module in list(body.named_modules()):
        name = path.rpartition(".")[2]
        if not name.startswith("act") or any(True for _ in module.children()) or module.state_dict():
            continue
        if (kind := kind_of(module)) is not None:
            setattr(body.get_submodule(path.rpartition(".")[0]), name, Activation(kind))


def kind_of(act: Any) -> str | None:
    """The activation by its numbers; None where it has no formula in quire."""
    x = torch.cat((torch.linspace(-9, 9, 181), torch.tensor([-3e3, -100.0, 100.0, 3e3])))
    for kind, formula in ACTIVATIONS.items():
        try:
            if torch.allclose(act(x), formula(x), rtol=1e-5, atol=2e-6):
                return kind
        except Exception:  # code of any kind: then it stays as it is
            return None
    return None


def replace_gated(body: nn.Module) -> None:
    """quire's gated block in place of each module of `body` that computes it."""
    for path, module in list(body.named_modules()):
        matrices: dict[str, Any] = {name: m for name, m in module.named_children() if type(m) is nn.Linear}
        packed = set(matrices) == {BOTH, DOWN}
        if not (packed or set(matrices) == {GATE, UP, DOWN}) or len(list(module.parameters(recurse=False))):
            continue
        shapes = {name: tuple(matrix.weight.shape) for name, matrix in matrices.items()}
        hidden, inner = shapes[DOWN]
        wanted = {BOTH: (2 * inner, hidden)} if packed else {GATE: (inner, hidden), UP: (inner, hidden)}
        biased = {matrix.bias is not None for matrix in matrices.values()}
        if len(biased) > 1 or shapes != {**wanted, DOWN: (hidden, inner)}:
            continue
        kind = activation_of(module)
        if kind is not None and _is_gated(module, kind, packed):
            with torch.device("meta"):
                made = MLP(hidden, inner, kind, biased == {True}, packed)
            parent, _, name = path.rpartition(".")
            setattr(body.get_submodule(parent), name, made)


@torch.no_grad()
def _is_gated(module: nn.Module, kind: str, packed: bool) -> bool:
    """Whether it gives down(act(gate(x)) * up(x)), with matrices of few rows in place of its own."""
    random = torch.Generator().manual_seed(0)

    def matrix(inputs: int, outputs: int) -> nn.Linear:
        small = nn.Linear(inputs, outputs)
        small.weight.copy_(torch.randn((outputs, inputs), generator=random))
        small.bias.copy_(torch.randn(outputs, generator=random))
        return small

    both, down = matrix(6, 20), matrix(10, 6)
    gate, up = nn.Linear(6, 10), nn.Linear(6, 10)
    for half, rows in ((gate, slice(0, 10)), (up, slice(10, 20))):
        half.weight.copy_(both.weight[rows])
        half.bias.copy_(both.bias[rows])
    twin = copy.copy(module)
    parts = {BOTH: both} if packed else {GATE: gate, UP: up}
    twin._modules = {**module._modules, **parts, DOWN: down}
    x_TD = torch.randn((1, len(SIZES), 6), generator=random) * torch.tensor(SIZES).view(1, -1, 1)
    try:
        out: Any = twin(x_TD)
    except Exception:  # code of any kind: then it stays as it is
        return False
    expected_TD = down(ACTIVATIONS[kind](gate(x_TD)) * up(x_TD))
    return (
        isinstance(out, Tensor) and out.shape == x_TD.shape and torch.allclose(out, expected_TD, rtol=1e-5, atol=1e-6)
    )
