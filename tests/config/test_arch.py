"""Architectures are read with the defaults of Transformers' own configuration classes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from quire.config.arch import ModelArch, arch_from_hf
from quire.types.errors import ClientError

transformers = pytest.importorskip("transformers")

CLASSES = {
    "LlamaForCausalLM": "LlamaConfig",
    "MistralForCausalLM": "MistralConfig",
    "Qwen2ForCausalLM": "Qwen2Config",
    "Qwen3ForCausalLM": "Qwen3Config",
    "OPTForCausalLM": "OPTConfig",
    "GPT2LMHeadModel": "GPT2Config",
    "FalconForCausalLM": "FalconConfig",
    "MptForCausalLM": "MptConfig",
    "Phi3ForCausalLM": "Phi3Config",
    "GemmaForCausalLM": "GemmaConfig",
    "Gemma2ForCausalLM": "Gemma2Config",
    "Gemma3ForCausalLM": "Gemma3TextConfig",
    "MixtralForCausalLM": "MixtralConfig",
    "Qwen2MoeForCausalLM": "Qwen2MoeConfig",
    "Qwen3MoeForCausalLM": "Qwen3MoeConfig",
}


def full_and_bare(architecture: str, **fields: Any) -> tuple[Any, ModelArch, ModelArch]:
    """Transformers' config, quire's reading of all its entries, and quire's reading of `fields` alone."""
    theirs = getattr(transformers, CLASSES[architecture])(**fields)
    written = json.loads(theirs.to_json_string(use_diff=False))
    return (
        theirs,
        arch_from_hf({**written, "architectures": [architecture]}),
        arch_from_hf({"architectures": [architecture], **fields}),
    )


@pytest.mark.parametrize("architecture", CLASSES)
def test_missing_fields_have_transformers_defaults(architecture: str) -> None:
    theirs, full, bare = full_and_bare(architecture)
    assert bare == full
    if bare.experts is not None:
        assert bare.experts.count == getattr(theirs, "num_local_experts", getattr(theirs, "num_experts", None))
        assert bare.experts.top_k == theirs.num_experts_per_tok
        assert bare.experts.size == getattr(theirs, "moe_intermediate_size", theirs.intermediate_size)
    assert bare.hidden_size == theirs.hidden_size
    assert bare.num_layers == theirs.num_hidden_layers
    assert bare.num_heads == theirs.num_attention_heads
    assert bare.max_position == getattr(theirs, "max_position_embeddings", getattr(theirs, "max_seq_len", None))
    assert bare.vocab_size == theirs.vocab_size
    assert bare.tie_word_embeddings == theirs.tie_word_embeddings
    assert bare.bos_token_id == theirs.bos_token_id
    assert bare.eos_token_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    names = ("hidden_act", "hidden_activation", "activation_function", "activation")
    assert bare.activation == next((getattr(theirs, name) for name in names if hasattr(theirs, name)), "gelu")
    if hasattr(theirs, "rms_norm_eps"):
        assert bare.norm_eps == theirs.rms_norm_eps
        assert bare.num_kv_heads == theirs.num_key_value_heads
        assert bare.intermediate_size == theirs.intermediate_size
        assert bare.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)


@pytest.mark.parametrize("architecture", ["OPTForCausalLM", "GPT2LMHeadModel"])
def test_family_details_are_filled_in(architecture: str) -> None:
    theirs, _, bare = full_and_bare(architecture)
    names = {
        "OPTForCausalLM": ["do_layer_norm_before", "word_embed_proj_dim", "layer_norm_elementwise_affine"],
        "GPT2LMHeadModel": ["scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"],
    }[architecture]
    for name in names:
        assert bare.extra[name] == getattr(theirs, name), name


def test_biases_by_family() -> None:
    def biases(architecture: str, **fields: Any) -> tuple[bool, bool, bool]:
        arch = arch_from_hf({"architectures": [architecture], **fields})
        return arch.attention_bias, arch.attention_out_bias, arch.mlp_bias

    assert biases("LlamaForCausalLM") == (False, False, False)
    assert biases("LlamaForCausalLM", attention_bias=True, mlp_bias=True) == (True, True, True)
    assert biases("MistralForCausalLM", attention_bias=True) == (False, False, False)
    assert biases("Qwen2ForCausalLM") == (True, False, False)
    assert biases("Qwen3ForCausalLM", attention_bias=True) == (True, True, False)
    assert biases("OPTForCausalLM", enable_bias=False) == (False, False, False)
    assert biases("GPT2LMHeadModel") == (True, True, True)


def test_gpt2_sizes_and_scale() -> None:
    arch = arch_from_hf(
        {"architectures": ["GPT2LMHeadModel"], "n_embd": 60, "n_head": 5, "n_layer": 3, "n_inner": None}
    )
    assert (arch.hidden_size, arch.num_heads, arch.head_dim, arch.num_layers, arch.intermediate_size) == (
        60,
        5,
        12,
        3,
        240,
    )
    assert arch.attention_scale == 12**-0.5
    unscaled = arch_from_hf({"architectures": ["GPT2LMHeadModel"], "scale_attn_weights": False})
    assert unscaled.attention_scale == 1.0


ROPES: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.5, "beta_fast": 16},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.25, "truncate": False},
]


@pytest.mark.parametrize("scaling", ROPES, ids=lambda s: "-".join(map(str, s.values())))
def test_old_and_new_spelling_of_rope_agree(scaling: dict[str, Any]) -> None:
    base = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 2048}
    old = arch_from_hf({**base, "rope_theta": 5e5, "rope_scaling": scaling})
    legacy = {("type" if k == "rope_type" else k): v for k, v in scaling.items()}
    assert arch_from_hf({**base, "rope_theta": 5e5, "rope_scaling": legacy}) == old
    theirs = transformers.LlamaConfig(max_position_embeddings=2048, rope_parameters={**scaling, "rope_theta": 5e5})
    new = arch_from_hf({**json.loads(theirs.to_json_string(use_diff=False)), **base})
    assert new.rope == old.rope
    assert old.rope is not None and old.rope.theta == 5e5 and old.rope.kind == scaling["rope_type"]


@pytest.mark.parametrize("scaling", [s for s in ROPES if s["rope_type"] != "default"], ids=str)
def test_attention_factor_is_transformers(scaling: dict[str, Any]) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs = transformers.LlamaConfig(max_position_embeddings=2048, rope_parameters={**scaling, "rope_theta": 1e4})
    _, attention_factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](theirs, "cpu")
    arch = arch_from_hf(
        {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 2048, "rope_scaling": scaling}
    )
    assert arch.rope is not None
    assert arch.rope.attention_factor == pytest.approx(attention_factor)


def test_longest_length_counts_rope_scaling_in() -> None:
    def longest(scaling: dict[str, Any] | None, length: int = 2048) -> int:
        return arch_from_hf(
            {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": length, "rope_scaling": scaling}
        ).max_supported_length

    assert longest(None) == 2048
    assert longest({"type": "linear", "factor": 4.0}) == 8192
    assert longest({"type": "dynamic", "factor": 2.0}) == 4096
    assert longest({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 512}) == 2048
    assert longest({"rope_type": "yarn", "factor": 4.0}) == 8192
    assert longest({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}) == 2048


def test_sliding_windows_by_family() -> None:
    def windows(architecture: str, **fields: Any) -> tuple[int | None, ...]:
        return arch_from_hf({"architectures": [architecture], "num_hidden_layers": 4, **fields}).sliding_windows

    assert windows("MistralForCausalLM", sliding_window=8) == (8,) * 4
    assert windows("MistralForCausalLM", sliding_window=None) == (None,) * 4
    assert windows("MistralForCausalLM") == (4096,) * 4
    assert windows("LlamaForCausalLM", sliding_window=8) == (None,) * 4
    assert windows("Qwen2ForCausalLM", sliding_window=8) == (None,) * 4
    on = {"sliding_window": 8, "use_sliding_window": True}
    assert windows("Qwen2ForCausalLM", **on, max_window_layers=3) == (None, None, None, 8)
    kinds = ["sliding_attention", "full_attention"] * 2
    assert windows("Qwen3ForCausalLM", **on, layer_types=kinds) == (8, None, 8, None)
    assert windows("Qwen3ForCausalLM", sliding_window=8, layer_types=kinds) == (None,) * 4


def test_qwen_windows_are_transformers() -> None:
    for fields in (
        {"use_sliding_window": True, "max_window_layers": 2, "num_hidden_layers": 4, "sliding_window": 16},
        {"use_sliding_window": False, "num_hidden_layers": 4, "sliding_window": 16},
    ):
        theirs, _, bare = full_and_bare("Qwen2ForCausalLM", **fields)
        expected = tuple(theirs.sliding_window if k == "sliding_attention" else None for k in theirs.layer_types)
        assert bare.sliding_windows == expected


def test_several_end_tokens_and_explicit_head_dim() -> None:
    arch = arch_from_hf(
        {"architectures": ["LlamaForCausalLM"], "eos_token_id": [5, 7, 5], "hidden_size": 48, "num_attention_heads": 6}
        | {"head_dim": 16, "num_key_value_heads": 3}
    )
    assert arch.eos_token_ids == (5, 7)
    assert (arch.head_dim, arch.num_kv_heads, arch.attention_scale) == (16, 3, 0.25)


def test_what_gemma_calls_gelu_is_its_approximation() -> None:
    assert arch_from_hf({"architectures": ["GemmaForCausalLM"], "hidden_act": "gelu"}).activation == "gelu_pytorch_tanh"


def test_gemma_3_has_a_rope_for_each_kind_of_layer_in_both_spellings() -> None:
    scaling = {"rope_type": "linear", "factor": 8.0}
    older = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": scaling, "sliding_window_pattern": 3}
    newer = {
        "rope_parameters": {
            "full_attention": {"rope_theta": 1e6, **scaling},
            "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
        },
        "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 9,
    }
    common = {"architectures": ["Gemma3ForCausalLM"], "num_hidden_layers": 27}
    first, second = (arch_from_hf({**common, **fields}) for fields in (older, newer))
    assert first == second
    assert first.rope_of(0) == first.local_rope and first.rope_of(2) == first.rope
    assert (first.rope_of(0).theta, first.rope_of(2).factor) == (1e4, 8.0)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"architectures": None, "model_type": "nothing"}, ["names no architecture"]),
        ({"architectures": []}, ["names no architecture"]),
        ({"hidden_size": "big"}, ["hidden_size", "positive integer"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "positive integer"]),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, ["multiple of num_key_value_heads"]),
        ({"rope_scaling": {"rope_type": "mrope"}}, ["mrope", "not yet"]),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, ["short_factor", "64 numbers"]),
        ({"architectures": ["MPTForCausalLM"], "attn_config": {"prefix_lm": True}}, ["prefix_lm=True", "False"]),
        ({"architectures": ["Gemma3ForCausalLM"], "use_bidirectional_attention": True}, ["use_bidirectional"]),
        ({"architectures": ["MixtralForCausalLM"], "num_experts_per_tok": 9}, ["num_experts_per_tok=9", "8 experts"]),
        ({"rope_scaling": {"rope_type": "linear"}}, ["needs a factor"]),
        ({"rope_scaling": 3}, ["must be an object"]),
        ({"hidden_size": 36, "num_attention_heads": 4, "num_key_value_heads": 4}, ["even size", "9"]),
    ],
)
def test_bad_configurations_say_what_is_wrong(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ClientError) as caught:
        arch_from_hf({"architectures": ["LlamaForCausalLM"], **fields})
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_foreign_architectures_are_read_by_llama_names() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    arch = arch_from_hf(
        {"architectures": ["OutOfTree"], **sizes, "vocab_size": 99, "max_position_embeddings": 64, "my_field": 3}
    )
    assert (arch.architecture, arch.head_dim, arch.extra["my_field"]) == ("OutOfTree", 8, 3)
    with pytest.raises(ClientError, match="OutOfTree has no 'hidden_size'"):
        arch_from_hf({"architectures": ["OutOfTree"]})
