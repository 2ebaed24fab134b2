"""Checkpoints of every format into a model, and what is said when they do not fit."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from quire.config.arch import arch_from_hf
from quire.config.schema import (
    CacheConfig,
    Config,
    DeviceConfig,
    LoadConfig,
    ModelConfig,
    ObservabilityConfig,
    ParallelConfig,
    SchedulerConfig,
)
from quire.layers.slots import Part
from quire.loading import load_model
from quire.loading.passes import passes
from quire.loading.weights import READERS
from quire.types.errors import ClientError

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 11,
    "max_position_embeddings": 32,
}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "n_embd": 8,
    "n_layer": 1,
    "n_head": 2,
    "vocab_size": 11,
    "n_positions": 32,
}
CPU = torch.device("cpu")


def config(
    folder: Path, raw: dict[str, Any], load_format: str = "auto", dtype: str = "float32", seed: int = 0
) -> Config:
    arch = arch_from_hf(raw)
    model = ModelConfig(
        model=str(folder),
        path=folder,
        tokenizer="",
        tokenizer_mode="auto",
        tokenizer_revision=None,
        skip_tokenizer_init=True,
        trust_remote_code=False,
        dtype=dtype,
        seed=seed,
        max_model_len=32,
        arch=arch,
    )
    return Config(
        model=model,
        cache=CacheConfig(),
        scheduler=SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=32),
        parallel=ParallelConfig(),
        load=LoadConfig(load_format=load_format),
        device=DeviceConfig(),
        observability=ObservabilityConfig(),
    )


def llama_tensors(raw: dict[str, Any] = LLAMA, **changes: Tensor | None) -> dict[str, Tensor]:
    """A whole checkpoint's tensors; a change of None leaves one out."""
    torch.manual_seed(0)
    d, f, v = raw["hidden_size"], raw["intermediate_size"], raw["vocab_size"]
    tensors: dict[str, Tensor | None] = {"model.embed_tokens.weight": torch.randn(v, d)}
    tensors |= {"model.norm.weight": torch.randn(d), "lm_head.weight": torch.randn(v, d)}
    for i in range(raw["num_hidden_layers"]):
        at = f"model.layers.{i}"
        for name, size in (("q", d), ("k", d // 2), ("v", d // 2), ("o", d)):
            tensors[f"{at}.self_attn.{name}_proj.weight"] = torch.randn(size, d)
        for name, shape in (("gate", (f, d)), ("up", (f, d)), ("down", (d, f))):
            tensors[f"{at}.mlp.{name}_proj.weight"] = torch.randn(*shape)
        for name in ("input", "post_attention"):
            tensors[f"{at}.{name}_layernorm.weight"] = torch.randn(d)
    return {name: tensor for name, tensor in {**tensors, **changes}.items() if tensor is not None}


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.named_parameters(), other.named_parameters(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Callable[..., nn.Module]]:
    def run(tensors: dict[str, Tensor] | None = None, raw: dict[str, Any] = LLAMA, **kwargs: Any) -> nn.Module:
        if tensors is not None:
            save_file(tensors, tmp_path / "model.safetensors")
        return load_model(config(tmp_path, raw, **kwargs), CPU)

    yield run


def test_every_tensor_lands_in_its_place(load: Callable[..., nn.Module]) -> None:
    tensors = llama_tensors()
    model = load(tensors)
    qkv = model.get_parameter("model.layers.1.self_attn.qkv_proj.weight")
    parts = [tensors[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(qkv, torch.cat(parts))
    assert torch.equal(model.get_parameter("lm_head.weight"), tensors["lm_head.weight"])
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in tensors.values())


def test_sharded_and_bin_files_give_the_same_model(tmp_path: Path, load: Callable[..., nn.Module]) -> None:
    tensors = llama_tensors()
    whole = load(tensors)
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    sharded, pickled, mapped = tmp_path / "sharded", tmp_path / "bin", tmp_path / "bin-index"
    for folder in (sharded, pickled, mapped):
        folder.mkdir()
    for file, inside in shards.items():
        save_file({name: tensors[name] for name in inside}, sharded / file)
        torch.save({name: tensors[name] for name in inside}, mapped / f"{file}.bin")
    index = {name: file for file, inside in shards.items() for name in inside}
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    index = {name: f"{file}.bin" for name, file in index.items()}
    (mapped / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    torch.save(tensors, pickled / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    for folder in (sharded, pickled, mapped):
        assert same(load_model(config(folder, LLAMA), CPU), whole)
    with pytest.raises(ClientError, match=r"no \*\.bin file"):
        load_model(config(sharded, LLAMA, load_format="pt"), CPU)
    (sharded / "b.safetensors").unlink()
    with pytest.raises(ClientError, match=r"lacks b\.safetensors, which model\.safetensors\.index\.json names"):
        load_model(config(sharded, LLAMA), CPU)


def test_copies_run_beside_each_other_but_few_wait_and_the_first_error_counts(
    load: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill, running, most, taken = Part.fill, 0, 0, 0
    lock, several = threading.Lock(), threading.Event()

    def slow(self: Part, parameter: Tensor, tensor: Tensor) -> None:
        nonlocal running, most, taken
        with lock:
            running, taken = running + 1, taken + 1
            most = max(most, running)
            if running > 1:
                several.set()
        several.wait(10)
        fill(self, parameter, tensor)
        with lock:
            running -= 1

    monkeypatch.setattr(Part, "fill", slow)
    load(llama_tensors(), dtype="bfloat16")
    assert 2 <= most <= READERS and taken == len(llama_tensors())

    def broken(self: Part, parameter: Tensor, tensor: Tensor) -> None:
        if self.source != "weight":
            time.sleep(0.01)
            raise RuntimeError(f"the device refuses {self.source}")

    monkeypatch.setattr(Part, "fill", broken)
    with pytest.raises(RuntimeError) as e:
        load(dtype="bfloat16")
    assert str(e.value) == "the device refuses ../gate_proj.weight", "by the order in the file"


def test_weights_are_cast_on_load(load: Callable[..., nn.Module]) -> None:
    tensors = llama_tensors()
    model = load({name: tensor.to(torch.float16) for name, tensor in tensors.items()}, dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.get_parameter("lm_head.weight"), tensors["lm_head.weight"].half().bfloat16())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.norm.weight": None}, r"lacks model\.norm\.weight: config"),
        ({"model.layers.0.self_attn.k_proj.weight": None}, r"lacks model\.layers\.0\.self_attn\.k_proj\.weight"),
        ({"model.extra.weight": torch.zeros(2)}, r"has unexpected model\.extra\.weight"),
        ({"model.layers.0.self_attn.q_proj.bias": torch.zeros(8)}, r"has unexpected .*q_proj\.bias"),
        (
            {"model.norm.weight": torch.zeros(9)},
            r"model\.norm\.weight has shape \(9,\) but config\.json asks for \(8,\)",
        ),
        ({"model.norm.weight": torch.zeros(8, dtype=torch.int8)}, r"stored as int8: this checkpoint is quantized"),
    ],
)
def test_what_does_not_fit_is_named(
    load: Callable[..., nn.Module], changes: dict[str, Tensor | None], message: str
) -> None:
    with pytest.raises(ClientError, match=message) as error:
        load(llama_tensors(**changes))  # pyright: ignore[reportArgumentType]
    assert "\n" not in str(error.value)


def test_long_lists_are_cut(load: Callable[..., nn.Module]) -> None:
    with pytest.raises(ClientError, match=r"and \d+ more"):
        load({"model.norm.weight": torch.zeros(8)})


def test_computed_tensors_in_a_checkpoint_are_harmless(load: Callable[..., nn.Module]) -> None:
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}
    assert same(load(llama_tensors(**frequencies)), load(llama_tensors()))


def test_a_tied_head_in_the_checkpoint(load: Callable[..., nn.Module]) -> None:
    tied = {**LLAMA, "tie_word_embeddings": True}
    tensors = llama_tensors()
    embed = tensors["model.embed_tokens.weight"]
    for head in (None, embed.clone()):
        model = load(llama_tensors(**{"lm_head.weight": head}), tied)
        assert model.get_parameter("lm_head.weight") is model.get_parameter("model.embed_tokens.weight")
        assert torch.equal(model.get_parameter("lm_head.weight"), embed)
    only_head = load(llama_tensors(**{"model.embed_tokens.weight": None}), tied)
    assert torch.equal(only_head.get_parameter("model.embed_tokens.weight"), tensors["lm_head.weight"])
    differing = load(tensors, tied)
    assert torch.equal(differing.get_parameter("lm_head.weight"), tensors["lm_head.weight"])
    assert torch.equal(differing.get_parameter("model.embed_tokens.weight"), embed)


def test_gpt2_with_and_without_its_prefix_and_masks(tmp_path: Path) -> None:
    reference = load_model(config(tmp_path, GPT2, load_format="dummy"), CPU)
    tensors = {}
    for name, parameter in reference.named_parameters():
        turned = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        tensors[name] = parameter.t().contiguous() if turned else parameter.clone()
    for prefix in ("transformer.", ""):
        folder = tmp_path / (prefix or "bare")
        folder.mkdir()
        masks = {f"{prefix}h.0.attn.bias": torch.ones(1, 1, 4, 4), f"{prefix}h.0.attn.masked_bias": torch.tensor(-1e4)}
        named = {prefix + name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        save_file({**named, **masks}, folder / "model.safetensors")
        assert same(load_model(config(folder, GPT2), CPU), reference)


def test_opt_without_its_prefix(tmp_path: Path) -> None:
    raw = {
        "architectures": ["OPTForCausalLM"],
        "hidden_size": 8,
        "ffn_dim": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 11,
        "max_position_embeddings": 32,
    }
    reference = load_model(config(tmp_path, raw, load_format="dummy"), CPU)
    tensors: dict[str, Tensor] = {"decoder.version": torch.tensor([3.0])}
    for name, parameter in reference.named_parameters():
        parts = zip("qkv", parameter.chunk(3), strict=True) if "qkv_proj" in name else [("", parameter)]
        for letter, part in parts:
            tensors[name.removeprefix("model.").replace("qkv_proj", f"{letter}_proj")] = part.clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert same(load_model(config(tmp_path, raw), CPU), reference)


def test_dummy_weights_are_small_seeded_and_never_zero(load: Callable[..., nn.Module]) -> None:
    model = load(load_format="dummy", seed=3)
    assert same(model, load(load_format="dummy", seed=3))
    assert not same(model, load(load_format="dummy", seed=4))
    for name, parameter in model.named_parameters():
        assert parameter.abs().min() > 0
        around = 1.0 if "norm" in name else 0.0
        assert (parameter - around).abs().max() < 0.2


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", [b"", b"version https://git-lfs", b"\x80\x02}q\x00."])
def test_a_damaged_file_is_named(tmp_path: Path, file: str, content: bytes) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ClientError, match=r"damaged or incomplete|lacks") as error:
        load_model(config(tmp_path, LLAMA), CPU)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(llama_tensors(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ClientError, match=r"model\.safetensors cannot be read"):
        load_model(config(tmp_path, LLAMA), CPU)


def test_no_weights_and_unknown_words(tmp_path: Path) -> None:
    with pytest.raises(ClientError, match=r"no \*\.safetensors or \*\.bin file .* load_format='dummy'"):
        load_model(config(tmp_path, LLAMA), CPU)
    with pytest.raises(ClientError, match="load_format 'gguf' is not known"):
        load_model(config(tmp_path, LLAMA, load_format="gguf"), CPU)
    with pytest.raises(ClientError, match="dtype 'float8' is not known"):
        load_model(config(tmp_path, LLAMA, dtype="float8"), CPU)
    with pytest.raises(ClientError, match="activation 'sine' is not supported"):
        load_model(config(tmp_path, {**LLAMA, "hidden_act": "sine"}), CPU)
    with pytest.raises(ClientError, match="no implementation of LlamaForCausalML"):
        load_model(config(tmp_path, {**LLAMA, "architectures": ["LlamaForCausalML"]}), CPU)


def test_passes_come_in_the_order_of_the_design() -> None:
    assert [name for name, _ in passes()] == ["stage", "shard", "quantize", "materialise", "load", "finish"]
