"""Models whose code computes what quire's Llama computes run as that: same weights, fused and recorded as native ones.

Owns: the proof. The names of the tensors must be those of Llama, and a miniature of the model (its own class and
configuration, every layer, but narrow) with random weights must give the same hidden states in float32 as quire's
blocks with these weights. Scales, windows and caps are those that the model's attention was called with; rotary angles
are computed by the model's own module. What cannot be shown runs from the model's own code.
Shape legend: T tokens, L positions, D hidden, E head size, F = rotated size / 2.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from quire.config.arch import ModelArch, RopeParams
from quire.layers.rotary import Rotary
from quire.layers.slots import Part, walk_slots
from quire.models.base import Decoder
from quire.models.llama import LlamaBlock
from quire.models.qwen3 import Qwen3Block
from quire.models.transformers import proof
from quire.models.transformers.fused import activation_of
from quire.models.transformers.hook import install
from quire.models.transformers.leaves import Known, rms_eps

log = logging.getLogger(__name__)

CPU = torch.device("cpu")
SAME = 2e-5  # mean relative distance of hidden states in float32
HEAD = 32  # head size of a miniature
# Gains of the weights: the last is so large that a clipped value would show.
GAINS = (1.0, 1.0, 1.0, 1.0, 6.0)


@dataclass(frozen=True)
class Likeness:
    """What a Llama is told to be this model. `roped`: the layers that turn. `paired`: rotation turns neighbours (x[2f],
    x[2f + 1]) instead of halves; rows of q and k are then stored in the order of halves, which no product of both
    notices. `activation`, `eps`, biases and head norm as found."""

    arch: ModelArch
    head_norm: bool
    roped: tuple[bool, ...]
    rotary_dim: int
    paired: bool


class GivenRotary(Rotary):
    """Angles by a model's own module."""

    def __init__(self, module: Any, size: int) -> None:
        super().__init__(RopeParams(theta=0.0, rotary_dim=size, max_position=0))
        self._module = (module,)  # in a tuple: its buffers are not this module's

    def build(self, length: int, device: torch.device, first: int = 0) -> None:
        """Makes the table, from position `first` on."""
        positions_L = torch.arange(first, first + length)
        self.table_2LF = angles(self._module[0], positions_L, self.rope.rotary_dim // 2).to(device)


def angles(module: Any, positions_L: Tensor, width: int) -> Tensor:
    """(2, L, F): cosines and sines, of which modules give each twice, as halves or as neighbours."""
    cos_LE, sin_LE = (x[0].float() for x in module(torch.zeros((1, 1, 1)), positions_L[None]))
    pairs = torch.equal(cos_LE[:, 0::2], cos_LE[:, 1::2]) and torch.equal(sin_LE[:, 0::2], sin_LE[:, 1::2])
    halves = torch.equal(cos_LE[:, :width], cos_LE[:, width:])
    if cos_LE.shape[1] != 2 * width or not (pairs or halves):
        raise Unlike("its rotary angles are laid out in a way of its own")
    take = slice(None, width) if halves else slice(0, None, 2)
    return torch.stack((cos_LE[:, take], sin_LE[:, take]))


class Unlike(Exception):
    """Why a model is not known to be a Llama."""


def likeness(whole: Any, prefix: str, body: nn.Module, arch: ModelArch, rules: Sequence[proof.Rule]) -> Decoder | None:
    """quire's blocks for `body`, on the meta device; None where they are not shown to be the same."""
    try:
        names = {name for name, _ in body.named_parameters()}
        first = found(whole, body, arch, rules, names, paired=False)
        small = miniature(whole)
        for paired in (False, True):
            like = replace(first, paired=paired)
            if proven(like, small, getattr(small, prefix)):
                log.debug("%s computes what Llama's blocks do", arch.architecture)
                return decoder(like, body, rules)
        raise Unlike("its numbers differ")
    except Unlike as reason:
        log.debug("%s runs operation by operation: it is no Llama, since %s", arch.architecture, reason)
    except Exception as error:  # the model's own code, in a size that it was not made for
        log.debug("%s runs operation by operation: it could not be compared with Llama: %r", arch.architecture, error)
    return None


def found(
    whole: Any, body: nn.Module, arch: ModelArch, rules: Sequence[proof.Rule], names: set[str], paired: bool
) -> Likeness:
    """What kind of Llama it would be, by its tensors' names and by its leaves."""
    layers = [f"layers.{i}" for i in range(arch.num_layers)]

    def everywhere(*tails: str) -> bool:
        present = [f"{layer}.{tail}" in names for layer in layers for tail in tails]
        if any(present) != all(present):
            raise Unlike(f"only some layers have {tails[0]}")
        return all(present)

    if not everywhere("self_attn.q_proj.weight", "mlp.gate_proj.weight", "input_layernorm.weight"):
        raise Unlike("its tensors have other names")
    norms = [module for name, module in body.named_modules() if name.split(".")[-1].endswith("norm")]
    known: Known = {}
    eps, *others = {rms_eps(norm, known) for norm in norms}
    if eps is None or others or {(r.heads, r.value_dim) for r in rules} != {(rules[0].heads, arch.head_dim)}:
        raise Unlike("its norms or heads are of another kind")
    if (activation := activation_of(body.get_submodule("layers.0.mlp"))) is None:
        raise Unlike("its activation is of another kind")
    shape = replace(
        arch,
        num_heads=rules[0].heads,
        attention_bias=everywhere("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
        attention_out_bias=everywhere("self_attn.o_proj.bias"),
        mlp_bias=everywhere("mlp.gate_proj.bias", "mlp.up_proj.bias", "mlp.down_proj.bias"),
        norm_eps=eps,
        activation=activation,
    )
    rotary_dim = angles_size(getattr(body, "rotary_emb", None))
    head_norm = everywhere("self_attn.q_norm.weight", "self_attn.k_norm.weight")
    like = Likeness(shape, head_norm, (True,) * arch.num_layers, rotary_dim, paired)
    with torch.device("meta"):
        wanted = slot_shapes(decoder(like, body, rules))
    if wanted != {name: tuple(p.shape) for name, p in body.named_parameters()}:
        raise Unlike("its tensors have other names or shapes")
    return replace(like, roped=layers_that_turn(whole, arch))


def angles_size(module: Any) -> int:
    if module is None:
        raise Unlike("it has no rotary angles")
    cos, _ = module(torch.zeros((1, 1, 1)), torch.zeros((1, 1), dtype=torch.long))
    return int(cos.shape[-1])


def slot_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {part.name(path): part.shape for path, _, _, slot in walk_slots(model) for part in slot.parts}


def layers_that_turn(whole: Any, arch: ModelArch) -> tuple[bool, ...]:
    kept = getattr(whole.config, "no_rope_layers", None)
    return tuple(bool(x) for x in kept) if kept else (True,) * arch.num_layers


def decoder(like: Likeness, body: nn.Module, rules: Sequence[proof.Rule]) -> Decoder:
    """The blocks, on the meta device."""
    kind = Qwen3Block if like.head_norm else LlamaBlock
    rotary = GivenRotary(body.rotary_emb, like.rotary_dim)

    def block(arch: ModelArch, layer: int, _: Rotary | None) -> nn.Module:
        made = kind(arch, layer, rotary if like.roped[layer] else None)
        attn, rule = made.self_attn.attn, rules[layer]
        attn.scale, attn.window, attn.softcap = rule.scale, rule.window, rule.softcap
        if like.paired and like.roped[layer]:
            halve(made.self_attn.qkv_proj.slots.values(), like.arch.head_dim, like.rotary_dim)
        return made

    with torch.device("meta"):
        return Decoder(like.arch, block)


@dataclass(frozen=True)
class Halved(Part):
    """Rows of heads whose rotated part is stored in neighbours, taken in the order of halves."""

    head_dim: int = 0
    rotated: int = 0

    def rows(self) -> slice | None:
        return None

    def fill(self, parameter: Tensor, tensor: Tensor) -> None:
        order = torch.arange(self.head_dim)
        order[: self.rotated] = torch.cat((order[0 : self.rotated : 2], order[1 : self.rotated : 2]))
        heads = tensor.unflatten(0, (-1, self.head_dim))
        super().fill(parameter, heads[:, order.to(tensor.device)].flatten(0, 1))


def halve(slots: Iterable[Any], head_dim: int, rotated: int) -> None:
    for slot in slots:
        for i, part in enumerate(slot.parts[:2]):  # q and k; values are not turned
            extra = {"head_dim": head_dim, "rotated": rotated}
            slot.parts[i] = Halved(part.source, part.shape, part.start, part.size, part.take, part.transposed, **extra)


def miniature(whole: Any) -> Any:
    """The same class and configuration, every layer, but narrow, with memory."""
    config = copy.deepcopy(whole.config)
    text = config.get_text_config(decoder=True)
    heads, kv_heads = text.num_attention_heads, getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    whole_heads = size * heads == text.hidden_size
    kv_small = 2 if heads // kv_heads <= 8 else 1
    small = heads // kv_heads * kv_small
    changes: Mapping[str, Any] = {
        "hidden_size": small * HEAD + (0 if whole_heads else 16),
        "num_attention_heads": small,
        "num_key_value_heads": kv_small,
        "intermediate_size": 48,
        "vocab_size": 64,
        "pad_token_id": None,
        "tie_word_embeddings": False,
        **({"head_dim": HEAD} if getattr(text, "head_dim", None) is not None else {}),
    }
    for name, value in changes.items():
        setattr(text, name, value)
    config._attn_implementation = "eager"
    with torch.device("cpu"):
        return type(whole)._from_config(config, attn_implementation="eager", dtype=torch.float32).eval()


@torch.no_grad()
def proven(like: Likeness, small: Any, body: nn.Module) -> bool:
    """Whether the miniature `small` and blocks with its weights agree."""
    text = small.config.get_text_config(decoder=True)
    arch = replace(
        like.arch,
        hidden_size=text.hidden_size,
        num_heads=text.num_attention_heads,
        num_kv_heads=text.num_key_value_heads or text.num_attention_heads,
        head_dim=HEAD,
        intermediate_size=text.intermediate_size,
        vocab_size=text.vocab_size,
    )
    trial = proof.Model("model", body, small.config, install(body), arch)
    rules = list(proof.facts(trial, CPU).values())
    mine = replace(like, arch=arch, rotary_dim=angles_size(body.rotary_emb))
    return all(_agree(mine, body, trial, rules, *draw) for draw in draws(like.arch.max_position))


def draws(longest: int) -> Iterator[tuple[float, int]]:
    """(gain of the weights, first position) of each comparison. Positions go over the whole length: some models scale
    queries or turn otherwise far from the beginning."""
    last = max(0, longest - proof.TOKENS)
    return zip(GAINS, (0, min(300, last), last // 2, last, min(5, last)), strict=True)


def randomise(body: nn.Module, gain: float) -> None:
    random = torch.Generator().manual_seed(1)
    for parameter in body.parameters():
        noise = torch.randn(parameter.shape, generator=random)
        one = parameter.dim() == 1
        parameter.copy_(1 + 0.3 * noise if one else noise * gain / parameter.shape[-1] ** 0.5)


def _agree(
    like: Likeness, body: nn.Module, trial: proof.Model, rules: Sequence[proof.Rule], gain: float, first: int
) -> bool:
    randomise(body, gain)
    mine = decoder(like, body, rules)
    tensors = dict(body.named_parameters())
    for path, module, name, slot in walk_slots(mine):
        made = torch.empty(module.get_parameter(name).shape)
        for part in slot.parts:
            part.fill(made, tensors[part.name(path)])
        setattr(module, name, nn.Parameter(made, requires_grad=False))
    for module in mine.modules():
        if isinstance(module, GivenRotary):
            module.build(proof.TOKENS, CPU, first)
    tokens_T = torch.arange(proof.TOKENS) * 5 + 1
    positions_T = torch.arange(proof.TOKENS) + first
    with trial.attending("eager"):
        theirs_TD = trial.run(tokens_T, positions_T)
    step = proof.one_sequence(like.arch, CPU, torch.float32, proof.TOKENS)
    return proof.differ(theirs_TD, mine(tokens_T, positions_T - first, step)) < SAME
