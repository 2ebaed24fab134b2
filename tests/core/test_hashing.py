"""Names of prefixes: equal exactly where the KV content is."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from quire.core.hashing import extend_hashes, root_hash
from quire.types.params import SamplingParams
from quire.types.request import Request


def hashes(tokens: list[int], upto: int | None = None, block_size: int = 4, **options: Any) -> list[bytes]:
    request = Request("a", tokens, SamplingParams(), 0, **options)
    out = list[bytes]()
    extend_hashes(out, root_hash(request), tokens, len(tokens) if upto is None else upto, block_size, request)
    return out


TOKENS = list(range(100, 120))


def test_only_full_blocks_have_names() -> None:
    assert [len(hashes(TOKENS, upto)) for upto in (0, 3, 4, 7, 8, 20)] == [0, 0, 1, 1, 2, 5]
    assert len(set(hashes(TOKENS))) == 5


def test_a_name_covers_everything_before_it_and_nothing_behind() -> None:
    for changed in range(20):
        tokens = [*TOKENS[:changed], 7, *TOKENS[changed + 1 :]]
        same = [a == b for a, b in zip(hashes(TOKENS), hashes(tokens), strict=True)]
        assert same == [j < changed // 4 for j in range(5)]


def test_equal_blocks_behind_different_prefixes_are_different() -> None:
    assert len(set(hashes([1, 2, 3, 4] * 5))) == 5


def test_tokens_are_not_run_together() -> None:
    assert hashes([1, 2, 3, 4]) != hashes([0x0201, 0x0403, 0, 0])
    assert hashes([258, 0, 0, 0]) != hashes([2, 1, 0, 0])
    assert hashes([2**31 - 1] * 4) != hashes([2**31 - 2] * 4)


@given(st.lists(st.integers(0, 2**31 - 1), max_size=40), st.lists(st.integers(0, 40), max_size=5), st.integers(1, 7))
def test_step_by_step_is_all_at_once(tokens: list[int], stops: list[int], block_size: int) -> None:
    request = Request("a", tokens, SamplingParams(), 0, cache_salt="s")
    out = list[bytes]()
    for upto in (*(min(stop, len(tokens)) for stop in sorted(stops)), len(tokens)):
        extend_hashes(out, root_hash(request), tokens, upto, block_size, request)
    assert out == hashes(tokens, block_size=block_size, cache_salt="s")


def test_salts_and_adapters_are_worlds_of_their_own() -> None:
    worlds = [
        hashes(TOKENS, **options)
        for options in ({}, {"cache_salt": "x"}, {"cache_salt": "y"}, {"lora_id": 1}, {"lora_id": 2, "cache_salt": "x"})
    ]
    assert len({name for world in worlds for name in world}) == 25
    assert len({root_hash(Request("a", [1], SamplingParams(), 0, cache_salt=s)) for s in ("", "1/", "/1", "1")}) == 4


def test_a_salt_cannot_pose_as_an_adapter() -> None:
    """The two are one string: neither can reach over into the other's part."""
    roots = {
        root_hash(Request("a", [1], SamplingParams(), 0, cache_salt=salt, lora_id=lora))
        for lora, salt in ((1, "2"), (1, "/2"), (12, ""), (0, "1/2"), (1, "1/2"))
    }
    assert len(roots) == 5


def test_an_item_changes_the_blocks_that_it_reaches_into_and_those_behind() -> None:
    plain = hashes(TOKENS)
    items = hashes(TOKENS, item_hashes=((6, 4, b"image"),))
    assert [a == b for a, b in zip(plain, items, strict=True)] == [True, False, False, False, False]
    # its content, its place and its reach matter
    names = {items[2]}
    for item in ((6, 4, b"other"), (5, 4, b"image"), (7, 4, b"image"), (2, 8, b"image")):
        names.add(hashes(TOKENS, item_hashes=(item,))[2])
    assert len(names) == 5
    assert hashes(TOKENS, item_hashes=((4, 4, b"image"),))[0] == plain[0]
    assert hashes(TOKENS, item_hashes=((8, 0, b"image"),)) == plain, "an item without tokens is nowhere"


def test_two_items_in_a_block_are_told_apart_by_place() -> None:
    one = hashes(TOKENS, item_hashes=((0, 1, b"a"), (2, 1, b"b")))
    other = hashes(TOKENS, item_hashes=((0, 1, b"b"), (2, 1, b"a")))
    assert one[0] != other[0]
