"""Sampling over logits, as plain PyTorch: the reference for faster implementations.

Owns: what each parameter does to a row of logits, and how the token is drawn. Knows no requests, rows of a table,
histories or devices.

Every function treats each row by itself, and its result for a row does not depend on the other rows, on how many there
are, or on which of several ways of computing it was taken. Three choices make that exact instead of nearly so:

- Truncation (min_p, top_k, top_p) is one threshold a row: a token survives if its scaled logit is not below it. Equal
  logits survive together, so neither the order of a sort nor its method matters.
- Probability masses are fixed-point integers (`_mass`): their sums are the same in any order and width.
- Noise is a function of (seed, sample index, position, token) only (`ops.philox`).

Shape legend: S sampled rows, V vocabulary, M edits of a row, W words of a row, L length of a word, K largest top_k,
G rows of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from quire.ops import native, triton
from quire.ops.dispatch import REGISTRY
from quire.ops.philox import gumbel_at, gumbel_rows

NEG_INF = float("-inf")
IN_PROMPT = 1 << 30  # bit of a token's count: it occurs in the prompt; the bits below count it in the output
# The likeliest token has mass 2^40; 2^23 tokens of it would still fit in an int64. 2^f = 1 + f (c1 + f (c2 + ...)) on
# -1/2 .. 1/2, from c5; float32 numbers all.
_LOG2E = 1.44269502162933349609375
_EXP2 = (0.001326472614891827, 0.009671512991189957, 0.05550733581185341, 0.24022242426872253, 0.6931470036506653)
_FIRST_LOOK = 256  # candidates among which the nucleus is searched before all are sorted
_CHUNK = 1 << 21  # elements of noise made at once: bounds the memory, and keeps a CPU's caches warm


class Noise(NamedTuple):
    """What the noise of each row is a function of: int64 (S,) each."""

    seed: Tensor
    sample: Tensor
    position: Tensor

    def take(self, index: Tensor | slice) -> Noise:
        return Noise(self.seed[index], self.sample[index], self.position[index])


# --- changes to the logits, all in place -----------------------------------------------------------------------------
# at (G,): the lines of the logits that are meant; None: all, in their order.


def _apply(logits_SV: Tensor, at_G: Tensor | None, change: Callable[[Tensor], Any]) -> None:
    if at_G is None:
        change(logits_SV)
        return
    logits_GV = logits_SV[at_G]
    change(logits_GV)
    logits_SV[at_G] = logits_GV


def add_edits(
    logits_SV: Tensor, ids_GM: Tensor, values_GM: Tensor, until_GM: Tensor, drawn_G: Tensor, at_G: Tensor | None = None
) -> None:
    """Adds `values` at token `ids` (int64) while a row has drawn fewer than `until` tokens.

    Serves logit_bias (without end), single-token bad words (-inf, without end) and min_tokens (-inf on the end
    tokens). Unused entries are value 0 at id 0.
    """
    live_GM = torch.where(drawn_G.unsqueeze(1) < until_GM, values_GM, 0.0)
    _apply(logits_SV, at_G, lambda logits_GV: logits_GV.scatter_add_(1, ids_GM, live_GM))


def forbid_words(logits_SV: Tensor, words_GWL: Tensor, tail_GL: Tensor, at_G: Tensor | None = None) -> None:
    """Masks the token that would complete a word (bad_words of several tokens).

    words: int64, each word back to front, -1 after its end; an unused word is -1 throughout. tail (G, L - 1): the
    row's output back to front, -2 before its begin.
    """
    ahead_GWL = words_GWL[:, :, 1:]
    match_GW = ((ahead_GWL < 0) | (ahead_GWL == tail_GL.unsqueeze(1))).all(-1) & (words_GWL[:, :, 0] >= 0)
    tokens_GW, masked_GW = words_GWL[:, :, 0].clamp_min(0), torch.where(match_GW, NEG_INF, 0.0)
    _apply(logits_SV, at_G, lambda logits_GV: logits_GV.scatter_add_(1, tokens_GW, masked_GW))


def penalise(
    logits_SV: Tensor,
    counts_XV: Tensor,
    repetition_G: Tensor,
    presence_G: Tensor,
    frequency_G: Tensor,
    at_G: Tensor | None = None,
    lines_G: Tensor | None = None,
) -> None:
    """Repetition penalty (CTRL, arXiv:1909.05858: positive logits divided, negative ones multiplied) on tokens of
    prompt or output; then frequency (for each occurrence) and presence (once) penalties on tokens of the output.

    counts: int32, occurrences in the output, with the bit `IN_PROMPT` for tokens of the prompt. lines (G,): those of
    the counts; None: all, in their order.
    """
    counts_GV = counts_XV if lines_G is None else counts_XV.index_select(0, lines_G)

    def change(logits_GV: Tensor) -> None:
        repetition_G1 = repetition_G.unsqueeze(1)
        factor_GV = torch.where(logits_GV > 0, 1.0 / repetition_G1, repetition_G1)
        logits_GV.mul_(torch.where(counts_GV != 0, factor_GV, 1.0))
        drawn_GV = counts_GV & (IN_PROMPT - 1)
        logits_GV.sub_(frequency_G.unsqueeze(1) * drawn_GV)
        logits_GV.sub_(presence_G.unsqueeze(1) * (drawn_GV > 0))

    _apply(logits_SV, at_G, change)


def mask(logits_SV: Tensor, words_XW: Tensor, at_G: Tensor | None = None, lines_G: Tensor | None = None) -> None:
    """-inf for tokens that are not allowed: int32 masks with 32 tokens a word, the lowest bit first; no bit, not
    allowed. lines as for `penalise`."""
    words_GW = words_XW if lines_G is None else words_XW.index_select(0, lines_G)
    masked_GV = ~allowed_bits(words_GW, logits_SV.shape[1])
    _apply(logits_SV, at_G, lambda logits_GV: logits_GV.masked_fill_(masked_GV, NEG_INF))


def allowed_bits(words_GW: Tensor, vocab_size: int) -> Tensor:
    """(G, V) bool from the masks of `mask`."""
    if words_GW.device.type == "cpu":  # NumPy does it ten times faster than the shifts
        bits = np.unpackbits(words_GW.numpy().view(np.uint8), axis=1, count=vocab_size, bitorder="little")
        return torch.from_numpy(bits.view(np.bool_))
    shifts = torch.arange(32, dtype=torch.int32, device=words_GW.device)
    bits_GV = ((words_GW.unsqueeze(-1) >> shifts) & 1).bool().flatten(1)[:, :vocab_size]
    return torch.nn.functional.pad(bits_GV, (0, vocab_size - bits_GV.shape[1]))


ADD_EDITS = REGISTRY.op("add_edits", add_edits)
FORBID_WORDS = REGISTRY.op("forbid_words", forbid_words)
PENALISE = REGISTRY.op("penalise", penalise)
MASK = REGISTRY.op("mask", mask)
for _op in (ADD_EDITS, FORBID_WORDS, PENALISE, MASK):
    triton.register(_op, f"changes:{_op.name}", "untyped")


# --- drawing ---------------------------------------------------------------------------------------------------------


def draw_greedy(logits_SV: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest token of each row, int64, lowest id among equals, and its logit. NaN counts as the largest, so a
    row with NaN shows it in the second result. Static shapes, no host synchronisation."""
    tokens_S = logits_SV.argmax(-1)
    return tokens_S, logits_SV.gather(1, tokens_S.unsqueeze(1)).squeeze(1)


def thresholds(
    x_SV: Tensor, log_min_p_S: Tensor, top_k_S: Tensor, top_p_S: Tensor, max_k: int, nucleus: bool, static: bool
) -> tuple[Tensor, Tensor]:
    """(threshold, maximum) of each row of scaled logits: tokens not below the threshold survive min_p, then top_k,
    then top_p of what is left.

    log_min_p: float32, -inf where off. top_k: int64, 0 where off. top_p: float64, 1 where off. max_k: at least the
    largest top_k (0: no row has one). nucleus: whether any row has a top_p. static: no host synchronisation.
    """
    top_S = x_SV.amax(-1)
    low_S = torch.where(log_min_p_S == NEG_INF, NEG_INF, top_S + log_min_p_S)
    vocab = x_SV.shape[1]
    width = max(max_k, _FIRST_LOOK if nucleus and not static else 0)
    sorted_SK = x_SV.topk(min(width, vocab), dim=-1).values
    if max_k:
        kth_S = sorted_SK.gather(1, (top_k_S.clamp(1, sorted_SK.shape[1]) - 1).unsqueeze(1)).squeeze(1)
        on_S = (top_k_S > 0) & (top_k_S < vocab)
        low_S = torch.where(on_S, torch.maximum(low_S, kth_S), low_S)
    if nucleus:
        low_S = _nucleus(x_SV, top_S, low_S, top_p_S, sorted_SK, static)
    return low_S, top_S


def _mass(x: Tensor, top: Tensor) -> Tensor:
    """exp(x - top) in units of 2^-40, as int64, to 1e-6 of its value. An infinite maximum has mass one, and all else
    none. Sums and products alone, each rounded once: the same number on every device and in every implementation, where
    the exponential function of each library has last places of its own."""
    t = ((x - top) * _LOG2E).nan_to_num_(nan=0.0).clamp_min_(-64.0)
    n = t.round()
    f = t.sub_(n)
    p = f * _EXP2[0]
    for c in _EXP2[1:]:
        p.add_(c).mul_(f)
    p.add_(1.0)
    return p.mul_((n.to(torch.int32) + 167).bitwise_left_shift_(23).view(torch.float32)).to(torch.int64)  # 2^(n + 40)


def _nucleus(x_SV: Tensor, top_S: Tensor, low_S: Tensor, top_p_S: Tensor, sorted_SK: Tensor, static: bool) -> Tensor:
    """Raises the thresholds `low` to the smallest set of surviving tokens whose mass reaches top_p: a token stays if
    the mass of the tokens before it is less than top_p of the survivors' mass."""
    mass_SV = _mass(x_SV, top_S.unsqueeze(1))
    total_S = torch.where(x_SV >= low_S.unsqueeze(1), mass_SV, 0).sum(-1)
    del mass_SV
    limit_S = (total_S.double() * top_p_S).to(torch.int64).clamp_min_(1)
    limit_S = torch.where(top_p_S < 1.0, limit_S, 0)  # 0: off
    if static:
        return _cut(x_SV.sort(-1, descending=True).values, top_S, low_S, limit_S)[0]
    low_S, open_S = _cut(sorted_SK, top_S, low_S, limit_S)
    rest = open_S.nonzero().squeeze(1)
    if sorted_SK.shape[1] < x_SV.shape[1] and rest.numel():
        full_GV = x_SV[rest].sort(-1, descending=True).values
        low_S[rest] = _cut(full_GV, top_S[rest], low_S[rest], limit_S[rest])[0]
    return low_S


def _cut(sorted_SK: Tensor, top_S: Tensor, low_S: Tensor, limit_S: Tensor) -> tuple[Tensor, Tensor]:
    """(new threshold, whether the limit lies beyond these candidates), from candidates in falling order. Candidates
    below `low` end the survivors, so a row whose candidates reach there is decided."""
    alive_SK = sorted_SK >= low_S.unsqueeze(1)
    mass_SK = torch.where(alive_SK, _mass(sorted_SK, top_S.unsqueeze(1)), 0)
    before_SK = mass_SK.cumsum(-1) - mass_SK
    kept_S = (alive_SK & (before_SK < limit_S.unsqueeze(1))).sum(-1)
    edge_S = sorted_SK.gather(1, (kept_S - 1).clamp_min(0).unsqueeze(1)).squeeze(1)
    width = sorted_SK.shape[1]
    # all candidates kept: what follows may belong to the nucleus too, unless it only repeats the threshold
    open_S = (kept_S == width) & (sorted_SK[:, -1] > low_S)
    on_S = (limit_S > 0) & (kept_S > 0) & ~open_S
    return torch.where(on_S, torch.maximum(low_S, edge_S), low_S), open_S


def draw(x_SV: Tensor, low_S: Tensor, greedy_S: Tensor, noise: Noise, static: bool) -> Tensor:
    """One token for each row, int64: the largest of scaled logit + Gumbel noise over the tokens not below `low`, which
    is a draw from their softmax (Gumbel 1954; Maddison et al. 2014). Rows with `greedy` (bool) get no noise. Equal
    scores go to the lowest id.

    Unless `static`, noise is made for the survivors alone where they are few.
    """
    rows, vocab = x_SV.shape
    if static:
        return _draw_full(x_SV, low_S, greedy_S, noise)
    tokens_S = torch.zeros(rows, dtype=torch.int64, device=x_SV.device)
    few_S = (x_SV >= low_S.unsqueeze(1)).sum(-1) * 8 < vocab
    few, many = few_S.nonzero().squeeze(1), (~few_S).nonzero().squeeze(1)
    if few.numel():
        x_GV = x_SV if few.numel() == rows else x_SV[few]
        tokens_S[few] = _draw_survivors(x_GV, low_S[few], greedy_S[few], noise.take(few))
    for part in many.split(max(1, _CHUNK // vocab)) if many.numel() else ():
        tokens_S[part] = _draw_full(x_SV[part], low_S[part], greedy_S[part], noise.take(part))
    return tokens_S


def _draw_full(x_SV: Tensor, low_S: Tensor, greedy_S: Tensor, noise: Noise) -> Tensor:
    score_SV = gumbel_rows(*noise, x_SV.shape[1]).masked_fill_(greedy_S.unsqueeze(1), 0.0).add_(x_SV)
    return score_SV.masked_fill_(x_SV < low_S.unsqueeze(1), NEG_INF).argmax(-1)


def _draw_survivors(x_SV: Tensor, low_S: Tensor, greedy_S: Tensor, noise: Noise) -> Tensor:
    rows, vocab = x_SV.shape
    row_N, token_N = (x_SV >= low_S.unsqueeze(1)).nonzero(as_tuple=True)
    noise_N = gumbel_at(*noise.take(row_N), token_N).masked_fill_(greedy_S[row_N], 0.0)
    score_N = noise_N + x_SV[row_N, token_N]
    best_S = score_N.new_full((rows,), NEG_INF).scatter_reduce_(0, row_N, score_N, "amax")
    first_N = torch.where(score_N == best_S[row_N], token_N, vocab)
    # a row without survivors (all NaN) keeps token 0; the caller sees it by the row's maximum
    return token_N.new_full((rows,), vocab).scatter_reduce_(0, row_N, first_N, "amin").remainder_(vocab)


def sample(
    logits_SV: Tensor,
    temperature_S: Tensor,
    log_min_p_S: Tensor,
    top_k_S: Tensor,
    top_p_S: Tensor,
    greedy_S: Tensor,
    noise: Noise,
    max_k: int,
    nucleus: bool,
    static: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens int64, largest scaled logit, threshold) of each row: the op `sample`. `logits_SV` (float32) is divided by
    the temperatures (float32) in place; the rest is as for `thresholds` and `draw`."""
    x_SV = logits_SV.div_(temperature_S.unsqueeze(1))
    low_S, top_S = thresholds(x_SV, log_min_p_S, top_k_S, top_p_S, max_k, nucleus, static)
    return draw(x_SV, low_S, greedy_S, noise, static), top_S, low_S


SAMPLE = REGISTRY.op("sample", sample)
native.register(SAMPLE, "supports_sampling")
triton.register(SAMPLE, "sampling:sample", "untyped")


# --- a step's draw, by tables on the device ---------------------------------------------------------------------------


class Real(IntEnum):
    """Columns of a table of float64 numbers, a line for each device row. Off: log of min_p -inf, top_p 1."""

    TEMPERATURE = 0
    LOG_MIN_P = 1
    TOP_P = 2
    REPETITION = 3
    PRESENCE = 4
    FREQUENCY = 5


class Whole(IntEnum):
    """Columns of a table of int64 numbers, a line for each device row. Off: top_k 0."""

    SEED = 0
    SAMPLE = 1
    PROMPT_LENGTH = 2
    TOP_K = 3
    GREEDY = 4


class Kind(IntEnum):
    """What some row of a draw may ask for; each includes those before it."""

    GREEDY = 0
    NOISE = 1
    TOP_K = 2  # or min_p
    TOP_P = 3


class Out(NamedTuple):
    """Where the draws go, all contiguous on the device; None: not wanted.

    tokens: int64 (S,). top: float32 (S,), the largest (scaled) logit. low: float32 (S,), the threshold (-inf: none).
    packed: int32 (S, 2), for the host: the token, and 0, or 1 if the row has NaN, or 2 if every token is masked. last,
    length: int64 (X,), written at the sampled rows: the token and its index.
    """

    tokens_S: Tensor
    top_S: Tensor
    low_S: Tensor | None = None
    packed_S2: Tensor | None = None
    last_X: Tensor | None = None
    length_X: Tensor | None = None

    @staticmethod
    def new(rows: int, device: torch.device, low: bool = False) -> Out:
        tokens_S = torch.empty(rows, dtype=torch.int64, device=device)
        top_S, low_S = (torch.empty(rows, device=device) for _ in range(2))
        return Out(tokens_S, top_S, low_S if low else None)


def draw_step(
    logits_SV: Tensor,
    rows_S: Tensor,
    positions_S: Tensor,
    reals_XC: Tensor,
    wholes_XC: Tensor,
    out: Out,
    kind: Kind,
) -> None:
    """A step's draw, by parameters that are on the device; what it does depends on no value there, so that a graph can
    hold it.

    logits: (S, V) as the model leaves them, not changed. rows: integers (S,), each row's line in the tables; a padding
    row (not less than their length) is not drawn. positions: integers (S,), the index of the token to draw. reals,
    wholes: see `Real` and `Whole`. kind: what some row may ask for.
    """
    live_S = rows_S < reals_XC.shape[0]
    lines_S = torch.where(live_S, rows_S, 0).long()
    if kind is Kind.GREEDY:
        tokens_S, top_S = draw_greedy(logits_SV.float())
        low_S = None
    else:
        reals_SC, wholes_SC = reals_XC[lines_S], wholes_XC[lines_S]
        noise = Noise(wholes_SC[:, Whole.SEED], wholes_SC[:, Whole.SAMPLE], positions_S.long())
        tokens_S, top_S, low_S = sample(
            logits_SV.to(torch.float32, copy=True),
            reals_SC[:, Real.TEMPERATURE].float(),
            reals_SC[:, Real.LOG_MIN_P].float(),
            wholes_SC[:, Whole.TOP_K],
            reals_SC[:, Real.TOP_P],
            wholes_SC[:, Whole.GREEDY] != 0,
            noise,
            logits_SV.shape[1] if kind >= Kind.TOP_K else 0,
            kind is Kind.TOP_P,
            static=True,
        )
    out.tokens_S.copy_(torch.where(live_S, tokens_S, 0))
    out.top_S.copy_(top_S)
    if out.low_S is not None and low_S is not None:
        out.low_S.copy_(low_S)
    if out.packed_S2 is not None:
        flag_S = torch.where(top_S.isnan(), 1, torch.where(top_S == NEG_INF, 2, 0))
        out.packed_S2.copy_(torch.stack((out.tokens_S, flag_S), 1))
    for table_X, value_S in ((out.last_X, tokens_S), (out.length_X, positions_S)):
        if table_X is not None:
            index_S = torch.where(live_S, rows_S, table_X.shape[0] - 1).long()
            kept_S = table_X[index_S]
            table_X[index_S] = torch.where(live_S, value_S.to(table_X.dtype), kept_S)


DRAW_STEP = REGISTRY.op("draw_step", draw_step)
triton.register(DRAW_STEP, "sampling:draw_step", "untyped")


# --- logprobs --------------------------------------------------------------------------------------------------------


def top_logits(x_GV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values, ids (int64)) of the k largest of each row, falling; equal values by rising id, which `topk` does not
    promise. A float and its id are packed into one integer that sorts like the pair."""
    if k == 0:
        return x_GV[:, :0], torch.zeros((x_GV.shape[0], 0), dtype=torch.int64, device=x_GV.device)
    bits_GV = (x_GV + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    order_GV = (bits_GV ^ ((bits_GV >> 31) & 0x7FFFFFFF)).to(torch.int64)
    last = x_GV.shape[1] - 1
    ids_V = torch.arange(last, -1, -1, device=x_GV.device)
    keys_GK = ((order_GV << 32) | ids_V).topk(k, dim=-1).values
    ids_GK = last - (keys_GK & 0xFFFFFFFF)
    return x_GV.gather(1, ids_GK), ids_GK


def token_logprobs(
    logits_SV: Tensor, token_G: Tensor, top: int | Tensor, normalise: bool, at_G: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(ids (G, 1+k) int64, values (G, 1+k) float32, ranks (G,) int64) of each row's `token` and of its k = `top`
    likeliest tokens, or of the tokens `top` (G, k). Values are log-softmax where `normalise`, else the logits. The
    rank is one more than the number of tokens with a larger value. Logits of any floating type, kept; at as above."""
    x_GV = (logits_SV if at_G is None else logits_SV.index_select(0, at_G)).float()
    chosen_G1 = x_GV.gather(1, token_G.unsqueeze(1))
    if isinstance(top, int):
        values_GK, ids_GK = top_logits(x_GV, min(top, x_GV.shape[1]))
    else:
        values_GK, ids_GK = x_GV.gather(1, top), top
    ranks_G = (x_GV > chosen_G1).sum(-1) + 1
    ids, values = torch.cat((token_G.unsqueeze(1), ids_GK), 1), torch.cat((chosen_G1, values_GK), 1)
    if normalise:
        values = values - x_GV.logsumexp(-1, keepdim=True)
    return ids, values, ranks_G


TOKEN_LOGPROBS = REGISTRY.op("token_logprobs", token_logprobs)
triton.register(TOKEN_LOGPROBS, "logprobs:token_logprobs", "untyped")
