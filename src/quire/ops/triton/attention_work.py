"""What there is to do in a step's attention, listed on the device from the rows' lengths.

Owns: two lists that the layers of a step share. `split_items`: rows of few tokens, cut over their keys for
`attention_split.py`. `tile_items`: tiles of queries of the other rows for `attention_tiles.py`. No number comes back to
the host, so a graph can capture the making of the lists and replay it over other lengths.

A row of few tokens is read in tiles of keys; so many tiles, a number that depends on the row alone, are a segment. The
result of a row is the left fold of its segments, whoever computes them: where rows are few, each segment is an item, and
who finishes a row's last one folds them all; where rows are many, a row is one item. So how much work is spread follows
the batch, and the bits of a row do not.
"""

from __future__ import annotations

import triton
import triton.language as tl

ITEM = 16  # int32 numbers of an item, of which the first ten are used
_CHUNK = tl.constexpr(1024)
_ITEM = tl.constexpr(ITEM)


@triton.jit
def _facts(
    cu_q_ptr, lengths_ptr, row, rows, window, long_from,
    BQ: tl.constexpr, TILE: tl.constexpr, SEGMENT: tl.constexpr, MOST: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Of rows: first token, count of tokens, length, tiles of queries, first tile of keys, tiles of keys, tiles of a
    segment, segments. A row that is not there, or is not short, has no tiles of queries."""
    known = row < rows
    token = tl.load(cu_q_ptr + row, mask=known, other=0)
    count = tl.load(cu_q_ptr + row + 1, mask=known, other=0) - token
    length = tl.load(lengths_ptr + row, mask=known, other=0)
    q_tiles = tl.where(count < long_from, (count + BQ - 1) // BQ, 0)
    first = tl.zeros_like(length)
    if WINDOWED:
        first = tl.maximum(length - count + 1 - window, 0) // TILE
    tiles = tl.maximum((length + TILE - 1) // TILE - first, 0)
    segment = tl.maximum((tiles + MOST - 1) // MOST, SEGMENT)
    return token, count, length, q_tiles, first, tiles, segment, (tiles + segment - 1) // segment


@triton.jit(do_not_specialize=["rows", "window", "long_from", "spread"])
def split_items(
    cu_q_ptr, lengths_ptr, items_ptr, head_ptr, arrived_ptr, rows, window, long_from, spread,
    K: tl.constexpr, KP: tl.constexpr, BQ: tl.constexpr, TILE: tl.constexpr, SEGMENT: tl.constexpr,
    MOST: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """One program for each row. An item: row, first token, its position, tokens, tiles of keys from and to, first slot
    of the partial results (-1: none, the item is the row), number of the segment, segments, tiles of a segment.

    `head_ptr` gets the count of items; the counters of arrivals are zeroed. A row is one item where its tiles are no
    more than the tiles of all over `spread`; so rows that are not are fewer than spread / K tiles of queries.
    """
    mine = tl.program_id(0)
    some = tl.arange(0, _CHUNK)
    total = 0
    for at in range(0, rows, _CHUNK):
        _, _, _, q_tiles, _, tiles, _, _ = _facts(
            cu_q_ptr, lengths_ptr, at + some, rows, window, long_from, BQ, TILE, SEGMENT, MOST, WINDOWED
        )
        total += tl.sum(q_tiles * tiles)
    few = total * K // spread
    before, slots, every = 0, 0, 0
    for at in range(0, rows, _CHUNK):
        row = at + some
        _, _, _, q_tiles, _, tiles, _, segments = _facts(
            cu_q_ptr, lengths_ptr, row, rows, window, long_from, BQ, TILE, SEGMENT, MOST, WINDOWED
        )
        whole = (segments <= 1) | (tiles <= few)
        items = q_tiles * tl.where(whole, 1, segments)
        every += tl.sum(items)
        items = tl.where(row < mine, items, 0)
        before += tl.sum(items)
        slots += tl.sum(tl.where(whole, 0, items))
    if mine == 0:
        tl.store(head_ptr, every)

    token, count, length, q_tiles, first, tiles, segment, segments = _facts(
        cu_q_ptr, lengths_ptr, mine, rows, window, long_from, BQ, TILE, SEGMENT, MOST, WINDOWED
    )
    whole = (segments <= 1) | (tiles <= few)
    parts = tl.where(whole, 1, segments)
    heads = tl.arange(0, KP)
    lane = tl.arange(0, 64)
    for at in range(0, q_tiles * parts, 64):
        i = at + lane
        there = i < q_tiles * parts
        q_tile, part = i // parts, i % parts
        item_ptr = items_ptr + (before + i) * _ITEM
        start = first + part * segment
        slot = slots + q_tile * parts
        tl.store(item_ptr, mine + tl.zeros_like(i), mask=there)
        tl.store(item_ptr + 1, token + q_tile * BQ, mask=there)
        tl.store(item_ptr + 2, length - count + q_tile * BQ, mask=there)
        tl.store(item_ptr + 3, tl.minimum(count - q_tile * BQ, BQ), mask=there)
        tl.store(item_ptr + 4, start, mask=there)
        tl.store(item_ptr + 5, tl.where(whole, first + tiles, tl.minimum(start + segment, first + tiles)), mask=there)
        tl.store(item_ptr + 6, tl.where(whole, -1, slot), mask=there)
        tl.store(item_ptr + 7, part, mask=there)
        tl.store(item_ptr + 8, segments + tl.zeros_like(i), mask=there)
        tl.store(item_ptr + 9, segment + tl.zeros_like(i), mask=there)
        counter_ptr = arrived_ptr + slot[:, None] * K + heads[None, :]
        first_part = there & (part == 0) & (not whole)
        tl.store(counter_ptr, tl.zeros((64, KP), tl.int32), mask=first_part[:, None] & (heads < K)[None, :])


@triton.jit(do_not_specialize=["rows", "long_from"])
def tile_items(cu_q_ptr, lengths_ptr, items_ptr, head_ptr, rows, long_from, BQ: tl.constexpr):
    """One program for each row. An item: row, first token, its position, tokens. Within a row the last tile comes
    first: it has the most keys. `head_ptr` gets the count of items."""
    mine = tl.program_id(0)
    some = tl.arange(0, _CHUNK)
    before, every = 0, 0
    for at in range(0, rows, _CHUNK):
        row = at + some
        start = tl.load(cu_q_ptr + row, mask=row < rows, other=0)
        count = tl.load(cu_q_ptr + row + 1, mask=row < rows, other=0) - start
        items = tl.where(count >= long_from, (count + BQ - 1) // BQ, 0)
        every += tl.sum(items)
        before += tl.sum(tl.where(row < mine, items, 0))
    if mine == 0:
        tl.store(head_ptr, every)
    token = tl.load(cu_q_ptr + mine)
    count = tl.load(cu_q_ptr + mine + 1) - token
    length = tl.load(lengths_ptr + mine)
    items = tl.where(count >= long_from, (count + BQ - 1) // BQ, 0)
    lane = tl.arange(0, 64)
    for at in range(0, items, 64):
        i = at + lane
        there = i < items
        offset = (items - 1 - i) * BQ
        item_ptr = items_ptr + (before + i) * _ITEM
        tl.store(item_ptr, mine + tl.zeros_like(i), mask=there)
        tl.store(item_ptr + 1, token + offset, mask=there)
        tl.store(item_ptr + 2, length - count + offset, mask=there)
        tl.store(item_ptr + 3, tl.minimum(count - offset, BQ), mask=there)
