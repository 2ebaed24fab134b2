"""Rotary position embedding: the table of angles and its application (the op that does it is `ops.heads`).

Owns: frequencies for each scaling kind, as Transformers computes them (float32 throughout, since at position p an error
of the frequency counts p times). Knows no layers.

Shape legend: T tokens, L table rows (positions), H query heads, K KV heads, E head size, F = rotary_dim / 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quire.config.arch import RopeParams
from quire.types.errors import ClientError


def rotary(q_THE: Tensor, k_TKE: Tensor, table_2LF: Tensor, positions_T: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates the first 2 * F numbers of each head, half style: pairs (x[f], x[f + F]) by the angle of f
    (arXiv:2104.09864). `table_2LF` float32: cosines, sines; `positions_T` int64."""
    cos_TF, sin_TF = table_2LF[:, positions_T].unbind(0)
    return _rotate(q_THE, cos_TF, sin_TF), _rotate(k_TKE, cos_TF, sin_TF)


def _rotate(x_THE: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    width = cos_TF.shape[-1]
    cos, sin = cos_TF.unsqueeze(1), sin_TF.unsqueeze(1)
    x = x_THE.float()
    a, b, rest = x[..., :width], x[..., width : 2 * width], x[..., 2 * width :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1).to(x_THE.dtype)


def rotary_table(rope: RopeParams, length: int, device: torch.device) -> Tensor:
    """Cosines and sines of positions 0 .. length-1, (2, L, F) float32, scaled by the attention factor.

    "dynamic" (NTK by current length): Transformers recomputes the frequencies of all tokens of a call from its longest
    position, so a token's key depends on how the sequence was cut into calls. Here position p always turns with the
    frequencies of a sequence of p + 1 tokens: a function of the position alone, so that chunks, preemption and shared
    prefixes cannot change it. It equals Transformers for sequences up to `max_position`, and beyond them for a cached
    decode of one token a step.

    "longrope": Transformers divides all of a sequence's frequencies by the long factors once it outgrows the original
    length, so that its cache has to be made anew. Here `length`, the longest a sequence may get, decides for all of
    them: keys and shared prefixes stay what they are. It equals Transformers for every sequence where `length` is
    within the original one, and else for those that outgrow it.
    """
    positions = torch.arange(length, dtype=torch.float32)
    if rope.kind == "dynamic":
        inv_freq = _dynamic(rope, torch.arange(1, length + 1))
        factor = 1.0
    elif rope.kind == "longrope":
        inv_freq, factor = _longrope(rope, length), rope.attention_factor
    elif rope.kind in _KINDS:
        inv_freq, factor = _KINDS[rope.kind](rope)
    else:
        raise ClientError(
            f"rope type {rope.kind!r} is not supported; there are {', '.join([*_KINDS, 'dynamic', 'longrope'])}"
        )
    angles = positions.unsqueeze(-1) * inv_freq
    return torch.stack((angles.cos() * factor, angles.sin() * factor)).to(device)


def _exponents(rope: RopeParams) -> Tensor:
    return torch.arange(0, rope.rotary_dim, 2, dtype=torch.int64).float() / rope.rotary_dim


def _default(rope: RopeParams) -> tuple[Tensor, float]:
    return 1.0 / (rope.theta ** _exponents(rope)), 1.0


def _linear(rope: RopeParams) -> tuple[Tensor, float]:
    return _default(rope)[0] / rope.factor, 1.0


def _dynamic(rope: RopeParams, lengths_L: Tensor) -> Tensor:
    """Frequencies (L, F) of sequences of these lengths: the base grows with the length beyond `max_position`."""
    dim, most = rope.rotary_dim, rope.max_position
    growth_L = (rope.factor * lengths_L.clamp(min=most) / most) - (rope.factor - 1)
    base_L1 = (rope.theta * growth_L ** (dim / (dim - 2))).unsqueeze(-1)
    return 1.0 / (base_L1 ** _exponents(rope))


def _longrope(rope: RopeParams, length: int) -> Tensor:
    """LongRoPE (arXiv:2402.13753): a divisor for each frequency, one list up to the original length, one beyond."""
    divisors = rope.long_factor if length > rope.original_max_position else rope.short_factor
    return 1.0 / (torch.tensor(divisors, dtype=torch.float32, device="cpu") * rope.theta ** _exponents(rope))


def _llama3(rope: RopeParams) -> tuple[Tensor, float]:
    """Llama 3.1: long waves divided by the factor, short ones kept, a ramp between."""
    inv_freq, _ = _default(rope)
    low, high, context = rope.low_freq_factor, rope.high_freq_factor, rope.original_max_position
    wave = 2 * math.pi / inv_freq
    scaled = torch.where(wave > context / low, inv_freq / rope.factor, inv_freq)
    smooth = (context / wave - low) / (high - low)
    between = ~(wave < context / high) & ~(wave > context / low)
    return torch.where(between, (1 - smooth) * scaled / rope.factor + smooth * scaled, scaled), 1.0


def _yarn(rope: RopeParams) -> tuple[Tensor, float]:
    """YaRN (arXiv:2309.00071): interpolation and extrapolation blended over the dimensions, and an attention factor."""
    dim = rope.rotary_dim
    waves = rope.theta ** _exponents(rope)

    def dimension(rotations: float) -> float:
        turns = rope.original_max_position / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)
    keep = 1 - ramp.clamp(0, 1)
    inv_freq = 1.0 / (rope.factor * waves) * (1 - keep) + 1.0 / waves * keep
    return inv_freq, rope.attention_factor


_KINDS = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
