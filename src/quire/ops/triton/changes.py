"""Changes to logits before the draw, in place, a launch each: biases, penalties, masks.

Owns: the kernels of what `ops/sampling.py` does to rows that ask for it. Logits are float32 (S, V).
Shape legend: S rows, G rows of a group, V vocabulary, M edits of a row, W words of a mask.
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
def _mask(logits, at, words, STRIDE, V, W, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait(PDL)
    row = tl.program_id(1)
    v = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    of = row.to(tl.int64)
    if at is not None:
        of = tl.load(at + row).to(tl.int64)
    word = tl.load(words + row * W + v // 32, mask=v // 32 < W, other=0)
    masked = ((word >> (v % 32)) & 1) == 0
    tl.store(logits + of * STRIDE + v, float("-inf"), mask=masked & (v < V))
    release(PDL)


def add_edits(
    logits_SV: Tensor, ids_GM: Tensor, values_GM: Tensor, until_GM: Tensor, drawn_G: Tensor, at_G: Tensor | None = None
) -> None:
    """See `ops.sampling.add_edits`; at (G,): the rows that are meant, all in order if None. A token of a row may have
    one finite value and any number of -inf."""
    rows, count = ids_GM.shape
    tensors = logits_SV, at_G, ids_GM, values_GM, until_GM, drawn_G
    _edit((rows, 1, 1), tensors, (logits_SV.stride(0), count), (power(count),), warps=1)


def penalise(
    logits_SV: Tensor,
    counts_XV: Tensor,
    repetition_G: Tensor,
    presence_G: Tensor,
    frequency_G: Tensor,
    at_G: Tensor | None = None,
    lines_G: Tensor | None = None,
) -> None:
    """See `ops.sampling.penalise`; at (G,): the rows of the logits that are meant; lines (G,): their lines in the table
    of counts. Both in order if None, so that nothing needs to be gathered."""
    rows, vocab = repetition_G.shape[0], logits_SV.shape[1]
    tensors = logits_SV, at_G, counts_XV, lines_G, repetition_G, presence_G, frequency_G
    _penalise((ceil(vocab, BLOCK), rows, 1), tensors, (logits_SV.stride(0), vocab), (BLOCK,), warps=8)


def mask(logits_SV: Tensor, words_GW: Tensor, at_G: Tensor | None = None) -> None:
    """-inf for the tokens whose bit is not set; words as for `ops.sampling.allowed_bits`; at as for `penalise`."""
    (rows, width), vocab = words_GW.shape, logits_SV.shape[1]
    sizes = logits_SV.stride(0), vocab, width
    _mask((ceil(vocab, BLOCK), rows, 1), (logits_SV, at_G, words_GW), sizes, (BLOCK,), warps=8)
