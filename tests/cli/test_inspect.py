"""`quire inspect`: facts against a loaded model, and what keeps one from running."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import errors
from safetensors.torch import save_file

from quire.cli.main import cli
from quire.config.args import EngineArgs
from quire.config.files import headers
from quire.config.resolve import resolve
from quire.layers.groups import kv_groups
from quire.loading import load_model
from quire.loading.passes import build_model
from quire.loading.weights import wanted_tensors
from quire.ops.linear import quantize_weight
from quire.runner import estimate
from quire.runner.kv_store import page_bytes
from quire.runner.worker import KV_DTYPES

Make = Callable[..., Path]


def inspect(*argv: str) -> tuple[dict[str, Any], int]:
    result = CliRunner().invoke(cli, ["inspect", *argv, "--json"])
    assert result.output.startswith("{"), result.output
    return json.loads(result.output), result.exit_code


def write_weights(folder: Path, **changes: tuple[int, ...] | None) -> None:
    """Tensors as the configuration asks for, changed by name (`__` stands for a dot; None leaves one out)."""
    config = resolve(EngineArgs(model=str(folder), load_format="dummy"))
    shapes: dict[str, Any] = wanted_tensors(build_model(config, torch.float32))
    shapes |= {name.replace("__", "."): shape for name, shape in changes.items()}
    save_file({n: torch.zeros(s) for n, s in shapes.items() if s is not None}, folder / "model.safetensors")


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_sizes_equal_those_of_the_loaded_model(make_checkpoint: Make, quantization: str | None) -> None:
    folder = make_checkpoint(vocab_size=128, hidden_size=64, intermediate_size=128)
    write_weights(folder)
    options = [] if quantization is None else [f"--quantization={quantization}"]
    found, status = inspect(str(folder), "--dtype=float32", *options)
    assert status == 0 and found["problems"] == []
    config = resolve(EngineArgs(model=str(folder), dtype="float32"))
    count = sum(p.numel() for p in load_model(config, torch.device("cpu")).parameters())
    assert found["parameters"]["total"] == count == sum(found["parameters"]["parts"].values())
    assert set(found["parameters"]["parts"]) == {"embeddings", "attention", "mlp", "norms", "head"}
    page = page_bytes(config.model.arch, kv_groups(config.model.arch), 16, torch.float32)
    assert found["memory"]["kv_bytes_per_token"] * 16 == page
    assert found["memory"]["sequence_bytes"] == page * 256 // 16
    held = 4 * count
    if quantization is not None:
        bits = 8 if quantization == "int8" else 4
        model = load_model(resolve(EngineArgs(model=str(folder), dtype="float32")), torch.device("cpu"))
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in name:
                wide = (8, 0) if "lm_head" in name else (bits, 32 if bits == 4 else 0)
                made = quantize_weight(weight, *wide, dynamic=True)
                held -= weight.nbytes - made.q.nbytes - made.scale_NG.nbytes
    assert found["memory"]["weights_bytes"] == held


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_pages_are_those_of_the_store(make_checkpoint: Make, dtype: str) -> None:
    folder = make_checkpoint(
        architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=32, hidden_size=40, head_dim=10
    )
    config = resolve(EngineArgs(model=str(folder), load_format="dummy", kv_cache_dtype=dtype))
    groups = kv_groups(config.model.arch, config.model.max_model_len)
    assert estimate.page_bytes(config, groups) == page_bytes(config.model.arch, groups, 16, KV_DTYPES[dtype])


def test_the_demo_for_a_person_and_for_a_gpu() -> None:
    result = CliRunner().invoke(cli, ["inspect", "demo", "--gpu", "24G"])
    assert result.exit_code == 0, result.output
    for words in (
        "LlamaForCausalLM, implemented by quire",
        "on cuda",
        "5.80 M",
        "6.0 KiB a token",
        "chat template: default",
    ):
        assert words in result.output
    small = CliRunner().invoke(cli, ["inspect", "demo", "--gpu", "1M"])
    assert small.exit_code == 1 and "memory does not suffice" in small.output
    assert "not a size" in CliRunner().invoke(cli, ["inspect", "demo", "--gpu", "big"]).output
    assert "not both" in CliRunner().invoke(cli, ["inspect", "demo", "--model", "demo"]).output


def test_the_length_with_its_reason(make_checkpoint: Make) -> None:
    scaling = {"rope_type": "linear", "factor": 4.0}
    folder = make_checkpoint(rope_scaling=scaling)
    plan = inspect(str(folder), "--load-format=dummy")[0]["plan"]
    assert plan["max_model_len"] == 1024
    assert "256 positions of config.json times 4 by rope scaling 'linear'" in plan["max_model_len_reason"]
    plan = inspect(str(folder), "--load-format=dummy", "--max-model-len=100")[0]["plan"]
    assert plan["max_model_len_reason"].startswith("as asked for; the checkpoint allows 1024")
    window = make_checkpoint(name="w", architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=32)
    plan = inspect(str(window), "--load-format=dummy", "--disable-sliding-window")[0]["plan"]
    assert plan["max_model_len"] == 32 and "the sliding window" in plan["max_model_len_reason"]


def test_what_cannot_run_and_why(make_checkpoint: Make, tmp_path: Path) -> None:
    folder = make_checkpoint()
    assert "no *.safetensors or *.bin" in inspect(str(folder))[0]["problems"][0]
    found, status = inspect(str(folder / "config.json"))
    assert status == 0 and found["parameters"]["source"] == "config.json and the model's code"
    write_weights(folder, lm_head__weight=None, extra__weight=(2,))
    found, status = inspect(str(folder))
    assert status == 1
    assert "lacks lm_head.weight" in found["problems"][0] and "unexpected extra.weight" in found["problems"][0]
    write_weights(folder, lm_head__weight=(127, 32))
    assert "lm_head.weight has shape (127, 32)" in inspect(str(folder))[0]["problems"][0]
    (folder / "model.safetensors").write_bytes(b"\x00" * 20)
    assert "damaged or incomplete" in inspect(str(folder))[0]["problems"][0]
    assert "a checkpoint without a tokenizer" in inspect(str(folder))[0]["tokenizer"]["reason"]
    quantized = make_checkpoint(name="q", quantization_config={"quant_method": "awq"})
    found, status = inspect(str(quantized))
    assert status == 1 and "awq" in found["problems"][0] and found["architectures"] == ["LlamaForCausalLM"]
    unknown = make_checkpoint(name="u", architectures=["NobodyForCausalLM"], model_type=None)
    assert "no implementation of NobodyForCausalLM" in inspect(str(unknown), "--load-format=dummy")[0]["problems"][0]
    assert "does not exist" in CliRunner().invoke(cli, ["inspect", "./nowhere"]).output


def test_a_tied_head_is_counted_once(make_checkpoint: Make) -> None:
    folder = make_checkpoint(tie_word_embeddings=True)
    write_weights(folder, lm_head__weight=(128, 32))
    found, status = inspect(str(folder), "--dtype=float32")
    assert status == 0, found["problems"]
    model = load_model(resolve(EngineArgs(model=str(folder), dtype="float32")), torch.device("cpu"))
    assert found["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    write_weights(folder, lm_head__weight=(128, 32), model__embed_tokens__weight=None)
    assert inspect(str(folder))[1] == 0, "the head fills the table"


def test_a_model_of_the_hub_by_its_small_files(make_checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint()
    patterns: list[str] = []

    def snapshot(model: str, **kwargs: Any) -> str:
        patterns.extend(kwargs["allow_patterns"])
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)

    def unreachable(*args: Any, **kwargs: Any) -> Any:
        raise errors.OfflineModeIsEnabled("offline")

    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", unreachable)
    found, status = inspect("org/name")
    assert status == 0, found["problems"]
    assert found["parameters"]["source"] == "config.json and the model's code"
    assert not [p for p in patterns if "safetensors" in p or p.endswith(".bin")]
    write_weights(folder)
    stored = headers([folder / "model.safetensors"])
    (folder / "model.safetensors").unlink()

    file = SimpleNamespace(tensors={t.name: SimpleNamespace(dtype=t.dtype, shape=list(t.shape)) for t in stored})
    metadata = SimpleNamespace(files_metadata={"model.safetensors": file})
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda *args, **kwargs: metadata)
    found, status = inspect("org/name")
    assert status == 0 and found["parameters"]["source"] == "headers of the weight files on the Hub"
    assert found["parameters"]["total"] == sum(t.count for t in stored)


def test_pickled_weights_are_unknown_before_loading(make_checkpoint: Make) -> None:
    folder = make_checkpoint()
    write_weights(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    found, status = inspect(str(folder))
    assert status == 0 and found["parameters"]["source"] == "config.json and the model's code"


def test_the_estimate_imports_no_torch() -> None:
    code = "import sys, quire.runner.estimate; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "attention"),
        ("model.layers.0.input_layernorm.weight", "norms"),
        ("model.layers.0.post_attention_layernorm.weight", "norms"),
        ("model.layers.0.block_sparse_moe.experts.3.w1.weight", "mlp"),
        ("transformer.h.0.ln_1.bias", "norms"),
        ("transformer.h.0.mlp.c_fc.weight", "mlp"),
        ("transformer.wpe.weight", "embeddings"),
        ("model.decoder.layers.0.fc1.weight", "mlp"),
        ("lm_head.weight", "head"),
        ("something.else", "other"),
    ],
)
def test_parts_by_name(name: str, part: str) -> None:
    assert estimate.part_of(name) == part


def test_a_model_that_runs_from_transformers(tmp_path: Path) -> None:
    import transformers

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings = transformers.GPTNeoXConfig(**small, vocab_size=99, max_position_embeddings=128)
    model = transformers.GPTNeoXForCausalLM(settings)
    model.save_pretrained(tmp_path)
    found, status = inspect(str(tmp_path))
    assert status == 0, found["problems"]
    assert found["implementation"] == {"architecture": "GPTNeoXForCausalLM", "by": "transformers"}
    assert found["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert found["plan"]["max_model_len"] == 128
    found, status = inspect(str(tmp_path), "--model-impl=quire")
    assert status == 1 and "GPTNeoXForCausalLM" in found["problems"][0]


def test_an_encoder_keeps_nothing(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    size = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(**size, intermediate_size=32, max_position_embeddings=40)).save_pretrained(tmp_path)
    found, status = inspect(str(tmp_path), "--runner=pooling")
    assert status == 0 and found["implementation"] == {"architecture": "BertModel", "by": "transformers"}
    assert found["memory"]["kv_bytes_per_token"] == 0 and found["memory"]["sequences"] is None
    assert found["kv_cache"]["groups"] == []
    text = CliRunner().invoke(cli, ["inspect", str(tmp_path)]).output
    assert "KV cache      none" in text and "sequences" not in text


def test_a_body_of_quires_own_class(make_checkpoint: Make) -> None:
    found, _ = inspect(str(make_checkpoint(architectures=["LlamaModel"])), "--load-format=dummy")
    assert found["implementation"] == {"architecture": "LlamaModel", "by": "quire"}
