"""Parameters that are the file's own bytes: which they are, that they are right, and what becomes of their pages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from quire.layers.slots import walk_slots
from quire.loading import load_model
from quire.loading.mapped import _index, mapped_bytes
from tests.loading.test_loading import CPU, GPT2, LLAMA, config, llama_tensors, same

# The order of a file is that of the names, dtypes apart: gate_proj and up_proj are neighbours, q, k and v are not.
WIDE = {**LLAMA, "hidden_size": 64, "intermediate_size": 96}


def mapped(model: nn.Module) -> set[str]:
    return {f"{path}.{name}" for path, _, name, slot in walk_slots(model) if slot.mapped}


def in_file(tensor: Tensor, file: Path) -> bool:
    """Whether its memory is a mapping of the file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(x, 16) for x in line.split()[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            return line.endswith((str(file), f"{file} (deleted)"))
    return False


def load(folder: Path, raw: dict[str, Any] = WIDE, **options: Any) -> nn.Module:
    return load_model(config(folder, raw, **options), CPU)


def test_what_the_file_holds_as_it_is_is_not_copied(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    tensors = llama_tensors(WIDE)
    save_file(tensors, file)
    model = load(tmp_path)
    copied = {f"{path}.{name}" for path, _, name, _ in walk_slots(model)} - mapped(model)
    assert copied == {f"model.layers.{i}.self_attn.qkv_proj.weight" for i in (0, 1)}
    for path, module, name, slot in walk_slots(model):
        parameter = module.get_parameter(name)
        assert in_file(parameter, file) == slot.mapped
        assert torch.equal(parameter, torch.cat([tensors[part.name(path)] for part in slot.parts]))


def test_a_mapped_file_may_be_deleted_and_is_never_written(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(llama_tensors(WIDE), file)
    before = file.read_bytes()
    model, other = load(tmp_path), load(tmp_path)
    with torch.no_grad():
        model.get_parameter("lm_head.weight").zero_()
    assert file.read_bytes() == before
    assert other.get_parameter("lm_head.weight").any()
    file.unlink()
    head = other.get_parameter("lm_head.weight")
    assert torch.equal(head, llama_tensors(WIDE)["lm_head.weight"])
    assert in_file(head, file)


def test_shards_are_mapped_each_from_its_file(tmp_path: Path) -> None:
    tensors = llama_tensors(WIDE)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    save_file(tensors, whole / "model.safetensors")
    names = {name: f"model-0000{1 + ('up_proj' in name)}-of-00002.safetensors" for name in tensors}
    for file in sorted(set(names.values())):
        save_file({n: tensors[n] for n in tensors if names[n] == file}, parts / file)
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    one, other = load(whole), load(parts)
    assert same(one, other)
    torn = {f"model.layers.{i}.mlp.gate_up_proj.weight" for i in (0, 1)}
    assert mapped(one) - mapped(other) == torn, "gate_proj and up_proj are in two files"


@pytest.mark.parametrize("case", ["dtype", "transposed", "bin", "dummy", "unaligned", "prefix"])
def test_what_cannot_be_mapped_is_copied(tmp_path: Path, case: str) -> None:
    tensors = llama_tensors(WIDE)
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    usual = load(tmp_path)
    if case == "dtype":
        model = load(tmp_path, dtype="bfloat16")
        assert not mapped(model)
        assert torch.equal(model.get_parameter("lm_head.weight"), tensors["lm_head.weight"].bfloat16())
    elif case == "transposed":
        gpt2 = tmp_path / "gpt2"
        gpt2.mkdir()
        made = load(gpt2, GPT2, load_format="dummy")
        weights = {path + "." + name: module.get_parameter(name) for path, module, name, _ in walk_slots(made)}
        turned = {n: (t.t() if ".c_" in n and t.dim() == 2 else t).contiguous() for n, t in weights.items()}
        save_file(turned, gpt2 / "model.safetensors")
        model = load(gpt2, GPT2)
        assert same(model, made)
        assert "transformer.h.0.ln_1.weight" in mapped(model)
        assert not any(".c_" in name and "weight" in name for name in mapped(model))
    elif case == "bin":
        file.unlink()
        torch.save(tensors, tmp_path / "pytorch_model.bin")
        model = load(tmp_path)
        assert not mapped(model)
        assert same(model, usual)
    elif case == "dummy":
        assert not mapped(load(tmp_path, load_format="dummy"))
    elif case == "unaligned":
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        crooked = (length + 1).to_bytes(8, "little") + content[8 : 8 + length] + b" " + content[8 + length :]
        (tmp_path / "copy").mkdir()
        (tmp_path / "copy" / "model.safetensors").write_bytes(crooked)
        model = load(tmp_path / "copy")
        assert not mapped(model)
        assert same(model, usual)
    else:
        bare = tmp_path / "bare"
        bare.mkdir()
        save_file({name.removeprefix("model."): t for name, t in tensors.items()}, bare / "model.safetensors")
        model = load(bare)
        assert mapped(model) == mapped(usual)
        assert same(model, usual)


def test_bytes_that_stay_mapped(tmp_path: Path) -> None:
    tensors = llama_tensors(WIDE)
    save_file(tensors, tmp_path / "model.safetensors")
    model = load(tmp_path)
    copied = sum(t.nbytes for name, t in tensors.items() if any(f"{n}_proj" in name for n in ("q", "k", "v")))
    assert mapped_bytes(model) == sum(t.nbytes for t in tensors.values()) - copied
    before, table = mapped_bytes(model), model.get_parameter("model.embed_tokens.weight")
    model.get_submodule("model.embed_tokens").weight = None
    assert mapped_bytes(model) == before - table.nbytes


BROKEN: list[Any] = [
    {"data_offsets": [-96, -64]},  # of the right length, but in the header
    {"data_offsets": [64, 32]},
    {"data_offsets": [0, 1 << 40]},
    {"data_offsets": [0.0, 32.0]},
    {"data_offsets": [False, 32]},
    {"data_offsets": [0, 16, 32]},
    {"data_offsets": 32},
    {"shape": [-2, -4]},
    {"shape": [2.0, 4]},
    {"shape": ["2", 4]},
    {"shape": 8},
    {"shape": [3, 4]},
    {"dtype": ["F32"]},
    [],
    None,
]


@pytest.mark.parametrize("change", BROKEN, ids=str)
def test_a_header_that_is_not_as_it_should_be_maps_nothing(tmp_path: Path, change: Any) -> None:
    def write(entry: Any) -> Path:
        header = json.dumps({"a": entry, "__metadata__": {"format": "pt"}}).encode()
        file = tmp_path / "model.safetensors"
        file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
        return file

    good = {"dtype": "F32", "shape": [2, 4], "data_offsets": [32, 64]}
    assert [name for name, _ in _index(write(good))] == ["a"]
    assert _index(write({**good, **change} if isinstance(change, dict) else change)) == []


@pytest.mark.parametrize("header", [b"[" * 500_000, b'{"a": {', b"[]", b"\xff", b""], ids=lambda h: str(h[:8]))
def test_a_header_that_is_none_maps_nothing(tmp_path: Path, header: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    assert _index(file) == []
    file.write_bytes((1 << 40).to_bytes(8, "little") + header)
    assert _index(file) == []
    file.write_bytes(header[:3])
    assert _index(file) == []


def test_pages_of_a_weight_that_is_let_go_are_given_back(tmp_path: Path) -> None:
    """So that a model whose weights are quantized does not hold them twice."""
    raw = {**WIDE, "vocab_size": 40_000}
    save_file(llama_tensors(raw), tmp_path / "model.safetensors")
    model = load(tmp_path, raw)
    table = model.get_parameter("model.embed_tokens.weight")
    size, start = table.nbytes // 1024, table.data_ptr()
    assert table.sum().isfinite()
    assert resident(start) > 0.9 * size
    del table
    model.get_submodule("model.embed_tokens").weight = None
    assert resident(start) < 0.2 * size


def resident(address: int) -> int:
    """KiB that are resident of the mapping at an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            begin, end = (int(x, 16) for x in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "Rss:":
            return int(line.split()[1])
    return 0
