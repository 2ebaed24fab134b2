"""The pool of pages: in which order they are reused, what is found in them, and that its books can be wrong."""

from __future__ import annotations

import random

import pytest

from quire.core.blocks import BlockPool


def key(n: int) -> tuple[int, bytes]:
    return (0, bytes([n]))


def take_all(pool: BlockPool) -> list[int]:
    return [pool.take()[0] for _ in range(pool.available)]


def test_pages_without_content_go_first_then_the_least_recently_released() -> None:
    pool = BlockPool(6)
    blocks = take_all(pool)
    for n in (1, 3, 4, 5):
        pool.publish(blocks[n], key(n))
    for n in (4, 1, 0, 5, 2, 3):  # 0 and 2 hold nothing
        pool.release(blocks[n])
    order = [pool.take() for _ in range(6)]
    assert [block for block, _ in order] == [blocks[n] for n in (2, 0, 4, 1, 5, 3)]
    assert [evicted for _, evicted in order] == [None, None, key(4), key(1), key(5), key(3)]
    assert pool.num_published == 0 and pool.available == 0


def test_a_held_page_is_never_taken_and_its_release_makes_it_recent() -> None:
    pool = BlockPool(3)
    blocks = take_all(pool)
    for n, block in enumerate(blocks):
        pool.publish(block, key(n))
        pool.release(block)
    pool.hold(blocks[0])
    assert (pool.available, pool.cached, pool.held) == (2, 2, 1)
    pool.release(blocks[0])
    assert [pool.take()[1] for _ in range(3)] == [key(1), key(2), key(0)]


def test_a_page_leaves_with_its_last_holder() -> None:
    pool = BlockPool(2)
    block, _ = pool.take()
    pool.hold(block)
    pool.release(block)
    assert pool.count(block) == 1 and pool.available == 1
    pool.release(block)
    assert pool.count(block) == 0 and pool.available == 2
    with pytest.raises(AssertionError, match="released more often than held"):
        pool.release(block)


def test_what_is_published_is_found_held_or_not_until_it_is_evicted() -> None:
    pool = BlockPool(1)
    block, _ = pool.take()
    assert pool.find(key(1)) is None
    pool.publish(block, key(1))
    assert pool.find(key(1)) == block and pool.key(block) == key(1) and pool.cached == 0
    pool.release(block)
    assert pool.find(key(1)) == block and pool.cached == 1
    assert pool.take() == (block, key(1))
    assert pool.find(key(1)) is None and pool.key(block) is None and pool.cached == 0


def test_the_first_page_with_a_content_stays_the_one_that_is_found() -> None:
    pool = BlockPool(2)
    first, second = take_all(pool)
    pool.publish(first, key(1))
    pool.publish(second, key(1))
    assert pool.find(key(1)) == first and pool.key(second) is None
    pool.publish(first, key(2))
    assert pool.key(first) == key(1) and pool.find(key(2)) is None, "a page has one content"
    pool.unpublish(second)
    assert pool.find(key(1)) == first, "it had nothing to forget"


def test_unpublished_pages_are_worthless_and_go_first() -> None:
    pool = BlockPool(3)
    blocks = take_all(pool)
    for n, block in enumerate(blocks):
        pool.publish(block, key(n))
    pool.unpublish(blocks[1])  # while it is held
    for block in blocks:
        pool.release(block)
    pool.unpublish(blocks[2])  # while it is cached
    assert (pool.cached, pool.num_published) == (1, 1)
    assert [pool.take() for _ in range(3)] == [(blocks[2], None), (blocks[1], None), (blocks[0], key(0))]


def test_an_unheld_page_that_is_published_is_the_most_recent() -> None:
    pool = BlockPool(2)
    first, second = take_all(pool)
    pool.publish(second, key(2))
    pool.release(first)
    pool.release(second)
    pool.publish(first, key(1))
    assert [pool.take()[1] for _ in range(2)] == [key(2), key(1)]


def test_clear_forgets_contents_and_keeps_holders() -> None:
    pool = BlockPool(3)
    blocks = take_all(pool)
    for n, block in enumerate(blocks):
        pool.publish(block, key(n))
    pool.release(blocks[0])
    pool.clear()
    assert (pool.num_published, pool.cached, pool.available, pool.held) == (0, 0, 1, 2)
    pool.check([blocks[1], blocks[2]])


def test_groups_with_the_same_hash_are_different_contents() -> None:
    pool = BlockPool(2)
    first, second = take_all(pool)
    pool.publish(first, (0, b"x"))
    pool.publish(second, (1, b"x"))
    assert pool.find((0, b"x")) == first and pool.find((1, b"x")) == second


@pytest.mark.parametrize("seed", range(5))
def test_random_use_agrees_with_plain_lists(seed: int) -> None:
    """Against a pool that is a list, in which every question is a search."""
    rng = random.Random(seed)
    pool = BlockPool(7)
    holders = list[int]()
    queue: list[int] = list(range(7))  # unheld pages, next victim first
    content = dict[int, tuple[int, bytes]]()
    for _ in range(1500):
        action = rng.choice("take take hold release release publish publish unpublish".split())
        block = rng.choice(holders) if holders and rng.random() < 0.7 else rng.randrange(7)
        if action == "take" and queue:
            expected = queue.pop(0)
            assert pool.take() == (expected, content.pop(expected, None))
            holders.append(expected)
        elif action == "hold" and (block in holders or block in content):
            pool.hold(block)
            holders.append(block)
            queue = [b for b in queue if b != block]
        elif action == "release" and block in holders:
            pool.release(block)
            holders.remove(block)
            if block not in holders:
                queue = [*queue, block] if block in content else [block, *queue]
        elif action == "publish":
            name = key(rng.randrange(12))
            pool.publish(block, name)
            if block not in content and name not in content.values():
                content[block] = name
                if block in queue:
                    queue = [*(b for b in queue if b != block), block]
        elif action == "unpublish":
            pool.unpublish(block)
            if content.pop(block, None) is not None and block in queue:
                queue = [block, *(b for b in queue if b != block)]
        pool.check(holders)
        assert pool.available == len(queue) and pool.held == len(set(holders))
        assert pool.cached == sum(b in content for b in queue)
        for n in range(12):
            assert pool.find(key(n)) == next((b for b, k in content.items() if k == key(n)), None)


def test_check_notices_a_lost_holder() -> None:
    pool = BlockPool(2)
    block, _ = pool.take()
    pool.check([block])
    with pytest.raises(AssertionError, match="differ from the holders"):
        pool.check([])
    with pytest.raises(AssertionError, match="differ from the holders"):
        pool.check([block, block])


def test_a_growing_pool_forgets_before_it_grows() -> None:
    pool = BlockPool(5, at_once=2)
    assert (pool.available, pool.held) == (5, 0)
    for number in range(6):  # one after another, each remembered
        block, evicted = pool.take()
        assert block < 2
        assert evicted == (None if number < 2 else (0, bytes([number - 2])))
        pool.publish(block, (0, bytes([number])))
        pool.release(block)
    held = [pool.take()[0] for _ in range(4)]
    assert sorted(held) == [0, 1, 2, 3], "a page beyond the first is used once all others are held"
    assert (pool.available, pool.held) == (1, 4)
    pool.check(held)
    pool.release(held[3])
    assert pool.take()[0] == held[3], "a page that was used once is used again"
    assert pool.take()[0] == 4
    assert pool.available == 0
    pool.check([*held, 4])
