"""What Transformers does not read itself: older names of checkpoints, and variants of MPT that its code leaves out. The
judge is a model that computes the same under another name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import parity_harness as harness
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quire.layers.linear import Matrix
from quire.loading import load_model
from quire.loading.passes import Finish, LoadContext
from quire.ops.dispatch import Binder
from quire.types.errors import ClientError

CPU = torch.device("cpu")
TOKENS = [5, 17, 90, 4, 4, 33, 120, 8, 61, 7, 198, 2, 45]


def rewrite(
    folder: Path, to: Path, config: Callable[[dict[str, Any]], dict[str, Any]], name: Callable[[str], str] = str
) -> Path:
    """The checkpoint under other names."""
    to.mkdir()
    known = json.loads((folder / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config(known)))
    tensors = {name(key): tensor for key, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, to / "model.safetensors")
    return to


def logits(folder: Path, ops: dict[str, str] | None = None) -> Tensor:
    config = harness.config_for(folder)
    model = load_model(config, CPU, Binder(CPU, torch.float32, ops))
    paged = harness.PagedRun(model, config.model.arch)
    first = paged.step([("a", TOKENS[:8])])["a"]
    return torch.cat([first, *(paged.step([("a", [token])])["a"] for token in TOKENS[8:])])


def check(folder: Path, judge: Any) -> None:
    expected = judge.logits(TOKENS)
    for ops in (None, {"*": "reference"}):
        assert torch.allclose(logits(folder, ops), expected, atol=1e-5 * float(expected.max() - expected.min()))


OLD = {"num_attention_heads": "n_head", "num_hidden_layers": "n_layer", "num_kv_heads": "n_head_kv"}


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("RefinedWebModel", {"num_attention_heads": 3}),
        ("RefinedWebModel", {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
        ("RefinedWeb", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ],
)
def test_falcon_by_its_first_names(
    checkpoint: Callable[..., Path], tmp_path: Path, kind: str, overrides: dict[str, Any]
) -> None:
    folder = checkpoint("falcon", **overrides)

    def older(config: dict[str, Any]) -> dict[str, Any]:
        kept = ("vocab_size", "hidden_size", "alibi", "multi_query", "parallel_attn", "bias", "layer_norm_epsilon")
        named = {old: config[new] for new, old in OLD.items() if new != "num_kv_heads" or kind == "RefinedWeb"}
        return {"architectures": ["RWForCausalLM"], "model_type": kind, **{k: config[k] for k in kept}, **named}

    check(rewrite(folder, tmp_path / "old", older), harness.Judge(folder))


def test_mpt_by_its_first_name(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("mpt")
    renamed = rewrite(folder, tmp_path / "old", lambda config: {**config, "architectures": ["MPTForCausalLM"]})
    check(renamed, harness.Judge(folder))


def test_mpt_with_learned_positions_and_biases(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Which is GPT-2 by other names."""
    folder = checkpoint("gpt2", activation_function="gelu")
    names = {
        "h.": "blocks.", "ln_1": "norm_1", "ln_2": "norm_2", "ln_f": "norm_f", "attn.c_attn": "attn.Wqkv",
        "attn.c_proj": "attn.out_proj", "mlp.c_fc": "ffn.up_proj", "mlp.c_proj": "ffn.down_proj",
    }  # fmt: skip

    def name(key: str) -> str:
        for old, new in names.items():
            key = key.replace(old, new)
        return key

    def config(gpt2: dict[str, Any]) -> dict[str, Any]:
        sizes = {"d_model": gpt2["n_embd"], "n_heads": gpt2["n_head"], "n_layers": gpt2["n_layer"], "max_seq_len": 512}
        rest = {"vocab_size": gpt2["vocab_size"], "no_bias": False, "attn_config": {"alibi": False}}
        return {"architectures": ["MPTForCausalLM"], "model_type": "mpt", **sizes, **rest}

    renamed = rewrite(folder, tmp_path / "mpt", config, name)
    tensors = load_file(renamed / "model.safetensors")
    turned = {key: x.t().contiguous() if "blocks" in key and x.dim() == 2 else x for key, x in tensors.items()}
    save_file(turned, renamed / "model.safetensors")
    check(renamed, harness.Judge(folder))


def test_mpt_with_norms_of_q_and_k_and_with_shared_keys(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """The judge computes both behind Wqkv: a norm of q and of k, and one key and value head in the place of four."""
    folder = checkpoint("mpt")
    tensors = load_file(folder / "model.safetensors")
    judge = harness.Judge(folder)
    for layer, block in enumerate(judge.model.transformer.blocks):
        path = f"transformer.blocks.{layer}.attn"
        norms = [nn.LayerNorm(size, bias=False) for size in (48, 12)]
        for norm, letter in zip(norms, "qk", strict=True):
            torch.nn.init.normal_(norm.weight, 1.0, 0.3)
            tensors[f"{path}.{letter}_ln.weight"] = norm.weight.detach().clone()
        tensors[f"{path}.Wqkv.weight"] = tensors[f"{path}.Wqkv.weight"][: 48 + 2 * 12].clone()

        def shared(module: nn.Module, given: Any, out: Tensor, norms: list[nn.LayerNorm] = norms) -> Tensor:
            q, k, v = out[..., : 48 + 2 * 12].split([48, 12, 12], -1)
            return torch.cat((norms[0](q), *[norms[1](k)] * 4, *[v] * 4), -1)

        block.attn.Wqkv.register_forward_hook(shared)
    settings = {"qk_ln": True, "attn_type": "multiquery_attention"}
    renamed = rewrite(folder, tmp_path / "qk", lambda config: {**config, "attn_config": settings})
    save_file(tensors, renamed / "model.safetensors")
    check(renamed, judge)


def test_longrope_within_the_original_length(checkpoint: Callable[..., Path]) -> None:
    """Where no sequence may be longer, the short factors hold for all, as in Transformers."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.1] * 6, "long_factor": [4.0] * 6}
    folder = checkpoint("phi3", rope_parameters=rope, original_max_position_embeddings=100)
    expected = harness.Judge(folder).logits(TOKENS)
    for longest, same in ((100, True), (101, False)):
        config = harness.config_for(folder, longest)
        paged = harness.PagedRun(load_model(config, CPU), config.model.arch)
        assert torch.allclose(paged.step([("a", TOKENS)])["a"], expected, atol=harness.TOLERANCE) == same


@pytest.mark.parametrize("arch", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("scheme", ["int8", "int4", "int8_weight_only", "int4_weight_only"])
def test_experts_are_quantized_and_routers_are_not(checkpoint: Callable[..., Path], arch: str, scheme: str) -> None:
    """By all implementations alike; with whole activations as the same model of weights that were rounded so."""
    config = harness.config_for(checkpoint(arch, hidden_size=64, intermediate_size=96, moe_intermediate_size=64))
    config = replace(config, model=replace(config.model, quantization=scheme))
    runs: list[Tensor] = []
    for ops in (None, {"*": "reference"}):
        model = load_model(config, CPU, Binder(CPU, torch.float32, ops))
        mixture = model.get_submodule("model.layers.0.mlp")
        assert isinstance(mixture.gate.weight, Tensor)
        assert not isinstance(mixture.gate_up.weight, Tensor) and not isinstance(mixture.down.weight, Tensor)
        runs.append(harness.PagedRun(model, config.model.arch).step([("a", TOKENS)])["a"])
    if scheme.endswith("weight_only"):
        for module in model.modules():
            if isinstance(module, Matrix) and not isinstance(weight := module.weight, Tensor):
                module.scheme, module.weight = None, nn.Parameter(weight.dense(), requires_grad=False)
        Finish()(model, LoadContext(config, CPU, torch.float32, Binder(CPU, torch.float32)))
        runs[0] = harness.PagedRun(model, config.model.arch).step([("a", TOKENS)])["a"]
    assert torch.allclose(*runs, atol=1e-4 if scheme.endswith("weight_only") else 0.02 * float(runs[1].std()))


def test_windows_in_both_directions_are_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("gemma3")
    both = rewrite(folder, tmp_path / "both", lambda config: {**config, "use_bidirectional_attention": True})
    with pytest.raises(ClientError, match="use_bidirectional_attention=True is not in quire"):
        harness.config_for(both)
