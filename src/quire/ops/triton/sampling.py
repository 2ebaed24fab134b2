"""Sampling on a GPU: argmax, Gumbel draws and truncation over logits as the model leaves them, without a sort.

Owns: the pass over the logits, how rows are split among programs, the entry points. What is to come out says
`ops/sampling.py`, to the token: thresholds are exact, and noise differs from torch's in the last place of a logarithm.

Logits are bfloat16, float16 or float32, (S, V) with any row stride. A row is split into `parts`, each a program, so
that one row keeps the device busy too; what the parts found is put together by the next kernel. No result depends on
the split: maxima and whole numbers do not depend on an order. Nothing is kept between calls, no size depends on a
value: all of it can be captured in a graph.

Shape legend: S sampled rows, R rows of the tables, V vocabulary, P parts of a row, N blocks of a row, L length of a
list, X rows that hold a last token and a length.
"""

# pyright: reportPossiblyUnboundVariable=false
from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from quire.ops.sampling import Kind, Noise, Out
from quire.ops.triton import truncation
from quire.ops.triton.draws import LOWEST, gumbel, may_reach, pack, take_larger, unpack, words_from
from quire.ops.triton.launch import Kernel, ceil, power, release, wait
from quire.ops.triton.truncation import (
    DONE,
    FLOOR,
    HEAT,
    KTH,
    LOG_MIN_P,
    LOW,
    NUCLEUS,
    POSITION,
    SAMPLE,
    SEED,
    STILL,
    TODO,
    TOP_K,
    TOP_P,
    row_floor,
    row_top,
)

TILE = 2048  # tokens that a program looks at together
BLOCK = 128  # tokens whose maximum is kept
LIST = 8192  # tokens among which a threshold is searched in registers
PARTS = 128  # most of a row
PROGRAMS = 1024  # into which the rows of a call are split, or some more: eight for each multiprocessor
WARPS = 8
_REALS, _WHOLES = tl.constexpr(6), tl.constexpr(5)  # columns of the tables


# --- kernels ---------------------------------------------------------------------------------------------------------


@Kernel
def _scan_greedy(
    logits, draws, STRIDE, VOCAB, TILES, UNIT: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """The largest logit of a part of a row. Grid (P, S); draws: int64 (S, P)."""
    wait(PDL)
    part, row = tl.program_id(0), tl.program_id(1)
    stride, vocab = STRIDE * UNIT, VOCAB * UNIT
    lane = tl.arange(0, TILE)
    line = logits + row.to(tl.int64) * stride
    best = tl.full((TILE,), float("-inf"), tl.float32)
    token = tl.zeros((TILE,), tl.int32)
    for start in range(part * TILES * TILE, tl.minimum((part + 1) * TILES * TILE, vocab), TILE):
        at = start + lane
        x = tl.load(line + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        best, token = take_larger(x, at, best, token)
    tl.store(draws + row * tl.num_programs(0) + part, tl.max(pack(best, token), 0))
    release(PDL)


@Kernel
def _scan(
    logits, rows, positions, reals, wholes, temperature, log_min_p, top_k, top_p, greedy, seed, sample,
    draws, tops, floats, numbers, peaks, counts, STRIDE, VOCAB, TILES, R,
    UNIT: tl.constexpr, TABLES: tl.constexpr, STORE: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (P, S). The draw from a part of a row that has no truncation, else the maxima of its blocks; the row's
    parameters into its memory. Parameters come from tables where `TABLES`, else from arrays with a number for each row.

    draws: int64 (S, P); tops: float32 (S, P), the largest scaled logit; floats, numbers: float32, int64 (S, 8); peaks:
    float32 (S, N); counts: int32 (S,), made 0. STORE: the scaled logits replace the others.
    """
    wait(PDL)
    part, row, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    stride, vocab = STRIDE * UNIT, VOCAB * UNIT
    N = tl.cdiv(vocab, BLOCK)
    live = True
    if TABLES:
        line_of = tl.load(rows + row).to(tl.int64)
        live = (line_of >= 0) & (line_of < R)
        line_of = tl.where(live, line_of, 0)
        real, whole = reals + line_of * _REALS, wholes + line_of * _WHOLES
        heat, share, nucleus = tl.load(real).to(tl.float32), tl.load(real + 1).to(tl.float32), tl.load(real + 2)
        key, number, k = tl.load(whole), tl.load(whole + 1), tl.load(whole + 3)
        still = tl.load(whole + 4) != 0
    else:
        heat, share, nucleus = tl.load(temperature + row), tl.load(log_min_p + row), tl.load(top_p + row)
        key, number, k = tl.load(seed + row), tl.load(sample + row), tl.load(top_k + row)
        still = tl.load(greedy + row) != 0
    position = tl.load(positions + row).to(tl.int64)
    left = 1.0 if STORE else heat  # what the logits are still to be divided by
    todo = tl.where((share > float("-inf")) & (still == 0), FLOOR, DONE)
    todo = tl.where(nucleus < 1.0, NUCLEUS, todo)
    todo = tl.where((k > 0) & (k < vocab), KTH, todo)
    todo = tl.where(live, todo, DONE)
    if part == 0:
        tl.store(floats + row * 8 + HEAT, left)
        tl.store(floats + row * 8 + LOG_MIN_P, share)
        tl.store(floats + row * 8 + LOW, float("-inf"))
        tl.store(numbers + row * 8 + TODO, todo.to(tl.int64))
        tl.store(numbers + row * 8 + TOP_K, k)
        tl.store(numbers + row * 8 + TOP_P, nucleus.to(tl.int64, bitcast=True))
        tl.store(numbers + row * 8 + SEED, key)
        tl.store(numbers + row * 8 + SAMPLE, number)
        tl.store(numbers + row * 8 + POSITION, position)
        tl.store(numbers + row * 8 + STILL, still.to(tl.int64))
        tl.store(counts + row, 0)
    lane = tl.arange(0, TILE)
    line = logits + row.to(tl.int64) * stride
    best = tl.full((TILE,), float("-inf"), tl.float32)
    token = tl.zeros((TILE,), tl.int32)
    draw = tl.full((), LOWEST, tl.int64)
    score = tl.full((), float("-inf"), tl.float32)
    end = tl.where(live, tl.minimum((part + 1) * TILES * TILE, vocab), 0)
    for start in range(part * TILES * TILE, end, TILE):
        at = start + lane
        x = tl.load(line + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        if STORE:
            if heat != 1.0:
                x = tl.math.div_rn(x, heat)
                tl.store(line + at, x, mask=at < vocab)
        if (todo == DONE) & still:
            if left != 1.0:
                x = tl.math.div_rn(x, left)
            best, token = take_larger(x, at, best, token)
        else:
            best = tl.maximum(best, x, propagate_nan=tl.PropagateNan.ALL)
            if todo == DONE:
                words = words_from(start, position, number, key, TILE)
                if tl.max(may_reach(x, 1.0 / left, words, score), 0) > 0:
                    draw = tl.maximum(draw, tl.max(pack(tl.math.div_rn(x, left) + gumbel(words), at), 0))
                    score, _ = unpack(draw)
            else:
                block = start // BLOCK + tl.arange(0, TILE // BLOCK)
                peak = tl.max(tl.reshape(x, (TILE // BLOCK, BLOCK)), 1)
                tl.store(peaks + row.to(tl.int64) * N + block, tl.math.div_rn(peak, left), mask=block < N)
    if (todo != DONE) | (still == 0):
        best = tl.math.div_rn(best, left)  # as the largest is divided, so are all
    largest = tl.max(pack(best, token), 0)
    if (todo == DONE) & still:
        draw = largest
    tl.store(draws + row * parts + part, draw)
    top, _ = unpack(largest)
    tl.store(tops + row * parts + part, top)
    release(PDL)


@Kernel
def _finish(
    draws, tops, floats, rows, positions, tokens, top, low, packed, last, length, P, X,
    PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (S,). Each row's draw from those of its parts, to all who want it. Without `tops` it is an argmax."""
    wait(PDL)
    row = tl.program_id(0)
    part = tl.arange(0, PARTS)
    draw = tl.max(tl.load(draws + row * P + part, mask=part < P, other=LOWEST), 0)
    most, token = unpack(draw)
    if tops is not None:
        most = row_top(tops, row, P, PARTS)
    tl.store(tokens + row, token)
    tl.store(top + row, most)
    if low is not None:
        floor = row_floor(floats + row * 8, most)
        tl.store(low + row, tl.maximum(tl.load(floats + row * 8 + LOW), floor))
    if packed is not None:
        tl.store(packed + row * 2, token.to(tl.int32))
        tl.store(packed + row * 2 + 1, tl.where(most != most, 1, tl.where(most == float("-inf"), 2, 0)))
    if last is not None:
        to = tl.load(rows + row).to(tl.int64)
        tl.store(last + to, token, mask=(to >= 0) & (to < X))
    if length is not None:
        to = tl.load(rows + row).to(tl.int64)
        tl.store(length + to, tl.load(positions + row).to(tl.int64), mask=(to >= 0) & (to < X))
    release(PDL)


# --- entry points ----------------------------------------------------------------------------------------------------


class _Of(NamedTuple):
    """The rows' parameters: tables and the rows' lines there, or arrays with a number for each row."""

    rows: Tensor | None
    positions: Tensor | None
    reals: Tensor | None = None
    wholes: Tensor | None = None
    temperature: Tensor | None = None
    log_min_p: Tensor | None = None
    top_k: Tensor | None = None
    top_p: Tensor | None = None
    greedy: Tensor | None = None
    seed: Tensor | None = None
    sample: Tensor | None = None


def split(rows: int, vocab: int) -> tuple[int, int]:
    """(parts of a row, tiles of a part)."""
    tiles = ceil(vocab, TILE)
    each = ceil(tiles, max(1, min(PARTS, PROGRAMS // rows)))
    return ceil(tiles, each), each


class Lines(NamedTuple):
    """Logits as the kernels take them: the row stride and the vocabulary in units of 16 numbers, if they allow it, so
    that 16 bytes are read at once."""

    stride: int
    vocab: int
    unit: int

    @staticmethod
    def of(logits_SV: Tensor) -> Lines:
        assert logits_SV.stride(1) == 1, "the numbers of a row lie side by side"
        stride, vocab = logits_SV.stride(0), logits_SV.shape[1]
        unit = 1 if stride % 16 or vocab % 16 else 16
        return Lines(stride // unit, vocab // unit, unit)


def _greedy(logits_SV: Tensor, of: _Of, out: Out) -> None:
    rows, vocab = logits_SV.shape
    stride, width, unit = Lines.of(logits_SV)
    parts, tiles = split(rows, vocab)
    draws_SP = torch.empty((rows, parts), dtype=torch.int64, device=logits_SV.device)
    _scan_greedy((parts, rows, 1), (logits_SV, draws_SP), (stride, width, tiles), (unit, TILE), warps=WARPS)
    _to(out, of, draws_SP, None, None)


def _to(out: Out, of: _Of, draws_SP: Tensor, tops_SP: Tensor | None, floats_S8: Tensor | None) -> None:
    rows, parts = draws_SP.shape
    held = next((x.shape[0] for x in (out.last_X, out.length_X) if x is not None), 0)
    tensors = draws_SP, tops_SP, floats_S8, of.rows, of.positions, *out
    _finish((rows, 1, 1), tensors, (parts, held), (PARTS,), warps=1)


def _general(logits_SV: Tensor, of: _Of, out: Out, store: bool, truncated: bool, nucleus: bool) -> None:
    """store: the scaled logits replace the others. truncated, nucleus: False where no row has any of min_p, top_k and
    top_p, or no row has top_p."""
    rows, vocab = logits_SV.shape
    device, (stride, width, unit) = logits_SV.device, Lines.of(logits_SV)
    parts, tiles = split(rows, vocab)
    blocks = ceil(vocab, BLOCK)
    draws_SP = torch.empty((rows, parts), dtype=torch.int64, device=device)
    numbers_S8 = torch.empty((rows, 8), dtype=torch.int64, device=device)
    tops_SP = torch.empty((rows, parts), device=device)
    floats_S8 = torch.empty((rows, 8), device=device)
    peaks_SN = torch.empty((rows, blocks), device=device)
    counts_S = torch.empty(rows, dtype=torch.int32, device=device)
    held = 0 if of.reals is None else of.reals.shape[0]
    grid = (parts, rows, 1)
    memory = draws_SP, tops_SP, floats_S8, numbers_S8, peaks_SN, counts_S
    constants = unit, of.reals is not None, store, TILE, BLOCK
    _scan(grid, (logits_SV, *of, *memory), (stride, width, tiles, held), constants, warps=WARPS)
    if truncated:
        _truncate(logits_SV, *memory, tiles, nucleus)
    _to(out, of, draws_SP, tops_SP, floats_S8)


def _truncate(
    logits_SV: Tensor, draws_SP: Tensor, tops_SP: Tensor, floats_S8: Tensor, numbers_S8: Tensor, peaks_SN: Tensor,
    counts_S: Tensor, tiles: int, nucleus: bool,
) -> None:  # fmt: skip
    rows, parts = draws_SP.shape
    device, (stride, width, unit) = logits_SV.device, Lines.of(logits_SV)
    sums_2SP = torch.empty((2, rows, parts, 16), device=device)
    masses_SP = torch.empty((rows, parts, 2), dtype=torch.int64, device=device)
    lists_SL = torch.empty((rows, LIST), dtype=torch.int64, device=device)
    grid, sizes = (parts, rows, 1), (stride, width, tiles)
    seen, lists = (logits_SV, tops_SP, floats_S8, numbers_S8), (counts_S, lists_SL)
    room = power(peaks_SN.shape[1])
    blocks_SN = torch.empty((rows, room), dtype=torch.int32, device=device)
    constants = unit, room, LIST, PARTS, TILE, BLOCK
    tensors = *seen, peaks_SN, blocks_SN, *lists, draws_SP
    truncation.choose((rows, 1, 1), tensors, (stride, width, parts), constants, warps=WARPS)
    if nucleus:
        for i in range(2):
            constants = unit, i, room, PARTS, TILE, BLOCK
            truncation.weigh(grid, (*seen, peaks_SN, sums_2SP[0], sums_2SP[i]), sizes, constants, warps=WARPS)
        constants = unit, LIST, PARTS, TILE, BLOCK
        truncation.gather(grid, (*seen, peaks_SN, sums_2SP[1], masses_SP, *lists), sizes, constants, warps=WARPS)
    constants = unit, LIST, PARTS, TILE
    tensors = *seen, masses_SP, *lists, draws_SP
    truncation.settle((rows, 1, 1), tensors, (stride, width, parts), constants, warps=WARPS)
    truncation.draw_above(grid, (*seen, peaks_SN, draws_SP), sizes, (unit, PARTS, TILE, BLOCK), warps=WARPS)


def draw_greedy(logits_SV: Tensor) -> tuple[Tensor, Tensor]:
    """(token int64, its logit float32) of each row's argmax: see `ops.sampling.draw_greedy`. Logits of any of the
    three dtypes are read as they are. Two launches."""
    out = Out.new(logits_SV.shape[0], logits_SV.device)
    _greedy(logits_SV, _Of(None, None), out)
    return out.tokens_S, out.top_S


def draw_noise(logits_SV: Tensor, temperature_S: Tensor, greedy_S: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
    """(token int64, largest scaled logit float32) of rows without truncation: `ops.sampling.sample` with neither min_p,
    top_k nor top_p. The logits stay as they are. Two launches.

    A token differs from the reference's only where two scores are nearer than the last place of a logarithm (1e-5).
    """
    rows, device = logits_SV.shape[0], logits_SV.device
    out = Out.new(rows, device)
    off = torch.full((rows,), float("-inf"), device=device), torch.zeros_like(noise.seed)
    ones = torch.ones(rows, dtype=torch.float64, device=device)
    seed, sample, position = (x.contiguous() for x in noise)
    of = _Of(None, position, None, None, temperature_S, *off, ones, greedy_S, seed, sample)
    _general(logits_SV, of, out, store=False, truncated=False, nucleus=False)
    return out.tokens_S, out.top_S


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
    """The op `sample`: see `ops.sampling.sample`. Nine launches at most, whatever `static`."""
    out = Out.new(logits_SV.shape[0], logits_SV.device, low=True)
    seed, number, position = (x.contiguous() for x in noise)
    temperature, log_min_p, top_k = (x.contiguous() for x in (temperature_S, log_min_p_S, top_k_S))
    top_p, greedy = top_p_S.contiguous(), greedy_S.contiguous()
    of = _Of(None, position, None, None, temperature, log_min_p, top_k, top_p, greedy, seed, number)
    _general(logits_SV, of, out, store=True, truncated=True, nucleus=nucleus)
    assert out.low_S is not None
    return out.tokens_S, out.top_S, out.low_S


def draw_step(
    logits_SV: Tensor,
    rows_S: Tensor,
    positions_S: Tensor,
    reals_XC: Tensor,
    wholes_XC: Tensor,
    out: Out,
    kind: Kind,
) -> None:
    """The op `draw_step`: see `ops.sampling.draw_step`. rows, positions: int32 or int64. A padding row has token 0 (but
    for `Kind.GREEDY`, which reads no table). Launches: 2, 2, 5, 9 by kind."""
    of = _Of(rows_S, positions_S, reals_XC, wholes_XC)
    if kind is Kind.GREEDY:
        _greedy(logits_SV, of, out)
    else:
        _general(logits_SV, of, out, False, kind >= Kind.TOP_K, kind is Kind.TOP_P)
