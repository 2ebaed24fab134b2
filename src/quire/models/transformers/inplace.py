"""Attention of a model's own code in quire's operations: one product for q, k and v, head norm, rotation and KV write
in one, attention, one product. The rest of the model's layers stays its own.

Owns: which models' attention is such, by the same proof as a whole Llama (`likeness`): a miniature of the model gives
the same hidden states with quire's attention in place of its own. Shape legend: T tokens, D hidden, E head size.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from quire.config.arch import ModelArch
from quire.layers.attention import Attention
from quire.layers.linear import Linear, MergedLinear
from quire.layers.norm import RMSNorm
from quire.layers.slots import walk_slots
from quire.models.transformers import proof
from quire.models.transformers.hook import SLOT, Slot, install
from quire.models.transformers.leaves import Known, rms_eps
from quire.models.transformers.likeness import (
    CPU,
    SAME,
    GivenRotary,
    Unlike,
    angles_size,
    draws,
    halve,
    miniature,
    randomise,
)

log = logging.getLogger(__name__)

PARTS = ("q_proj", "k_proj", "v_proj")
OUTS = ("o_proj", "out_proj", "dense")
NORMS = ("q_norm", "k_norm")


@dataclass(frozen=True)
class Kind:
    """How all the model's attention is made. `out`: the last product's name; `eps`: of the head norm, None without
    one; `rotary_dim`: 0 where nothing turns; `paired`: see `likeness.Likeness`; `roped`: the layers that turn."""

    out: str
    eps: float | None
    rotary_dim: int
    paired: bool
    roped: tuple[bool, ...]


class InPlaceAttention(nn.Module):
    """Called as a model's attention is, whatever else it is handed."""

    def __init__(
        self, arch: ModelArch, layer: int, rule: proof.Rule, module: nn.Module, kind: Kind, rotary: Any
    ) -> None:
        super().__init__()
        matrices: Any = module
        inputs = matrices.q_proj.weight.shape[1]
        parts = {name: getattr(module, name).weight.shape[0] for name in PARTS}
        self.qkv_proj = MergedLinear(inputs, parts, matrices.q_proj.bias is not None, split="heads")
        last = getattr(module, kind.out)
        self.out_name = kind.out
        self.add_module(
            kind.out, Linear(last.weight.shape[1], last.weight.shape[0], last.bias is not None, split="rows")
        )
        shape = replace(arch, num_heads=rule.heads, norm_eps=kind.eps or 0.0)
        turns = rotary if kind.roped[layer] else None
        self.attn = Attention(shape, layer, turns, RMSNorm if kind.eps is not None else None, scale=rule.scale)
        self.attn.window, self.attn.softcap = rule.window, rule.softcap
        if kind.paired and kind.roped[layer]:
            halve(self.qkv_proj.slots.values(), arch.head_dim, kind.rotary_dim)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        slot: Slot = getattr(self, SLOT)
        q, k, v = self.qkv_proj(hidden_states[0])
        last = self._modules[self.out_name]
        assert isinstance(last, Linear)
        if slot.handler is not None:  # a trial, which sees what attention is given
            q, k, v = (x.unflatten(-1, (-1, self.attn.head_dim)).transpose(0, 1)[None] for x in (q, k, v))
            out_TD = slot.handler(self, q, k, v, None, {})[0].flatten(1)
        else:
            assert slot.step is not None and slot.positions_T is not None, "a model runs outside of a step"
            out_TD = self.attn(q, k, v, slot.positions_T, slot.step)
        return last(out_TD).unsqueeze(0), None


class NoAngles(nn.Module):
    """In place of a rotary module that nobody asks any more: nothing, twice."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return x[..., :0], x[..., :0]


def replace_attention(
    whole: Any, prefix: str, body: nn.Module, arch: ModelArch, rules: Mapping[Any, proof.Rule]
) -> bool:
    """Puts quire's attention in place of that of `body`, if all of it is shown to be the same; says whether it did."""
    try:
        small = miniature(whole)
        small_body = getattr(small, prefix)
        trial = proof.Model(prefix, small_body, small.config, install(small_body), small_arch(small, arch))
        small_rules = proof.facts(trial, CPU)
        for kind in kinds(whole, body, arch, rules):
            if proven(trial, small_rules, replace(kind, rotary_dim=size_of(small_body) if kind.rotary_dim else 0)):
                put(body, arch, rules, kind)
                if kind.rotary_dim:
                    body.rotary_emb = NoAngles()
                log.debug("%s attends in quire's operations", arch.architecture)
                return True
        raise Unlike("its numbers differ")
    except Unlike as reason:
        log.debug("%s keeps its own attention, since %s", arch.architecture, reason)
    except Exception as error:  # the model's own code, in a size that it was not made for
        log.debug("%s keeps its own attention, which could not be compared: %r", arch.architecture, error)
    return False


def size_of(body: Any) -> int:
    return angles_size(getattr(body, "rotary_emb", None))


def kinds(whole: Any, body: Any, arch: ModelArch, rules: Mapping[Any, proof.Rule]) -> Iterator[Kind]:
    """What it might be, by the names of the parts and by the layers that may turn."""
    known: Known = {}
    found: set[tuple[str, float | None]] = set()
    for module, rule in rules.items():
        children = {name: child for name, child in module.named_children() if any(True for _ in child.parameters())}
        out = next((name for name in OUTS if name in children), "")
        norms = [children.pop(name) for name in NORMS if name in children]
        if set(children) != {*PARTS, out} or any(True for _ in module.parameters(recurse=False)):
            raise Unlike("its parts have other names")
        if any(type(child) is not nn.Linear for child in children.values()) or rule.value_dim != rule.head_dim:
            raise Unlike("its parts are of another kind")
        if len({(child.bias is None) for name, child in children.items() if name != out}) > 1:
            raise Unlike("only some of its products have a bias")
        eps = {rms_eps(norm, known) for norm in norms}
        if (norms and (len(norms), len(eps)) != (2, 1)) or None in eps:
            raise Unlike("its head norms are of another kind")
        if any(norm.weight.shape != (rule.head_dim,) for norm in norms):  # type: ignore[union-attr]
            raise Unlike("its norms are of all heads at once")
        found.add((out, next(iter(eps), None)))
    if len(found) != 1:
        raise Unlike("its layers are of several kinds")
    ((out, eps),) = found
    layers = arch.num_layers
    if getattr(body, "rotary_emb", None) is None:
        yield Kind(out, eps, 0, False, (False,) * layers)
        return
    text = whole.config.get_text_config(decoder=True)
    patterns: list[Sequence[Any]] = [(True,) * layers]
    if (listed := getattr(text, "no_rope_layers", None)) is not None:
        patterns.append(listed)
    patterns.append([rule.window is not None for rule in rules.values()])
    for roped in dict.fromkeys(tuple(bool(turns) for turns in pattern) for pattern in patterns):
        for paired in (False, True):
            yield Kind(out, eps, size_of(body), paired, roped)


def put(body: nn.Module, arch: ModelArch, rules: Mapping[Any, proof.Rule], kind: Kind) -> list[InPlaceAttention]:
    rotary = GivenRotary(body.rotary_emb, kind.rotary_dim) if kind.rotary_dim else None
    paths = {module: path for path, module in body.named_modules()}
    made: list[InPlaceAttention] = []
    for layer, (module, rule) in enumerate(rules.items()):
        with torch.device("meta"):
            new = InPlaceAttention(arch, layer, rule, module, kind, rotary)
        object.__setattr__(new, SLOT, getattr(module, SLOT))
        parent, _, name = paths[module].rpartition(".")
        setattr(body.get_submodule(parent), name, new)
        made.append(new)
    return made


def small_arch(small: Any, arch: ModelArch) -> ModelArch:
    text = small.config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    shape = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": size}
    return replace(arch, hidden_size=text.hidden_size, vocab_size=text.vocab_size, **shape)


@torch.no_grad()
def proven(trial: proof.Model, rules: Mapping[Any, proof.Rule], kind: Kind) -> bool:
    """Whether the miniature gives the same with quire's attention; its own is back in place afterwards."""
    body = trial.body
    cases = []
    for gain, first in draws(trial.arch.max_position):
        randomise(body, gain)
        state = {name: parameter.clone() for name, parameter in body.named_parameters()}
        tokens_T, positions_T = torch.arange(proof.TOKENS) * 5 + 1, torch.arange(proof.TOKENS) + first
        with trial.attending("eager"):
            cases.append((state, first, tokens_T, positions_T, trial.run(tokens_T, positions_T)))
    new = put(body, trial.arch, rules, kind)
    try:
        return all(_agrees(trial, new, *case) for case in cases)
    finally:
        for module, attention in zip(rules, new, strict=True):
            path = next(path for path, each in body.named_modules() if each is attention)
            parent, _, name = path.rpartition(".")
            setattr(body.get_submodule(parent), name, module)


def _agrees(
    trial: proof.Model, new: list[InPlaceAttention], state: dict[str, Tensor], first: int, tokens_T: Tensor,
    positions_T: Tensor, theirs_TD: Tensor,
) -> bool:  # fmt: skip
    body = trial.body
    for name, parameter in body.named_parameters():
        if name in state:
            parameter.copy_(state[name])
    for path, module, name, slot in walk_slots(body):
        made = torch.empty(module.get_parameter(name).shape)
        for part in slot.parts:
            part.fill(made, state[part.name(path)])
        setattr(module, name, nn.Parameter(made, requires_grad=False))
    for module in body.modules():
        if isinstance(module, GivenRotary):
            module.build(proof.TOKENS, CPU, first)
    trial.slot.step = proof.one_sequence(trial.arch, CPU, torch.float32, proof.TOKENS)
    trial.slot.positions_T = positions_T - first  # where the angles of a position stand
    try:
        return proof.differ(theirs_TD, trial.run(tokens_T, positions_T)) < SAME
    finally:
        trial.slot.step = trial.slot.positions_T = None
