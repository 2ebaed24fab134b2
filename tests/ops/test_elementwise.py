"""Norms, activations and rotary angles against Transformers' own formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from quire.config.arch import arch_from_hf
from quire.ops.activation import ACTIVATIONS, activation, gated_activation
from quire.ops.norm import layer_norm, rms_norm
from quire.ops.rotary import rotary, rotary_table

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", sorted(ACTIVATIONS))
def test_activations_equal_transformers(kind: str) -> None:
    x = torch.linspace(-6, 6, 101).repeat(2, 1)
    assert torch.allclose(activation(x, kind), ACT2FN[kind](x), atol=1e-6)
    both = torch.cat((x, x.flip(1)), dim=1)
    assert torch.allclose(gated_activation(both, kind), ACT2FN[kind](x) * x.flip(1), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_adds_the_residual_first(dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, 5, 16).to(dtype)
    judge = LlamaRMSNorm(16, 1e-3).to(dtype)
    torch.nn.init.normal_(judge.weight)
    out, total = rms_norm(x, residual, judge.weight, 1e-3)
    assert torch.equal(total, x + residual)
    assert torch.equal(out, judge(x + residual))
    assert torch.equal(rms_norm(x, None, judge.weight, 1e-3)[0], judge(x))


def test_layer_norm_adds_the_residual_first() -> None:
    x, residual = torch.randn(2, 5, 16)
    judge = torch.nn.LayerNorm(16, 1e-3)
    out, total = layer_norm(x, residual, judge.weight, judge.bias, 1e-3)
    assert torch.equal(total, x + residual)
    assert torch.equal(out, judge(x + residual))


BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
YARN = {"rope_type": "yarn", "original_max_position_embeddings": 128, "factor": 8.0}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "dynamic", "factor": 3.0},
        {"rope_type": "llama3", "factor": 8.0, **BANDS},
        YARN,
        {**YARN, "attention_factor": 0.8, "beta_fast": 20, "beta_slow": 2},
        {**YARN, "mscale": 0.5, "mscale_all_dim": 1.5},
        {**YARN, "truncate": False, "rope_theta": 100.0},
    ],
)
def test_angles_equal_transformers(rope: dict[str, Any]) -> None:
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_hidden_layers=1,
        intermediate_size=8,
        max_position_embeddings=1024,
        rope_parameters={"rope_theta": 10000.0, **rope},
    )
    judge = LlamaRotaryEmbedding(config)
    positions = torch.arange(1024)
    q, k = torch.randn(1024, 4, 16), torch.randn(1024, 2, 16)
    cos, sin = judge(q, positions[None])
    expected_q, expected_k = apply_rotary_pos_emb(q, k, cos[0], sin[0])
    params = arch_from_hf({**config.to_dict(), "architectures": ["LlamaForCausalLM"]}).rope
    assert params is not None
    got_q, got_k = rotary(q, k, rotary_table(params, 1024, CPU), positions)
    assert torch.allclose(got_q, expected_q, atol=1e-5)
    assert torch.allclose(got_k, expected_k, atol=1e-5)


def test_partial_rotation_leaves_the_rest() -> None:
    arch = arch_from_hf(
        {
            "architectures": ["Other"],
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_hidden_layers": 1,
            "intermediate_size": 8,
            "vocab_size": 9,
            "max_position_embeddings": 32,
            "partial_rotary_factor": 0.5,
        }
    )
    assert arch.rope is not None
    q = torch.randn(5, 4, 16)
    out, _ = rotary(q, q, rotary_table(arch.rope, 32, CPU), torch.arange(5))
    assert torch.equal(out[..., 8:], q[..., 8:])
    assert torch.equal(out[0], q[0])
    assert not torch.allclose(out[1:, :, :8], q[1:, :, :8])
