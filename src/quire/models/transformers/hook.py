"""How the attention of a model that runs from its own code finds the step: `Slot`, and the function that Transformers'
interface for attention calls.

Owns: the slot of one model, set before its forward and cleared after it (only here a step is not an argument), and
`PagedAttention`, quire's attention of one layer. The interface hands over the module that attends; it carries its
model's slot and its own layer as attributes, so that nothing depends on a model passing keyword arguments through.
Shape legend: T tokens, H query heads, K KV heads, E head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from quire.layers.attention import Attention
from quire.layers.step import Step

# Under RUN no mask is made at all: Transformers makes none for an implementation without a mask function. Under PROBE,
# at load, the masks that the model asks for are seen.
RUN, PROBE = "quire", "quire_probe"
SLOT, PAGED = "quire_slot", "quire_paged"


class Handler(Protocol):
    """What stands for attention while a model is examined."""

    def __call__(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, kwargs: dict[str, Any]) -> Tensor:
        """q (1, H, T, E), k and v (1, K, T, E) -> (1, T, H, E)."""
        ...


class Slot:
    """The step that a model runs, or the handler that examines it. One for each model."""

    def __init__(self) -> None:
        self.step: Step | None = None
        self.positions_T: Tensor | None = None
        self.handler: Handler | None = None


class PagedAttention(Attention):
    """`value_size`: size of a value where it is smaller than that of a key; the rest of its page is zero."""

    value_size: int | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, positions_T: Tensor, step: Step) -> Tensor:
        """As the interface has it: q (1, H, T, E), k and v (1, K, T, E) -> (1, T, H, E)."""
        q_THE, k_TKE, v_TKE = (x[0].transpose(0, 1) for x in (q, k, v))
        if self.value_size is not None:
            v_TKE = F.pad(v_TKE, (0, self.head_dim - self.value_size))
        group, pages = step.kv[self.layer]
        meta = step.attn.groups[group]
        q_THE = self.heads(q_THE, k_TKE, v_TKE, pages, meta.slots_T, positions_T)
        out_THE = self.op(q_THE, pages, meta, step.attn, self.scale, self.window, self.softcap, self.slopes_H)
        return (out_THE if self.value_size is None else out_THE[..., : self.value_size]).unsqueeze(0)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
) -> tuple[Tensor, None]:
    slot: Slot = getattr(module, SLOT)
    if slot.handler is not None:
        return slot.handler(module, query, key, value, attention_mask, kwargs), None
    assert slot.step is not None and slot.positions_T is not None, "a model runs outside of a step"
    return getattr(module, PAGED).attend(query, key, value, slot.positions_T, slot.step), None


def _probe_mask(*args: Any, **kwargs: Any) -> Tensor:
    """A mask without numbers. Its `rule` is a function (batch, head, query, key) -> whether the key is seen."""
    out = torch.zeros((1, 1, 1, 1), device=kwargs.get("device", "cpu"))
    out.rule = kwargs.get("mask_function")  # type: ignore[attr-defined]
    return out


def install(model: nn.Module) -> Slot:
    """Gives every module of `model` its slot, and makes the interface known."""
    register: Callable[..., None] = AttentionInterface.register
    register(RUN, _attend)
    register(PROBE, _attend)
    AttentionMaskInterface.register(PROBE, _probe_mask)
    slot = Slot()
    for module in model.modules():
        object.__setattr__(module, SLOT, slot)
    return slot
