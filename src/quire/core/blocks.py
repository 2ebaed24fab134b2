"""A pool of numbered pages: reference counts, the index of cached contents, and the order in which pages are reused.

Owns ids, counts and hashes, never memory. One pool stands for the device's pages, another for the host's.
A page is *held* (count > 0), *cached* (count 0, its content findable under its key) or *free* (count 0, no key).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable

Key = tuple[int, bytes]
"""(KV group, chained hash of all tokens up to the page's end)."""


class BlockPool:
    """`num_blocks` pages, all free. Page ids count from 0.

    Unheld pages wait in one queue: those without content at the front, cached ones behind in the order of their
    release, so that taking from the front spends worthless pages first and then the least recently used content.
    Only the first `at_once` pages (None: all) are in the queue from the beginning. The others cost no memory before
    they are used, and join when the queue is empty.
    """

    def __init__(self, num_blocks: int, at_once: int | None = None) -> None:
        self.num_blocks = num_blocks
        self._used = num_blocks if at_once is None else min(at_once, num_blocks)  # pages that are or were in the queue
        self._count = [0] * num_blocks
        self._key: list[Key | None] = [None] * num_blocks
        self._index: dict[Key, int] = {}
        self._unheld: OrderedDict[int, None] = OrderedDict.fromkeys(range(self._used))
        self._cached = 0

    @property
    def available(self) -> int:
        """Pages that `take` can hand out: free and cached ones."""
        return len(self._unheld) + self.num_blocks - self._used

    @property
    def cached(self) -> int:
        return self._cached

    @property
    def num_published(self) -> int:
        """Contents that can be found."""
        return len(self._index)

    @property
    def held(self) -> int:
        return self._used - len(self._unheld)

    def contents(self) -> Collection[int]:
        """The pages whose content can be found, held or cached."""
        return self._index.values()

    def count(self, block: int) -> int:
        return self._count[block]

    def key(self, block: int) -> Key | None:
        return self._key[block]

    def find(self, key: Key) -> int | None:
        """The page that holds this content, held or cached."""
        return self._index.get(key)

    def take(self) -> tuple[int, Key | None]:
        """An unheld page, now held once, and the key of the content that this evicts. There must be one `available`."""
        if not self._unheld:
            self._unheld[self._used] = None
            self._used += 1
        block, _ = self._unheld.popitem(last=False)
        self._count[block] = 1
        key = self._key[block]
        if key is not None:
            self._cached -= 1
            del self._index[key]
            self._key[block] = None
        return block, key

    def hold(self, block: int) -> None:
        """One more holder."""
        if self._count[block] == 0:
            del self._unheld[block]
            self._cached -= self._key[block] is not None
        self._count[block] += 1

    def release(self, block: int) -> None:
        """One holder less; the last one puts the page back into the queue."""
        count = self._count[block] - 1
        assert count >= 0, f"block {block} released more often than held"
        self._count[block] = count
        if count == 0:
            self._unheld[block] = None
            if self._key[block] is None:
                self._unheld.move_to_end(block, last=False)
            else:
                self._cached += 1

    def publish(self, block: int, key: Key) -> None:
        """Make the content of `block` findable. The first page with a content stays the one that is found."""
        if key in self._index or self._key[block] is not None:
            return
        self._index[key] = block
        self._key[block] = key
        if self._count[block] == 0:
            self._cached += 1
            self._unheld.move_to_end(block)

    def unpublish(self, block: int) -> None:
        """Forget what the page holds; its holders keep it."""
        key = self._key[block]
        if key is None:
            return
        del self._index[key]
        self._key[block] = None
        if self._count[block] == 0:
            self._cached -= 1
            self._unheld.move_to_end(block, last=False)

    def clear(self) -> None:
        """Forget all contents."""
        for block in list(self._index.values()):
            self.unpublish(block)

    def check(self, holders: Iterable[int]) -> None:
        """Assert conservation: `holders` names each held page once per holder."""
        expected = [0] * self.num_blocks
        for block in holders:
            expected[block] += 1
        assert expected == self._count, "reference counts differ from the holders"
        unheld = self._unheld.keys() | set(range(self._used, self.num_blocks))
        assert all((c == 0) == (b in unheld) for b, c in enumerate(self._count)), "a page is both held and unheld"
        assert {b: k for k, b in self._index.items()} == {b: k for b, k in enumerate(self._key) if k is not None}
        assert self._cached == sum(self._key[b] is not None for b in self._unheld)
