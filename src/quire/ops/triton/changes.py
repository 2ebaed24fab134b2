"""Changes to logits before the draw, in place, a launch each: biases, penalties, masks.

Owns: the kernels of what `ops/sampling.py` does to rows that ask for it. Logits are float32 (S, V).
Shape legend: S rows, G rows of a group, V vocabulary, M edits of a row, W words of a mask or forbidden ones, L tokens
of these, X lines of a table.
"""

from __future__ import annotations

from functools import partial

import triton.language as tl
from torch import Tensor

from quire.ops.sampling import IN_PROMPT
from quire.ops.triton.launch import Kernel, ceil, power, release, wait

BLOCK = 2048
_IN_PROMPT = tl.constexpr(IN_PROMPT)


@Kernel
def _edit(logits, at, ids, values, until, drawn, STRIDE, M, MORE: tl.constexpr, PDL: tl.constexpr):
    wait(PDL)
    row = tl.program_id(0)
    m = tl.arange(0, MORE)
    live = (m < M) & (tl.load(until + row * M + m, mask=m < M, other=0) > tl.load(drawn + row))
    value = tl.load(values + row * M + m, mask=live, other=0.0)
    to = tl.load(ids + row * M + m, mask=live, other=0)
    line = logits + tl.load(at + row).to(tl.int64) * STRIDE if at is not None else logits + row.to(tl.int64) * STRIDE
    tl.atomic_add(line + to, value, mask=live & (value != 0.0), sem="relaxed")
    release(PDL)


@partial(Kernel, fused=False)
def _penalise(
    logits, at, counts, lines, repetition, presence, frequency, STRIDE, V, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    wait(PDL)
    row = tl.program_id(1)
    v = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    of, line = row.to(tl.int64), row.to(tl.int64)
    if at is not None:
        of = tl.load(at + row).to(tl.int64)
    if lines is not None:
        line = tl.load(lines + row).to(tl.int64)
    count = tl.load(counts + line * V + v, mask=v < V, other=0)
    seen = count != 0
    x = tl.load(logits + of * STRIDE + v, mask=seen, other=0.0)
    again = tl.load(repetition + row)
    x *= tl.where(x > 0, tl.math.div_rn(1.0, again), again)
    drawn = count & (_IN_PROMPT - 1)
    x -= tl.load(frequency + row) * drawn.to(tl.float32)
    x -= tl.where(drawn > 0, tl.load(presence + row), 0.0)
    tl.store(logits + of * STRIDE + v, x, mask=seen)
    release(PDL)


@Kernel
def _mask(logits, at, words, lines, STRIDE, V, W, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait(PDL)
    row = tl.program_id(1)
    v = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    of, line = row.to(tl.int64), row.to(tl.int64)
    if at is not None:
        of = tl.load(at + row).to(tl.int64)
    if lines is not None:
        line = tl.load(lines + row).to(tl.int64)
    word = tl.load(words + line * W + v // 32, mask=v // 32 < W, other=0)
    masked = ((word >> (v % 32)) & 1) == 0
    tl.store(logits + of * STRIDE + v, float("-inf"), mask=masked & (v < V))
    release(PDL)


@Kernel
def _forbid(logits, at, words, tail, STRIDE, W, L, MORE: tl.constexpr, PDL: tl.constexpr):
    wait(PDL)
    row = tl.program_id(1)
    w = tl.program_id(0) * MORE + tl.arange(0, MORE)
    word = words + (row.to(tl.int64) * W + w) * L
    token = tl.load(word, mask=w < W, other=-1)
    match = token >= 0
    for i in range(1, L):
        part = tl.load(word + i, mask=w < W, other=-1)
        match &= (part < 0) | (part == tl.load(tail + row * (L - 1) + i - 1))
    of = row.to(tl.int64)
    if at is not None:
        of = tl.load(at + row).to(tl.int64)
    tl.atomic_add(logits + of * STRIDE + token, float("-inf"), mask=match, sem="relaxed")
    release(PDL)


def add_edits(
    logits_SV: Tensor, ids_GM: Tensor, values_GM: Tensor, until_GM: Tensor, drawn_G: Tensor, at_G: Tensor | None = None
) -> None:
    """See `ops.sampling.add_edits`. A token of a row may have one finite value and any number of -inf."""
    rows, count = ids_GM.shape
    tensors = logits_SV, at_G, ids_GM, values_GM, until_GM, drawn_G
    _edit((rows, 1, 1), tensors, (logits_SV.stride(0), count), (power(count),), warps=1)


def forbid_words(logits_SV: Tensor, words_GWL: Tensor, tail_GL: Tensor, at_G: Tensor | None = None) -> None:
    """See `ops.sampling.forbid_words`."""
    rows, words, length = words_GWL.shape
    tensors, sizes = (logits_SV, at_G, words_GWL, tail_GL), (logits_SV.stride(0), words, length)
    _forbid((ceil(words, 64), rows, 1), tensors, sizes, (64,), warps=1)


def penalise(
    logits_SV: Tensor,
    counts_XV: Tensor,
    repetition_G: Tensor,
    presence_G: Tensor,
    frequency_G: Tensor,
    at_G: Tensor | None = None,
    lines_G: Tensor | None = None,
) -> None:
    """See `ops.sampling.penalise`: nothing is gathered."""
    rows, vocab = repetition_G.shape[0], logits_SV.shape[1]
    numbers = (x.contiguous() for x in (repetition_G, presence_G, frequency_G))
    tensors = logits_SV, at_G, counts_XV, lines_G, *numbers
    _penalise((ceil(vocab, BLOCK), rows, 1), tensors, (logits_SV.stride(0), vocab), (BLOCK,), warps=8)


def mask(logits_SV: Tensor, words_XW: Tensor, at_G: Tensor | None = None, lines_G: Tensor | None = None) -> None:
    """See `ops.sampling.mask`: nothing is gathered."""
    rows = next((len(x) for x in (at_G, lines_G) if x is not None), len(words_XW))
    sizes = logits_SV.stride(0), logits_SV.shape[1], words_XW.shape[1]
    tensors = logits_SV, at_G, words_XW, lines_G
    _mask((ceil(sizes[1], BLOCK), rows, 1), tensors, sizes, (BLOCK,), warps=8)
