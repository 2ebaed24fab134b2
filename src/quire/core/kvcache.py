"""Who holds which page: block tables of all KV groups, prefix hits, copy-on-write, swapping to the host.

Owns the device pool, the host pool and every change of a sequence's tables. Knows no tensors and no policy: it is told
what to grow, release or swap, and says what that does to pages (`Moves`) or that there is no room.

Pages of all groups have one byte size, so one pool serves them. The groups differ in which pages a sequence needs:
`full` and `latent` all of them; `sliding` those with tokens that the next query can still see; `state` the page with
the state so far, and the one that the step writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from quire.core.blocks import BlockPool, Key
from quire.core.hashing import extend_hashes
from quire.core.moves import Moves
from quire.core.sequence import Sequence
from quire.types.kv import KVGroup, pages_needed


@dataclass(frozen=True, slots=True)
class Hit:
    """A prefix of `tokens` tokens that is cached in every group: pages as (group, index, device page, host page), one
    of the two pages being -1."""

    tokens: int
    pages: tuple[tuple[int, int, int, int], ...]


MISS = Hit(0, ())


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


class KVCacheManager:
    def __init__(
        self,
        groups: tuple[KVGroup, ...],
        num_blocks: int,
        block_size: int,
        num_host_blocks: int = 0,
        prefix_caching: bool = True,
        at_once: int | None = None,
    ) -> None:
        self.groups = groups
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.pool = BlockPool(num_blocks, at_once)
        self.host = BlockPool(num_host_blocks)
        self.has_state = any(g.kind == "state" for g in groups)
        self._keeps_all = bool(groups) and all(g.kind in ("full", "latent") for g in groups)
        self._swapped: dict[int, int] = {}  # device page -> plan whose swap touches it
        self._host_releases: list[int] = []  # host pages read by swaps of the plan in the making
        self._late: list[tuple[int, Key]] = []  # state pages that the plan in the making completes

    # -- what a sequence needs -------------------------------------------------------------------------------------

    def worst_case(self, length: int, chunk: int) -> int:
        """Pages that one sequence of `length` tokens holds at the most when it is computed in chunks of `chunk`."""
        return pages_needed(self.groups, length, chunk, self.block_size)

    def _need(self, seq: Sequence, start: int, upto: int) -> int:
        size, need = self.block_size, 0
        for group, table in zip(self.groups, seq.tables, strict=True):
            last = (upto - 1) // size
            first = last if group.kind == "state" else start // size
            need += 1 if group.kind == "state" and last >= len(table) else max(0, last + 1 - max(len(table), first))
            if first < len(table) and table[first] >= 0 and self.pool.count(table[first]) > 1:
                need += 1
        return need

    # -- growing and shrinking -------------------------------------------------------------------------------------

    def grow(self, seq: Sequence, start: int, upto: int, moves: Moves) -> int:
        """Make the tokens `start .. upto-1` writable; returns up to which token the sequence is now writable, or 0,
        with nothing changed but pages behind a window freed, if there is no room."""
        if self._keeps_all:
            if start == len(seq.tables[0]) * self.block_size >= upto - self.block_size:
                return self._append_page(seq, moves)  # what nearly every call of steady decoding comes to
        else:
            self._release_behind(seq, start)
        if self._need(seq, start, upto) > self.pool.available:
            return 0
        size = self.block_size
        last = (upto - 1) // size
        for g, (group, table) in enumerate(zip(self.groups, seq.tables, strict=True)):
            first = last if group.kind == "state" else start // size
            if first < len(table) and table[first] >= 0:
                if self.pool.count(table[first]) > 1:
                    self._unshare(seq, g, first, moves)
                else:  # a sibling that shared it may have been swapped out
                    moves.fence = max(moves.fence, self._swapped.pop(table[first], -1))
            while len(table) <= last:
                skip = group.kind == "state" and len(table) < last
                page = -1 if skip else self._take(moves)
                if not skip:
                    moves.enter(g, seq.row, len(table), page)
                table.append(page)
            if group.kind == "state" and upto % size == 0:
                seq.snapshots.add(last)
        return (last + 1) * size

    def _append_page(self, seq: Sequence, moves: Moves) -> int:
        if self.pool.available < len(seq.tables):
            return 0
        index = len(seq.tables[0])
        for g, table in enumerate(seq.tables):
            page = self._take(moves)
            moves.enter(g, seq.row, index, page)
            table.append(page)
        return (index + 1) * self.block_size

    def _unshare(self, seq: Sequence, g: int, index: int, moves: Moves) -> None:
        """Copy-on-write: the sequence gets its own copy of a page that others hold too."""
        shared = seq.tables[g][index]
        page = self._take(moves)
        moves.copies[page] = shared
        moves.enter(g, seq.row, index, page)
        seq.tables[g][index] = page
        self.pool.release(shared)

    def _take(self, moves: Moves) -> int:
        """A page for this plan; what it held goes to the host tier, if there is room for it there."""
        page, key = self.pool.take()
        moves.fence = max(moves.fence, self._swapped.pop(page, -1))
        if key is not None and self.host.available and self.host.find(key) is None:
            host_page, _ = self.host.take()
            self.host.publish(host_page, key)
            self.host.release(host_page)
            moves.swap_out[host_page] = page
            moves.fence = moves.number
        return page

    def _release_behind(self, seq: Sequence, start: int) -> None:
        """Give back pages that no later query of the sequence reads. `start` is the next token to compute, but a
        sequence that is preempted goes back to its last known token, so that one counts."""
        size = self.block_size
        base = min(start, len(seq.tokens) - 1)
        for g, group in enumerate(self.groups):
            if group.kind == "sliding":
                assert group.window is not None
                end = max(0, base - group.window + 1) // size
            elif group.kind == "state":
                end = (start - 1) // size
            else:
                continue
            table = seq.tables[g]
            for j in range(seq.first_page[g], min(end, len(table))):
                if table[j] >= 0:
                    self.pool.release(table[j])
                    table[j] = -1
            seq.first_page[g] = max(seq.first_page[g], min(end, len(table)))

    def release(self, seq: Sequence) -> None:
        """All pages of the sequence go back, the last ones first, so that a prefix outlives what follows it."""
        for table in seq.tables:
            for page in reversed(table):
                if page >= 0:
                    self.pool.release(page)
            table.clear()
        for _, _, page in seq.host or ():
            self.host.release(page)
        seq.host = None
        seq.first_page = [0] * len(self.groups)
        seq.published = 0
        seq.snapshots.clear()

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """The child shares every page of the parent; whoever writes a shared page first gets a copy."""
        child.tables = [list(table) for table in parent.tables]
        child.first_page = list(parent.first_page)
        child.hashes = list(parent.hashes)
        child.published = parent.published
        child.snapshots = set(parent.snapshots)
        for table in child.tables:
            for page in table:
                if page >= 0:
                    self.pool.hold(page)

    # -- the prefix cache ------------------------------------------------------------------------------------------

    def publish(self, seq: Sequence, upto: int) -> None:
        """Make the full pages of the first `upto` tokens, all known and planned, findable.

        Attention pages are found at once, by requests planned in the same step too: in each layer every KV write of a
        step precedes every read. A state is there only after the step, so state pages wait for the next plan.
        """
        if not self.prefix_caching or upto // self.block_size <= seq.published:
            return
        extend_hashes(seq.hashes, seq.job.root, seq.tokens, upto, self.block_size, seq.job.request)
        for j in range(seq.published, upto // self.block_size):
            for g, table in enumerate(seq.tables):
                page = table[j] if j < len(table) else -1
                if page < 0:
                    continue
                if self.groups[g].kind != "state":
                    self.pool.publish(page, (g, seq.hashes[j]))
                elif j in seq.snapshots:
                    self._late.append((page, (g, seq.hashes[j])))
        seq.published = upto // self.block_size

    def truncate(self, seq: Sequence, length: int) -> None:
        """Tokens from index `length` on never were, or cannot be trusted: their pages are no longer found."""
        self.forget(seq.hashes[length // self.block_size :])
        del seq.hashes[length // self.block_size :]
        seq.published = min(seq.published, length // self.block_size)

    def forget(self, hashes: list[bytes]) -> None:
        """Pages with these contents are no longer found, here and on the host."""
        for digest in hashes:
            for g in range(len(self.groups)):
                for pool in (self.pool, self.host):
                    if (page := pool.find((g, digest))) is not None:
                        pool.unpublish(page)
        gone = set(hashes)
        self._late = [(page, key) for page, key in self._late if key[1] not in gone]

    def lookup(self, seq: Sequence) -> Hit:
        """The longest cached prefix, valid in every group, of at most all known tokens but one."""
        if not self.prefix_caching or seq.job.skip_cache:
            return MISS
        limit = len(seq.tokens) - 1
        extend_hashes(seq.hashes, seq.job.root, seq.tokens, limit, self.block_size, seq.job.request)
        best = limit // self.block_size
        for g, group in enumerate(self.groups):
            if group.kind in ("full", "latent"):
                best = next((j for j in range(best) if not self._cached((g, seq.hashes[j]))), best)
        while best and not all(self._cached((g, seq.hashes[j])) for g, j in self._window_pages(best)):
            best -= 1
        pages: list[tuple[int, int, int, int]] = []
        for g, j in self._needed_pages(best):
            page = self.pool.find((g, seq.hashes[j]))
            host = -1 if page is not None else self.host.find((g, seq.hashes[j]))
            assert host is not None
            pages.append((g, j, -1 if page is None else page, host))
        return Hit(best * self.block_size, tuple(pages))

    def _cached(self, key: Key) -> bool:
        return self.pool.find(key) is not None or self.host.find(key) is not None

    def _window_pages(self, blocks: int) -> Iterator[tuple[int, int]]:
        """(group, index) that sliding and state groups need to go on after `blocks` blocks."""
        for g, group in enumerate(self.groups):
            if group.kind == "state":
                yield g, blocks - 1
            elif group.window is not None:
                first = max(0, blocks * self.block_size - group.window + 1) // self.block_size
                yield from ((g, j) for j in range(blocks - 1, first - 1, -1))

    def _needed_pages(self, blocks: int) -> Iterator[tuple[int, int]]:
        if not blocks:
            return
        for g, group in enumerate(self.groups):
            if group.kind in ("full", "latent"):
                yield from ((g, j) for j in range(blocks))
        yield from self._window_pages(blocks)

    def admit(self, seq: Sequence, hit: Hit, chunk: int, moves: Moves) -> int:
        """Give a waiting sequence (which has a row) its prefix hit and room for `chunk` tokens more; returns as `grow`.

        Room is asked for all its known tokens, not for the chunk alone: a sequence that enters where it cannot stay
        would be preempted at once, and its work be lost.
        """
        length = len(seq.tokens)
        revived = sum(page < 0 or self.pool.count(page) == 0 for _, _, page, _ in hit.pages)
        shared = len(hit.pages) - revived
        if self.worst_case(length, chunk) - shared > self.pool.available:
            return 0
        # All device hits are held before any page is taken: taking evicts.
        for _, _, page, host_page in hit.pages:
            if page >= 0:
                self.pool.hold(page)
            else:
                self.host.hold(host_page)
                self._host_releases.append(host_page)
        if self._need_after(hit, chunk) > self.pool.available:
            for _, _, page, _ in hit.pages:
                if page >= 0:
                    self.pool.release(page)
            return 0
        blocks = hit.tokens // self.block_size
        for table in seq.tables:
            table.extend([-1] * blocks)
        for g, j, page, host_page in hit.pages:
            seq.tables[g][j] = self._swap_in(host_page, seq.hashes[j], g, moves) if page < 0 else page
            moves.enter(g, seq.row, j, seq.tables[g][j])
        seq.published = blocks
        if self.has_state and blocks:
            seq.snapshots.add(blocks - 1)
        capacity = self.grow(seq, hit.tokens, hit.tokens + chunk, moves)
        assert capacity
        return capacity

    def _need_after(self, hit: Hit, chunk: int) -> int:
        """Pages to take for a hit: those that come from the host, and those of the chunk."""
        size = self.block_size
        first, last = hit.tokens // size, (hit.tokens + chunk - 1) // size
        fresh = sum(1 if group.kind == "state" else last + 1 - first for group in self.groups)
        return fresh + sum(page < 0 for _, _, page, _ in hit.pages)

    def _swap_in(self, host_page: int, digest: bytes | None, g: int, moves: Moves) -> int:
        page = self._take(moves)
        moves.swap_in[page] = host_page
        moves.fence = moves.number
        if digest is not None:
            self.pool.publish(page, (g, digest))
        return page

    # -- swapping --------------------------------------------------------------------------------------------------

    def swap_out(self, seq: Sequence, computed: int, rewound: bool, moves: Moves) -> bool:
        """Move a sequence's pages for its first `computed` tokens to the host and release them here; False, with
        nothing changed, if the host has no room. `rewound`: tokens behind `computed` were computed already, which a
        state cannot forget."""
        size = self.block_size
        entries = [
            (g, j, page)
            for g, table in enumerate(seq.tables)
            for j, page in enumerate(table)
            if page >= 0 and j * size < computed
        ]
        if not entries or len(entries) > self.host.available or (self.has_state and rewound):
            return False
        kept: list[tuple[int, int, int]] = []
        copied: list[tuple[int, int]] = []
        for g, j, page in entries:  # pages that the host has already are held before any is taken
            key = self.pool.key(page)
            host_page = self.host.find(key) if key is not None else None
            if host_page is not None:
                self.host.hold(host_page)
                kept.append((g, j, host_page))
        for g, j, page in entries:
            key = self.pool.key(page)
            if key is not None and self.host.find(key) is not None:
                continue
            assert page not in moves.copies and page not in moves.swap_in, "a victim has no work in this plan"
            host_page, _ = self.host.take()
            if key is not None:
                self.host.publish(host_page, key)
            kept.append((g, j, host_page))
            copied.append((host_page, page))
        for host_page, page in copied:
            moves.swap_out[host_page] = page
            self._swapped[page] = moves.number
        blocks = ceil_div(computed, size)
        self.release(seq)
        seq.host = kept
        seq.swapped = computed
        assert all(j < blocks for _, j, _ in kept)
        return True

    def restore(self, seq: Sequence, chunk: int, moves: Moves) -> int:
        """Bring a swapped sequence back and give it room for `chunk` tokens more; returns as `grow`."""
        assert seq.host is not None
        length, size = len(seq.tokens), self.block_size
        blocks = ceil_div(seq.swapped, size)
        ahead = self.worst_case(length, chunk) + len(self.groups)
        if max(ahead, len(seq.host) + ceil_div(chunk, size) * len(self.groups)) > self.pool.available:
            return 0
        entries, seq.host = seq.host, None
        for table in seq.tables:
            table.extend([-1] * blocks)
        here = {(g, j): page for g, j, _ in entries if (page := self._still_here(seq, g, j)) is not None}
        for page in here.values():  # held before any page is taken: taking evicts
            self.pool.hold(page)
        for g, j, host_page in entries:
            full = (j + 1) * size <= seq.swapped and j < len(seq.hashes) and self.groups[g].kind != "state"
            page = here.get((g, j))
            if page is None:
                page = self._swap_in(host_page, seq.hashes[j] if full else None, g, moves)
            seq.tables[g][j] = page
            moves.enter(g, seq.row, j, page)
            self._host_releases.append(host_page)
        seq.published = min(seq.swapped // size, len(seq.hashes))
        capacity = self.grow(seq, seq.swapped, seq.swapped + chunk, moves)
        assert capacity
        return capacity

    def _still_here(self, seq: Sequence, g: int, j: int) -> int | None:
        """A device page that holds block j of a swapped sequence, whole and never to be written again."""
        full = (j + 1) * self.block_size <= seq.swapped and j < len(seq.hashes)
        return self.pool.find((g, seq.hashes[j])) if full and self.groups[g].kind != "state" else None

    # -- around a plan ---------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Before a plan is made: states that the last one completed can be found from here on."""
        for page, key in self._late:
            self.pool.publish(page, key)
        self._late.clear()

    def close(self) -> None:
        """After a plan is made: host pages that its swaps read may be taken again by later ones."""
        for page in self._host_releases:
            self.host.release(page)
        self._host_releases.clear()

    def clear(self) -> None:
        """Forget the prefix cache, on the device and on the host."""
        self.pool.clear()
        self.host.clear()
        self._late.clear()

    def check(self, sequences: list[Sequence]) -> None:
        """Assert conservation: each page is held exactly by the tables that name it, or free, or cached."""
        self.pool.check(page for seq in sequences for table in seq.tables for page in table if page >= 0)
        self.host.check(page for seq in sequences for _, _, page in seq.host or ())
        for seq in sequences:
            for g, table in enumerate(seq.tables):
                own = [page for page in table if page >= 0]
                assert len(own) == len(set(own)), f"group {g} of a sequence names a page twice"
