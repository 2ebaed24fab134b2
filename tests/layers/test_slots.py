"""Weight slots: names, places, slices."""

from __future__ import annotations

import torch
from torch import nn

from quire.layers.linear import Embedding, Linear, LMHead, MergedLinear
from quire.layers.slots import Part, walk_slots


def test_names_follow_the_path_and_climb_it() -> None:
    assert Part("weight", (1,)).name("model.norm") == "model.norm.weight"
    assert Part("../q_proj.weight", (1,)).name("layers.0.attn.qkv_proj") == "layers.0.attn.q_proj.weight"
    assert Part("../../q_norm.weight", (1,)).name("layers.0.attn.inner.q_norm") == "layers.0.attn.q_norm.weight"
    assert Part("weight", (1,)).name("") == "weight"


def fill(module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    for path, owner, name, slot in walk_slots(module):
        parameter = nn.Parameter(torch.full(owner.get_parameter(name).shape, torch.nan), requires_grad=False)
        setattr(owner, name, parameter)
        for part in slot.parts:
            part.fill(parameter, tensors[part.name(path)])


class Holder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


def test_merged_parts_land_side_by_side() -> None:
    tensors = {name: torch.randn(size, 3) for name, size in (("q.weight", 4), ("k.weight", 2))}
    tensors |= {"q.bias": torch.randn(4), "k.bias": torch.randn(2)}
    merged = MergedLinear(3, {"q": 4, "k": 2}, bias=True)
    fill(Holder(merged), tensors)
    x = torch.randn(5, 3)
    q, k = merged(x)
    assert torch.allclose(q, x @ tensors["q.weight"].t() + tensors["q.bias"], atol=1e-6)
    assert torch.allclose(k, x @ tensors["k.weight"].t() + tensors["k.bias"], atol=1e-6)


def test_a_packed_transposed_tensor_is_cut_into_its_parts() -> None:
    tensors = {"inner.weight": torch.randn(3, 6), "inner.bias": torch.randn(6)}
    packed = MergedLinear(3, {"q": 4, "k": 2}, bias=True, packed=True, transposed=True)
    fill(Holder(packed), tensors)
    x = torch.randn(5, 3)
    expected = x @ tensors["inner.weight"] + tensors["inner.bias"]
    assert torch.allclose(packed.merged(x), expected, atol=1e-6)
    assert torch.allclose(packed(x)[1], expected[:, 4:], atol=1e-6)


def test_a_shard_is_a_matter_of_numbers() -> None:
    """What a shard pass will do: half the rows of each part, read as a slice, nothing else changed."""
    full = torch.randn(4, 3)
    part = Part("w", (4, 3), start=1, size=2, take=(slice(2, 4), slice(None)))
    parameter = torch.zeros(5, 3)
    part.fill(parameter, full)
    assert torch.equal(parameter[1:3], full[2:4])
    assert not parameter[[0, 3, 4]].any()


def test_tied_head_and_offset_embedding() -> None:
    embed = Embedding(7, 4, offset=2)
    fill(embed, {"weight": torch.randn(9, 4)})
    head = LMHead(4, 9, tied=embed)
    assert torch.equal(embed(torch.tensor([0, 6])), embed.weight[[2, 8]])
    assert not list(walk_slots(head))
    logits = head(torch.randn(2, 4).to(torch.float32))
    assert logits.shape == (2, 9)
    assert logits.dtype == torch.float32


def test_split_marks_are_there_for_the_shard_pass() -> None:
    assert Linear(2, 3, split="rows").split == "rows"
    assert MergedLinear(2, {"a": 1}, split="heads").split == "heads"
