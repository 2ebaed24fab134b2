"""quire's layers in place of the leaves of a model's own code: linear layers, embeddings and norms.

Owns: which modules are replaced, and with what. A leaf is known by what it computes: a norm is tried on numbers, never
taken by the name of its class. What is like none of them stays the model's own, and its weights become slots of the
model. Shape legend: T tokens, D hidden, H heads, E head size.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quire.layers.linear import Embedding, Linear
from quire.layers.norm import LayerNorm, RMSNorm
from quire.layers.slots import NORM, NORMAL, Part, Slot, SlotModule
from quire.ops.norm import rms_norm

# How Transformers' plans for tensor parallelism name the ways to cut a layer.
SPLITS = {"colwise": "columns", "colwise_rep": "columns", "colwise_gather_output": "columns", "rowwise": "rows"}
Known = dict[tuple[Any, ...], "float | None"]
EPS = (1e-3, 1e-12)  # bounds of what may be a norm's epsilon


class OwnLinear(Linear):
    """With the attributes that modeling code reads of a linear layer."""

    def __init__(self, inputs: int, outputs: int, bias: bool, split: str | None, transposed: bool = False) -> None:
        super().__init__(inputs, outputs, bias, split, transposed)
        self.in_features, self.out_features = inputs, outputs


class OwnEmbedding(Embedding):
    """For ids of any shape; rows times `factor`, a number in the model's dtype."""

    def __init__(self, count: int, size: int, factor: float = 1.0, split: str | None = None) -> None:
        super().__init__(count, size, split=split)
        self.num_embeddings, self.embedding_dim, self.factor = count, size, factor

    def forward(self, ids: Tensor, add_TD: Tensor | None = None) -> Tensor:  # type: ignore[override]
        rows_TD = super().forward(ids.reshape(-1), add_TD).view(*ids.shape, -1)
        return rows_TD if self.factor == 1.0 else rows_TD * self.factor


class OwnRMSNorm(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]


class OwnLayerNorm(LayerNorm):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]


def replace_leaves(model: nn.Module, plan: Mapping[str, str], vocab: int) -> None:
    """Replaces the leaves of `model` (its body). `plan`: patterns of paths -> how Transformers would cut the layer."""
    made: dict[int, SlotModule] = {}  # of a module in two places, one layer
    owned: set[int] = set()
    norms: Known = {}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if not path or any(True for _ in module.children()):
            continue
        new = made.get(id(module)) or _replacement(path, module, plan, vocab, norms)
        if new is None:
            continue
        made[id(module)] = new
        for name, old in module.named_parameters(recurse=False):
            _share(new, name, old, owned)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, new)


def _share(new: SlotModule, name: str, old: nn.Parameter, owned: set[int]) -> None:
    """Parameters that are one in the model's own tree stay one, with one slot."""
    if new.get_parameter(name).shape != old.shape:
        return
    setattr(new, name, old)
    if id(old) in owned:
        del new.slots[name]
    owned.add(id(old))


def split_of(path: str, plan: Mapping[str, str]) -> str | None:
    for pattern, style in plan.items():
        if re.fullmatch(re.escape(pattern).replace(r"\*", r"[^.]+"), path):
            return SPLITS.get(style)
    return None


def _replacement(path: str, module: nn.Module, plan: Mapping[str, str], vocab: int, norms: Known) -> SlotModule | None:
    kind: Any = type(module)
    if isinstance(module, nn.Linear) and kind.forward is nn.Linear.forward:
        outputs, inputs = module.weight.shape
        return OwnLinear(inputs, outputs, module.bias is not None, split_of(path, plan))
    if isinstance(module, Conv1D) and kind.forward is Conv1D.forward:
        inputs, outputs = module.weight.shape
        return OwnLinear(inputs, outputs, True, split_of(path, plan), transposed=True)
    if isinstance(module, nn.Embedding):
        scale = embedding_scale(module)
        if scale is None:
            return None
        count, size = module.weight.shape
        return OwnEmbedding(count, size, scale, "vocab" if count >= vocab else None)
    if isinstance(module, nn.LayerNorm) and kind.forward is nn.LayerNorm.forward:
        return _layer_norm(module)
    return _rms_norm(module, norms)


def _layer_norm(module: nn.LayerNorm) -> SlotModule | None:
    one = len(module.normalized_shape) == 1
    affine = module.weight is not None
    if not one or (affine and module.bias is None):
        return None
    return OwnLayerNorm(module.normalized_shape[0], module.eps, affine)


def _real(module: nn.Module, **parameters: Tensor) -> nn.Module:
    """`module` with other numbers."""
    twin = copy.copy(module)
    twin._parameters = {name: nn.Parameter(value, requires_grad=False) for name, value in parameters.items()}
    return twin


@torch.no_grad()
def embedding_scale(module: nn.Embedding) -> float | None:
    """What the rows are multiplied by; None where anything else happens to them."""
    if type(module).forward is nn.Embedding.forward:
        return 1.0 if module.max_norm is None else None
    table = torch.rand(8, 4) + 0.5
    ids = torch.tensor([[1, 7, 0, 2]])
    try:
        out = _real(module, weight=table)(ids)
    except Exception:  # code of any kind: then it stays as it is
        return None
    scale = float((out / F.embedding(ids, table)).mean())
    return scale if torch.allclose(out, F.embedding(ids, table) * scale, rtol=1e-6) else None


def _rms_norm(module: nn.Module, known: Known) -> SlotModule | None:
    eps = rms_eps(module, known)
    weight: Any = getattr(module, "weight", None)
    return None if eps is None else OwnRMSNorm(weight.shape[0], eps)


def rms_eps(module: nn.Module, known: Known) -> float | None:
    """The epsilon of a module with one vector of weights, if it gives RMSNorm's numbers in float32 and its order of
    roundings in bfloat16; None for anything else. `known`: what was found of modules alike."""
    parameters = dict(module.named_parameters(recurse=False))
    if list(parameters) != ["weight"] or parameters["weight"].dim() != 1:
        return None
    if len(inspect.signature(module.forward).parameters) != 1:
        return None
    size = parameters["weight"].shape[0]
    floats = tuple(sorted({v for v in vars(module).values() if isinstance(v, float) and EPS[1] <= v <= EPS[0]}))
    key = (type(module), size, floats)
    if key not in known:
        known[key] = _tried_eps(module, size, floats)
    return known[key]


@torch.no_grad()
def _tried_eps(module: nn.Module, size: int, candidates: tuple[float, ...]) -> float | None:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(size, generator=random) + 0.5
    x = torch.randn((1, 6, size), generator=random)
    # Rows of very different size: in the smallest epsilon is what counts, in the largest any clipping would show.
    x = x * torch.tensor([1e-6, 1e-4, 1e-2, 1.0, 1e2, 1e4]).view(1, 6, 1)
    try:
        out = _real(module, weight=weight)(x)
        rough = _real(module, weight=weight.bfloat16())(x.bfloat16())
    except Exception:  # no norm, whatever it is
        return None
    if not isinstance(out, Tensor) or out.shape != x.shape:
        return None
    for eps in candidates:
        exact, _ = rms_norm(x, None, weight, eps)
        near, _ = rms_norm(x.bfloat16(), None, weight.bfloat16(), eps)
        if torch.allclose(out, exact, rtol=1e-5, atol=1e-9) and torch.allclose(
            rough.float(), near.float(), rtol=2e-2, atol=1e-9
        ):
            return eps
    return None


def own_slots(root: SlotModule) -> None:
    """The parameters that no layer of quire owns become slots of `root`, by their paths."""
    owned = {id(p) for m in root.modules() if isinstance(m, SlotModule) for p in m.parameters(recurse=False)}
    for path, module in root.named_modules():
        if isinstance(module, SlotModule):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in owned:
                continue
            full = f"{path}.{name}"
            norm = parameter.dim() == 1 and "norm" in type(module).__name__.lower() and name == "weight"
            root.slots[full] = Slot([Part(full, tuple(parameter.shape))], NORM if norm else NORMAL)
            owned.add(id(parameter))
