# pyright: reportGeneralTypeIssues=false
"""Which rows of one token read the same pages first, found on the device from the tables.

Owns: packs. A pack is some rows, as many as fill a tile of queries, that `attention_split.py` takes through their
common pages together, so that these are read once for all of them. What is common is whole segments (see
`attention_work.py`), and a segment gives a row the same bits in a pack as alone: which rows are packed decides about
speed only.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire.ops.triton.launch import Kernel, release, wait

LEAST = 4  # tiles that rows must have in common
MEMBERS = 16  # of a pack, at most
_LEAST, _MEMBERS = tl.constexpr(LEAST), tl.constexpr(MEMBERS)
_CHUNK = tl.constexpr(1024)


@triton.jit
def segment_of(tiles, SEGMENT: tl.constexpr, MOST: tl.constexpr):
    """Tiles of a segment of rows of so many tiles: a power of two, so that rows of like length cut alike."""
    x = (tiles + MOST - 1) // MOST - 1
    x |= x >> 1
    x |= x >> 2
    x |= x >> 4
    x |= x >> 8
    x |= x >> 16
    return tl.maximum(x + 1, SEGMENT)


@Kernel
def find_leaders(
    cu_q_ptr, lengths_ptr, table_ptr, leaders_ptr, common_ptr, ABLE, TABLE,
    B: tl.constexpr, TILE: tl.constexpr, SEGMENT: tl.constexpr, MOST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program for each row; the first ABLE may be packed. A row's leader is the first row of one token that reads
    the same page LEAST tiles in, with segments of the same size; `common` gets the tiles that the two share, in whole
    segments (a leader with itself: all of its own). Rows that share too little lead themselves; rows that cannot be
    packed have 0 in common. The last tile of a row is never shared."""
    release(PDL)
    wait(PDL)
    mine = tl.program_id(0)
    some = tl.arange(0, _CHUNK)
    least: tl.constexpr = _LEAST * TILE
    column: tl.constexpr = (least + B - 1) // B - 1
    length = tl.load(lengths_ptr + mine)
    able = (tl.load(cu_q_ptr + mine + 1) - tl.load(cu_q_ptr + mine) == 1) & (length > least) & (mine < ABLE)
    segment = segment_of((length + TILE - 1) // TILE, SEGMENT, MOST)
    own_ptr = table_ptr + mine.to(tl.int64) * TABLE
    key = tl.load(own_ptr + column, mask=able, other=-1)
    found = mine
    for at in range(0, tl.where(able, mine, 0), _CHUNK):
        row = at + some
        there = row < mine
        start = tl.load(cu_q_ptr + row, mask=there, other=0)
        other = tl.load(lengths_ptr + row, mask=there, other=0)
        like = (tl.load(cu_q_ptr + row + 1, mask=there, other=0) - start == 1) & (other > least)
        like &= segment_of((other + TILE - 1) // TILE, SEGMENT, MOST) == segment
        page = tl.load(table_ptr + row.to(tl.int64) * TABLE + column, mask=like, other=-1)
        found = tl.minimum(found, tl.min(tl.where(like & (page == key), row, mine)))
    tiles = (tl.minimum(length, tl.load(lengths_ptr + found)) - 1) // TILE
    columns = (tiles * TILE + B - 1) // B
    same = columns
    other_ptr = table_ptr + found.to(tl.int64) * TABLE
    for at in range(0, tl.where(found < mine, columns, 0), _CHUNK):
        here = at + some
        one = tl.load(own_ptr + here, mask=here < columns, other=0)
        two = tl.load(other_ptr + here, mask=here < columns, other=0)
        same = tl.minimum(same, tl.min(tl.where(one == two, columns, here)))
    tiles = tl.minimum(tiles, same * B // TILE) // segment * segment
    led = able & (tiles >= _LEAST)
    tl.store(leaders_ptr + mine, tl.where(led, found, mine))
    alone = tl.where(able, (length - 1) // TILE // segment * segment, 0)
    tl.store(common_ptr + mine, tl.where(led, tiles, alone))


@Kernel
def form_packs(
    leaders_ptr, common_ptr, shared_ptr, counts_ptr, owners_ptr, members_ptr, ABLE, SIZE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program for each row. Rows with one leader are packed in turn, SIZE at a time; who is first owns the pack.
    `shared` gets the tiles that a row's pack has in common (0: not packed), `counts` the size of the pack that a row
    owns (0: none), `owners` the owner, `members` (R, MEMBERS) a pack's rows, where its owner is."""
    release(PDL)
    wait(PDL)
    mine = tl.program_id(0)
    some = tl.arange(0, _CHUNK)
    leader = tl.load(leaders_ptr + mine)
    able = tl.load(common_ptr + mine) >= _LEAST
    stop = tl.where(able, ABLE, 0)
    rank = 0
    for at in range(0, tl.where(able, mine, 0), _CHUNK):
        row = at + some
        like = tl.load(leaders_ptr + row, mask=row < mine, other=-1) == leader
        like &= tl.load(common_ptr + row, mask=row < mine, other=0) >= _LEAST
        rank += tl.sum(like.to(tl.int32))
    before, count, owner = 0, 0, mine
    shared = tl.load(common_ptr + mine)
    for at in range(0, stop, _CHUNK):
        row = at + some
        like = tl.load(leaders_ptr + row, mask=row < ABLE, other=-1) == leader
        tiles = tl.load(common_ptr + row, mask=row < ABLE, other=0)
        like &= tiles >= _LEAST
        number = like.to(tl.int32)
        ranks = before + tl.cumsum(number) - number
        here = like & (ranks // SIZE == rank // SIZE)
        shared = tl.minimum(shared, tl.min(tl.where(here, tiles, 1 << 30)))
        owner = tl.minimum(owner, tl.min(tl.where(here, row, mine)))
        count += tl.sum(here.to(tl.int32))
        before += tl.sum(number)
    shared = tl.where(count > 1, shared, 0)
    tl.store(shared_ptr + mine, shared)
    tl.store(counts_ptr + mine, tl.where((shared > 0) & (owner == mine), count, 0))
    tl.store(owners_ptr + mine, owner)
    tl.store(members_ptr + owner * _MEMBERS + rank % SIZE, mine, mask=shared > 0)
