"""KV groups: equal layer counts, every layer once."""

from __future__ import annotations

import dataclasses

import pytest

from quire.config.arch import ModelArch, arch_from_hf
from quire.layers.groups import MAX_GROUPS, kv_groups


def arch(*windows: int | None) -> ModelArch:
    base = arch_from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 8,
            "num_attention_heads": 2,
            "num_hidden_layers": len(windows),
            "max_position_embeddings": 100,
        }
    )
    return dataclasses.replace(base, sliding_windows=windows)


def test_alike_layers_are_one_group() -> None:
    (group,) = kv_groups(arch(None, None, None))
    assert (group.kind, group.layers, group.window) == ("full", (0, 1, 2), None)
    (group,) = kv_groups(arch(5, 5))
    assert (group.kind, group.layers, group.window) == ("sliding", (0, 1), 5)


def test_mixed_layers_are_groups_of_equal_count() -> None:
    groups = kv_groups(arch(4, 4, None, 4, 4, None))
    assert [(g.kind, g.layers) for g in groups] == [("sliding", (0, 1)), ("sliding", (3, 4)), ("full", (2, 5))]


@pytest.mark.parametrize("windows", [(None, 3, 3, None, 7, 7), (None, 3, 3, 3, 3), (2, None) * 3])
def test_every_layer_is_in_one_group(windows: tuple[int | None, ...]) -> None:
    groups = kv_groups(arch(*windows))
    assert sorted(layer for group in groups for layer in group.layers) == list(range(len(windows)))
    assert len({len(group.layers) for group in groups}) == 1
    for group in groups:
        assert {windows[layer] for layer in group.layers} == {group.window}


def test_a_window_that_is_never_outgrown_is_full() -> None:
    (group,) = kv_groups(arch(64, None), max_len=64)
    assert group.kind == "full"
    assert len(kv_groups(arch(63, None), max_len=64)) == 2


def test_too_many_groups_become_one() -> None:
    (group,) = kv_groups(arch(None, *[5] * MAX_GROUPS))
    assert (group.kind, len(group.layers)) == ("full", MAX_GROUPS + 1)
