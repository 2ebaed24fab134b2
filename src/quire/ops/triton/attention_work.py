# pyright: reportGeneralTypeIssues=false
"""What there is to do in a step's attention, listed on the device from the rows' lengths.

Owns: two lists that the layers of a step share. `split_items`: rows of few tokens, cut over their keys for
`attention_split.py`. `tile_items`: tiles of queries of the other rows for `attention_tiles.py`. No number comes back to
the host, so a graph can capture the making of the lists and replay it over other lengths.

The keys of a row of few tokens are read in tiles; some tiles, a number that depends on the row alone, are a segment,
and the result of a row is the left fold of its segments. The tiles of all rows, one row after the other, are cut into
as many equal ranges as there are programs for a head; a range begins where a segment does. What a range holds of a row
is a run: an item of work. The first run of a row folds its segments as it goes; the others leave each segment by
itself, and who finishes a row's last run folds what there is. So work is spread evenly whatever the lengths, and the
bits of a row do not depend on where it was cut.

Where rows are packed (`attention_shared.py`), a row counts as two, one after the other: what its pack has in common, if
it owns the pack, and what is its own. Runs of the first are computed for all rows of the pack at once, and leave what
they find for each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire.ops.triton.attention_shared import MEMBERS, segment_of
from quire.ops.triton.launch import Kernel, release, wait

ITEM = 16 + 2 * MEMBERS  # int32 numbers of an item
_ITEM, _MEMBERS = tl.constexpr(ITEM), tl.constexpr(MEMBERS)
_CHUNK = tl.constexpr(1024)


@triton.jit
def _facts(
    cu_q_ptr, lengths_ptr, shared_ptr, counts_ptr, part, parts, window,
    FEW: tl.constexpr, TILE: tl.constexpr, SEGMENT: tl.constexpr, MOST: tl.constexpr, WINDOWED: tl.constexpr,
    SHARING: tl.constexpr,
):  # fmt: skip
    """Of rows, or with SHARING of parts of rows: first token, count of tokens (0: not here, not a short row, not the
    owner of a pack), length of the row, first tile of keys, tiles of keys, tiles of a segment, segments (at least one),
    tiles that the row's pack has in common."""
    known = part < parts
    row = part // 2 if SHARING else part
    token = tl.load(cu_q_ptr + row, mask=known, other=0)
    count = tl.load(cu_q_ptr + row + 1, mask=known, other=0) - token
    length = tl.load(lengths_ptr + row, mask=known, other=0)
    count = tl.where(count <= FEW, count, 0)
    first = tl.zeros_like(length)
    if WINDOWED:
        first = tl.maximum(length - count + 1 - window, 0) // TILE
    tiles = tl.where(count > 0, tl.maximum((length + TILE - 1) // TILE - first, 0), 0)
    segment = segment_of(tiles, SEGMENT, MOST)
    shared = tl.zeros_like(length)
    if SHARING:
        common = part % 2 == 0
        shared = tl.load(shared_ptr + row, mask=known, other=0)
        count = tl.where(common, tl.load(counts_ptr + row, mask=known & common, other=0), count)
        tiles = tl.where(common, tl.where(count > 0, shared, 0), tiles - shared)
        first = tl.where(common, 0, shared)
    return token, count, length, first, tiles, segment, tl.maximum((tiles + segment - 1) // segment, 1), shared


@triton.jit
def _cut(at, count, segment, segments, per, ranges):
    """Of rows whose tiles begin at number `at`: range of the first run, of the last, runs, segments of the first, slots
    for partial results."""
    first = tl.minimum(at // per, ranges - 1)
    last = tl.minimum((at + (segments - 1) * segment) // per, ranges - 1)
    runs = tl.where(segment >= per, segments, last - first + 1)
    runs = tl.where(count > 0, runs, 0)
    head = tl.minimum(((first + 1) * per - at + segment - 1) // segment, segments)
    return first, last, runs, head, tl.where(runs > 1, 1 + segments - head, 0)


@triton.jit
def _put(
    ptr, there, run, row, token, count, length, first_tile, tiles, segment, segments, at, first, runs, head, slot,
    first_slot, slots, all_runs, stride, kind, members, tokens, per, place, of, SHARING: tl.constexpr,
):  # fmt: skip
    """Writes runs (a vector) of one row. `kind`: 0 a row by itself, 1 what a pack has in common, 2 what is a packed
    row's own: the slots of these begin with the row's first segment."""
    start = tl.where(segment >= per, run, ((first + run) * per - at + segment - 1) // segment)
    start = tl.where(run == 0, 0, start)
    stop = tl.where(segment >= per, run + 1, ((first + run + 1) * per - at + segment - 1) // segment)
    stop = tl.minimum(stop, segments)
    same = tl.zeros_like(run)
    left = tl.where(run == 0, 0, 1 + start - head) * stride
    left = tl.where(kind == 1, tl.where(run == 0, head - 1, start), tl.where(kind == 2, start, left))
    tl.store(ptr, row + same, mask=there)
    tl.store(ptr + 1, token + same, mask=there)
    tl.store(ptr + 2, length - tl.where(kind == 1, 1, count) + same, mask=there)
    tl.store(ptr + 3, count + same, mask=there)
    tl.store(ptr + 4, first_tile + start * segment, mask=there)
    tl.store(ptr + 5, first_tile + tl.minimum(stop * segment, tiles), mask=there)
    tl.store(ptr + 6, tl.where((runs == 1) & (kind == 0), -1, slot + left), mask=there)
    tl.store(ptr + 7, run + tl.where(kind == 2, 1, 0), mask=there)
    tl.store(ptr + 8, first_slot + same, mask=there)
    tl.store(ptr + 9, slots + same, mask=there)
    tl.store(ptr + 10, all_runs + same, mask=there)
    tl.store(ptr + 11, segment + same, mask=there)
    tl.store(ptr + 12, place + run, mask=there)
    tl.store(ptr + 13, of, mask=there)
    if SHARING:
        tl.store(ptr + 14, tl.where(kind == 1, 1, 0) + same, mask=there)
        tl.store(ptr + 15, stride + same, mask=there)
        member = tl.arange(0, _MEMBERS)[None, :]
        each = there[:, None] & (member < count) & (kind == 1)
        tl.store(ptr[:, None] + 16 + member, tokens[None, :] + same[:, None], mask=each)
        tl.store(ptr[:, None] + 16 + _MEMBERS + member, members[None, :] + same[:, None], mask=each)


@Kernel
def split_items(
    cu_q_ptr, lengths_ptr, items_ptr, arrived_ptr, shared_ptr, counts_ptr, owners_ptr, members_ptr, slots_ptr,
    PARTS, WINDOW, RANGES, PACKED,
    FEW: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, TILE: tl.constexpr, SEGMENT: tl.constexpr,
    MOST: tl.constexpr, STRIDE: tl.constexpr, WINDOWED: tl.constexpr, SHARING: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program for each row, or with SHARING for each part of a row. An item, by its numbers: 0 row, 1 first token,
    2 its position, 3 tokens, 4 and 5 tiles of keys from and to, 6 first slot for partial results (-1: none, the run is
    the row), 7 number of the run (0: it folds), 8 first slot of the row, 9 slots of the row, 10 runs of the row, 11
    tiles of a segment, 12 its place in the list, 13 its range. With SHARING, 14: whether it is of a pack, then 3 counts
    the rows, 6 counts from each row's first slot, and 16 and more are the rows' tokens, then the rows; 15: slots from
    one segment to the next.

    The first RANGES items are copies of the first of each range (no tokens: an empty one), the list begins behind them
    and ends with an item of range -1. The counters of arrivals at the rows are zeroed. A packed row has MOST slots,
    those from PACKED on, one for each segment; `slots` gets the first that holds something, how many do, and its runs.
    """
    release(PDL)
    wait(PDL)
    mine = tl.program_id(0)
    some = tl.arange(0, _CHUNK)
    row = mine // 2 if SHARING else mine
    total = 0
    for chunk in range(0, PARTS, _CHUNK):
        _, _, _, _, tiles, _, _, _ = _facts(
            cu_q_ptr, lengths_ptr, shared_ptr, counts_ptr, chunk + some, PARTS, WINDOW, FEW, TILE, SEGMENT, MOST,
            WINDOWED, SHARING,
        )  # fmt: skip
        total += tl.sum(tiles)
    per = tl.maximum((total + RANGES - 1) // RANGES, 1)
    owner = tl.load(owners_ptr + row) if SHARING else 0
    before, place, slot, previous, pack = 0, 0, 0, -1, 0
    for chunk in range(0, mine, _CHUNK):
        part = chunk + some
        _, count, _, _, tiles, segment, segments, shared = _facts(
            cu_q_ptr, lengths_ptr, shared_ptr, counts_ptr, part, mine, WINDOW, FEW, TILE, SEGMENT, MOST, WINDOWED,
            SHARING,
        )  # fmt: skip
        at = before + tl.cumsum(tiles) - tiles
        _, last, runs, _, slots = _cut(at, count, segment, segments, per, RANGES)
        before += tl.sum(tiles)
        place += tl.sum(runs)
        slot += tl.sum(tl.where(shared > 0, 0, slots))
        previous = tl.maximum(previous, tl.max(tl.where(runs > 0, last, -1)))
        if SHARING:
            pack += tl.sum(tl.where(part == 2 * owner, at, 0))

    token, count, length, first_tile, tiles, segment, segments, shared = _facts(
        cu_q_ptr, lengths_ptr, shared_ptr, counts_ptr, mine, PARTS, WINDOW, FEW, TILE, SEGMENT, MOST, WINDOWED, SHARING
    )
    first, last, runs, head, slots = _cut(before, count, segment, segments, per, RANGES)
    slot = slot * STRIDE
    first_slot, all_runs, stride, kind, members, tokens = slot, runs, STRIDE, 0, 0, 0
    if SHARING:
        common = mine % 2 == 0
        kind = tl.where(shared > 0, tl.where(common, 1, 2), 0)
        member = tl.arange(0, _MEMBERS)
        members = tl.load(members_ptr + row * _MEMBERS + member, mask=(member < count) & (kind == 1), other=0)
        tokens = tl.load(cu_q_ptr + members)
        # What the pack has in common: its first run leaves one result, in the place of its last segment.
        _, _, pack_runs, pack_head, _ = _cut(pack, 1, segment, shared // segment, per, RANGES)
        stride = tl.where(kind > 0, 1, STRIDE)
        base = PACKED + row * MOST
        first_slot = tl.where(kind == 2, base + pack_head - 1, slot)
        slot = tl.where(kind == 2, base + shared // segment, tl.where(kind == 1, 0, slot))
        slots = tl.where(kind == 2, shared // segment + segments - pack_head + 1, slots)
        all_runs = tl.where(kind == 2, pack_runs + runs, runs)
        tl.store(slots_ptr + 4 * row, first_slot, mask=kind == 2)
        tl.store(slots_ptr + 4 * row + 1, slots, mask=kind == 2)
        tl.store(slots_ptr + 4 * row + 2, all_runs, mask=kind == 2)
    lane = tl.arange(0, 64)
    for start in range(0, runs, 64):
        run = start + lane
        of = tl.where(segment >= per, tl.minimum((before + run * segment) // per, RANGES - 1), first + run)
        _put(
            items_ptr + (RANGES + place + run) * _ITEM, run < runs, run, row, token, count, length, first_tile, tiles,
            segment, segments, before, first, runs, head, slot, first_slot, slots, all_runs, stride, kind, members,
            tokens, per, place, of, SHARING,
        )  # fmt: skip
    last = tl.where(runs > 0, last, previous)
    for start in range(previous + 1, last + 1, 64):
        of = start + lane
        run = tl.where(segment >= per, tl.maximum(of * per - before + segment - 1, 0) // segment, of - first)
        run = tl.maximum(run, 0)
        hit = tl.where(segment >= per, tl.minimum((before + run * segment) // per, RANGES - 1) == of, of >= first)
        hit = hit & (run < runs)
        _put(
            items_ptr + of * _ITEM, hit & (of <= last), run, row, token, count, length, first_tile, tiles,
            segment, segments, before, first, runs, head, slot, first_slot, slots, all_runs, stride, kind, members,
            tokens, per, place, of, SHARING,
        )  # fmt: skip
        _nothing(items_ptr + of * _ITEM, (not hit) & (of <= last))
    if mine == PARTS - 1:
        for start in range(last + 1, RANGES, 64):
            of = start + lane
            _nothing(items_ptr + of * _ITEM, of < RANGES)
        tl.store(items_ptr + (RANGES + place + runs) * _ITEM + 13, -1)
    heads = tl.arange(0, KP)
    tl.store(arrived_ptr + row * K + heads, tl.zeros((KP,), tl.int32), mask=heads < K)


@triton.jit
def _nothing(ptr, there):
    """Items without tokens, for ranges without any: what they say comes next is of another range."""
    zero = tl.zeros((64,), tl.int32)
    for number in tl.static_range(16):
        tl.store(ptr + number, zero - 1 if number == 6 or number == 12 else zero, mask=there)


@Kernel
def tile_items(
    cu_q_ptr, lengths_ptr, items_ptr, head_ptr, arrived_ptr, ROWS, WINDOW, PROGRAMS, FEW: tl.constexpr,
    BQ: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, N: tl.constexpr, LEAST: tl.constexpr, WINDOWED: tl.constexpr,
    CUT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program for each row. An item: row, first token, its position, tokens. Within a row the last tile comes
    first: it has the most keys. `head_ptr` gets the count of items.

    With CUT, where the tiles would leave some of PROGRAMS without work, their keys are cut in parts of at least LEAST
    tiles of N keys, as many for each tile as fill the programs: 4 and 5 tiles of keys from and to, 6 the number of the
    part, 7 parts, 8 number of the first part's item. Counters of arrivals (at the first part) are zeroed.
    """
    release(PDL)
    wait(PDL)
    mine = tl.program_id(0)
    some = tl.arange(0, _CHUNK)
    every = 0
    for at in range(0, ROWS, _CHUNK):
        row = at + some
        start = tl.load(cu_q_ptr + row, mask=row < ROWS, other=0)
        count = tl.load(cu_q_ptr + row + 1, mask=row < ROWS, other=0) - start
        every += tl.sum(tl.where(count > FEW, (count + BQ - 1) // BQ, 0))
    most = tl.maximum(PROGRAMS // (tl.maximum(every, 1) * K), 1) if CUT else 1
    before, every = 0, 0
    for at in range(0, ROWS, _CHUNK):
        row = at + some
        start = tl.load(cu_q_ptr + row, mask=row < ROWS, other=0)
        count = tl.load(cu_q_ptr + row + 1, mask=row < ROWS, other=0) - start
        length = tl.load(lengths_ptr + row, mask=row < ROWS, other=0)
        items = tl.where(count > FEW, (count + BQ - 1) // BQ, 0)
        items *= _parts(length, count, WINDOW, most, N, LEAST, WINDOWED)
        every += tl.sum(items)
        before += tl.sum(tl.where(row < mine, items, 0))
    if mine == 0:
        tl.store(head_ptr, every)
    token = tl.load(cu_q_ptr + mine)
    count = tl.load(cu_q_ptr + mine + 1) - token
    length = tl.load(lengths_ptr + mine)
    tiles = tl.where(count > FEW, (count + BQ - 1) // BQ, 0)
    parts = _parts(length, count, WINDOW, most, N, LEAST, WINDOWED)
    lane = tl.arange(0, 64)
    for at in range(0, tiles * parts, 64):
        i = at + lane
        there = i < tiles * parts
        offset = (tiles - 1 - i // parts) * BQ
        position = length - count + offset
        own = tl.minimum(count - offset, BQ)
        item_ptr = items_ptr + (before + i) * _ITEM
        tl.store(item_ptr, mine + tl.zeros_like(i), mask=there)
        tl.store(item_ptr + 1, token + offset, mask=there)
        tl.store(item_ptr + 2, position, mask=there)
        tl.store(item_ptr + 3, own, mask=there)
        if CUT:
            first = tl.maximum(position + 1 - WINDOW, 0) // N if WINDOWED else tl.zeros_like(i)
            keys = (position + own + N - 1) // N - first
            each = (keys + parts - 1) // parts
            part = i % parts
            tl.store(item_ptr + 4, first + tl.minimum(part * each, keys), mask=there)
            tl.store(item_ptr + 5, first + tl.minimum((part + 1) * each, keys), mask=there)
            tl.store(item_ptr + 6, part, mask=there)
            tl.store(item_ptr + 7, parts + tl.zeros_like(i), mask=there)
            tl.store(item_ptr + 8, before + i - part, mask=there)
            head = tl.arange(0, KP)[None, :]
            counter_ptr = arrived_ptr + (before + i)[:, None] * K + head
            tl.store(counter_ptr, tl.zeros((64, KP), tl.int32), mask=there[:, None] & (head < K))


@triton.jit
def _parts(length, count, window, most, N: tl.constexpr, LEAST: tl.constexpr, WINDOWED: tl.constexpr):
    """Of rows: parts that the keys of each of their tiles are cut in."""
    keys = tl.minimum(length, count + window) if WINDOWED else length
    return tl.maximum(tl.minimum(keys // (LEAST * N), most), 1)
