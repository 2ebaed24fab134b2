"""Moves of whole pages against a dict of pages, and which tensor a layer writes to."""

from __future__ import annotations

import random

import pytest
import torch

from quire.runner.kv_store import KVStore, page_bytes
from quire.types.kv import KVGroup

from .plans import make_plan, tiny_arch

FULL = (KVGroup("full", (0, 1)),)
MIX = (KVGroup("sliding", (0, 1), 5), KVGroup("full", (2,)))


def make(groups: tuple[KVGroup, ...] = FULL, blocks: int = 6, host: int = 5) -> KVStore:
    arch = tiny_arch(sum(len(group.layers) for group in groups))
    store = KVStore(arch, groups, blocks, host, 4, torch.float32, torch.device("cpu"))
    for t, tensor in enumerate(store.tensors):
        for page in range(blocks):
            tensor[0, page], tensor[1, page] = 100 * t + page, -100 * t - page
    return store


def pages(tensor: torch.Tensor) -> list[int]:
    """The number that each page is full of (keys; values are its negative)."""
    assert torch.equal(tensor[0], -tensor[1])
    flat = tensor[0].flatten(1)
    assert (flat == flat[:, :1]).all(), "a page was torn apart"
    return [int(n) for n in flat[:, 0]]


def move(store: KVStore, swap_out=(), swap_in=(), copies=()) -> None:
    plan = make_plan(swap_out=swap_out, swap_in=swap_in, copies=copies, fence=0)
    store.move(plan)


def test_pages_move_in_the_order_out_in_copies() -> None:
    """One plan: a page goes to the host, comes back elsewhere, and is copied on; its old place is filled meanwhile."""
    store = make()
    move(store, swap_out=[(5, 0)])
    move(store, swap_out=[(1, 2)], swap_in=[(2, 3), (0, 1)], copies=[(3, 4), (1, 2)])
    for t, tensor in enumerate(store.tensors):
        assert pages(tensor) == [100 * t + n for n in (0, 5, 5, 1, 1, 5)]


def test_lists_read_all_sources_before_they_write() -> None:
    store = make()
    move(store, copies=[(0, 1), (1, 2), (2, 0)])
    assert pages(store.tensors[0]) == [2, 0, 1, 3, 4, 5], "a chain and a cycle"
    move(store, swap_out=[(0, 0), (1, 1), (2, 2)])
    move(store, swap_in=[(2, 0), (0, 1), (1, 1 + 1)])
    assert pages(store.tensors[0]) == [1, 2, 0, 3, 4, 5]


def test_one_page_may_be_copied_to_many() -> None:
    store = make()
    move(store, swap_out=[(2, 0), (2, 4)], copies=[(3, 0), (3, 1), (3, 5)])
    move(store, swap_in=[(4, 2), (4, 3)])
    assert pages(store.tensors[1]) == [103, 103, 102, 102, 104, 103]


def test_nothing_moves_where_nothing_is_asked() -> None:
    store = make(host=0)
    move(store)
    assert pages(store.tensors[0]) == list(range(6))


@pytest.mark.parametrize("seed", range(10))
def test_random_moves_agree_with_a_dict(seed: int) -> None:
    rng = random.Random(seed)
    store = make(MIX)
    device, host = dict(enumerate(range(6))), dict.fromkeys(range(5), 0)

    def pairs(sources: dict[int, int], targets: dict[int, int]) -> list[tuple[int, int]]:
        to = rng.sample(sorted(targets), rng.randint(0, 4))
        return [(rng.choice(sorted(sources)), target) for target in to]

    for _ in range(20):
        swap_out, swap_in, copies = pairs(device, host), pairs(host, device), pairs(device, device)
        move(store, swap_out, swap_in, copies)
        for moves, source, target in ((swap_out, device, host), (swap_in, host, device), (copies, device, device)):
            target.update({dst: source[src] for src, dst in moves})
        # the host's pages started as zeros, which each tensor shows as zeros
        right = [device[page] for page in range(6)]
        assert pages(store.tensors[0]) == right
        assert [n % 100 for n in pages(store.tensors[1])] == right


def test_each_layer_has_its_groups_place_in_the_shared_tensors() -> None:
    store = make(MIX)
    assert len(store.tensors) == 2
    assert [group for group, _ in store.layers] == [0, 0, 1]
    assert [next(i for i, t in enumerate(store.tensors) if t is tensor) for _, tensor in store.layers] == [0, 1, 0]


def test_a_page_costs_what_its_tensors_do() -> None:
    for groups in (FULL, MIX):
        for dtype in (torch.float32, torch.bfloat16, torch.int8):
            arch = tiny_arch(sum(len(group.layers) for group in groups))
            store = KVStore(arch, groups, 7, 0, 4, dtype, torch.device("cpu"))
            total = sum(tensor.numel() * tensor.element_size() for tensor in store.tensors)
            assert total == 7 * page_bytes(arch, groups, 4, dtype)
            assert all((tensor == 0).all() for tensor in store.tensors)


@pytest.mark.gpu
def test_a_device_moves_pages_like_the_host() -> None:
    arch, device = tiny_arch(2), torch.device("cuda")
    store = KVStore(arch, FULL, 6, 5, 4, torch.float32, device)
    for page in range(6):
        for tensor in store.tensors:
            tensor[0, page], tensor[1, page] = page, -page
    move(store, swap_out=[(5, 0)])
    move(store, swap_out=[(1, 2)], swap_in=[(2, 3), (0, 1)], copies=[(3, 4), (1, 2)])
    assert pages(store.tensors[0].cpu()) == [0, 5, 5, 1, 1, 5]
