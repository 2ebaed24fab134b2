"""The architectures that the Transformers backend is held to, as tiny random configurations, and what becomes of each.

Owns: the table. `refused` is a part of the message of those that cannot run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_LLAMA = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 199,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_HEAD = {"head_dim": 12}
_MIXED = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "sliding_window": 9}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_GPT = {
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 3,
    "vocab_size": 199,
    "n_positions": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}


# Parts of the messages of refusals, and what the documentation says of them.
REASONS = {
    "attention sinks": "attention sinks, which the paged attention does not have",
    "attention by itself": "computes its attention by itself, not through Transformers' attention interface",
    "attends twice": "attends twice in a layer, whose keys and values have one place",
    "no attention": "layers with a state instead of keys and values",
    "mix outside": "tokens mix outside of attention (a state-space branch in each layer)",
    "mask of its own": "a mask that depends on the numbers",
    "weights beside": "weights between its body and its head",
    "chunked": "chunked attention",
    "causal language model": "an encoder and a decoder",
}


@dataclass(frozen=True)
class Case:
    """`config`: on top of a common small one, unless `alone`."""

    architecture: str
    config: Mapping[str, Any] = field(default_factory=dict)
    refused: str | None = None
    alone: bool = False
    note: str = ""

    @property
    def reason(self) -> str:
        """What the documentation says of a refusal."""
        assert self.refused is not None
        return REASONS[self.refused]

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.config) if self.alone else {**_LLAMA, **self.config}


CASES: tuple[Case, ...] = (
    Case("LlamaForCausalLM"),
    Case("MistralForCausalLM", {"sliding_window": 10}, note="sliding window"),
    Case("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    Case("Qwen3ForCausalLM", _HEAD),
    Case("HeliumForCausalLM", _HEAD),
    Case("GPT2LMHeadModel", _GPT, alone=True),
    Case("GPTNeoXForCausalLM", {"rotary_pct": 0.5, "num_key_value_heads": 4}),
    Case("GPTBigCodeForCausalLM", {**_GPT, "multi_query": True}, alone=True, note="multi-query"),
    Case("PhiForCausalLM", {"partial_rotary_factor": 0.5, "num_key_value_heads": 4}),
    Case("Phi3ForCausalLM", {"sliding_window": 9}),
    Case("OlmoForCausalLM", {"clip_qkv": 3.0}, note="clipped q, k, v"),
    Case("Olmo2ForCausalLM"),
    Case("Olmo3ForCausalLM", _MIXED, note="sliding and full layers"),
    Case("Starcoder2ForCausalLM", {"sliding_window": 10}),
    Case("GemmaForCausalLM", _HEAD),
    Case(
        "Gemma2ForCausalLM",
        {**_HEAD, "sliding_window": 9, "query_pre_attn_scalar": 12, "attn_logit_softcapping": 20.0},
        note="soft-capped scores and logits, sliding and full layers",
    ),
    Case("Gemma3ForCausalLM", {**_HEAD, **_MIXED, "query_pre_attn_scalar": 12}, note="sliding and full layers"),
    Case("SmolLM3ForCausalLM", {"no_rope_layers": [1, 0, 1]}, note="layers without positions"),
    Case("CohereForCausalLM", {"logit_scale": 0.3}, note="scaled logits"),
    Case("Cohere2ForCausalLM", {**_MIXED, **_HEAD}),
    Case("GraniteForCausalLM", {"logits_scaling": 4.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5}),
    Case("GlmForCausalLM", _HEAD),
    Case("Glm4ForCausalLM", _HEAD),
    Case("StableLmForCausalLM", {"use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    Case("OPTForCausalLM", {"ffn_dim": 64, "word_embed_proj_dim": 48, "num_key_value_heads": 4}),
    Case("PersimmonForCausalLM", {"partial_rotary_factor": 0.5, "num_key_value_heads": 4}),
    Case("NemotronForCausalLM", _HEAD),
    Case("ArceeForCausalLM"),
    Case("ApertusForCausalLM"),
    Case("SeedOssForCausalLM", _HEAD),
    Case("Ernie4_5ForCausalLM", _HEAD),
    Case("Exaone4ForCausalLM", _MIXED),
    Case("HunYuanDenseV1ForCausalLM", _HEAD),
    Case("BioGptForCausalLM", {"num_key_value_heads": 4}),
    Case("VaultGemmaForCausalLM", {**_HEAD, "sliding_window": 9, "query_pre_attn_scalar": 12}),
    Case("CwmForCausalLM", {**_MIXED, **_HEAD}),
    Case("Ministral3ForCausalLM", {**_HEAD}),
    Case("ModernBertDecoderForCausalLM", {"local_attention": 18, "num_key_value_heads": 4}, refused="weights beside"),
    Case("MiniCPM3ForCausalLM", _LATENT, note="latent attention; the cache holds whole keys and values"),
    Case("DiffLlamaForCausalLM", refused="attends twice"),
    Case("NanoChatForCausalLM"),
    Case("BitNetForCausalLM"),
    Case("MixtralForCausalLM", {"num_local_experts": 4, "sliding_window": None}, note="experts"),
    Case("Qwen2MoeForCausalLM", {**_EXPERTS, "shared_expert_intermediate_size": 32}, note="experts"),
    Case("Qwen3MoeForCausalLM", {**_EXPERTS, **_HEAD}, note="experts"),
    Case("OlmoeForCausalLM", _EXPERTS, note="experts"),
    Case("GraniteMoeForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}, note="experts"),
    Case("PhimoeForCausalLM", {"num_local_experts": 4}, note="experts"),
    Case("Ernie4_5_MoeForCausalLM", {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32}, note="experts"),
    Case(
        "Dots1ForCausalLM",
        {
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
        },
        note="experts",
    ),
    Case(
        "Glm4MoeForCausalLM",
        {
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            **_HEAD,
        },
        note="experts",
    ),
    Case("FlexOlmoForCausalLM", {**_EXPERTS}, note="experts"),
    Case("MiniMaxM2ForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2, **_HEAD}, note="experts"),
    Case(
        "DbrxForCausalLM",
        {
            "d_model": 48,
            "n_heads": 4,
            "n_layers": 3,
            "max_seq_len": 512,
            "vocab_size": 199,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 48},
        },
        alone=True,
    ),
    Case(
        "DeepseekV2ForCausalLM",
        {
            **_LATENT,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "head_dim": 8,
        },
    ),
    Case(
        "DeepseekV3ForCausalLM",
        {
            **_LATENT,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "head_dim": 8,
        },
    ),
    Case("GptOssForCausalLM", {**_HEAD, "num_local_experts": 4, "sliding_window": 9}, refused="attention sinks"),
    Case("GPTJForCausalLM", {**_GPT, "rotary_dim": 8}, refused="attention by itself", alone=True),
    Case(
        "GPTNeoForCausalLM",
        {
            "hidden_size": 48,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "vocab_size": 199,
        },
        alone=True,
        refused="attention by itself",
    ),
    Case("CodeGenForCausalLM", {**_GPT, "rotary_dim": 8}, refused="attention by itself", alone=True),
    Case("FalconForCausalLM", refused="attention by itself"),
    Case(
        "BloomForCausalLM",
        {"hidden_size": 48, "n_head": 4, "n_layer": 3, "vocab_size": 199},
        refused="attention by itself",
        alone=True,
    ),
    Case(
        "MptForCausalLM",
        {"d_model": 48, "n_heads": 4, "n_layers": 3, "vocab_size": 199},
        refused="attention by itself",
        alone=True,
    ),
    Case(
        "XGLMForCausalLM",
        {"d_model": 48, "attention_heads": 4, "num_layers": 3, "vocab_size": 199, "ffn_dim": 64},
        refused="attention by itself",
        alone=True,
    ),
    Case(
        "MambaForCausalLM",
        {"hidden_size": 48, "num_hidden_layers": 3, "vocab_size": 199, "state_size": 8},
        refused="attention by itself",
        alone=True,
    ),
    Case(
        "JambaForCausalLM",
        {
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "use_mamba_kernels": False,
        },
        refused="no attention",
    ),
    Case(
        "BambaForCausalLM",
        {"mamba_n_heads": 4, "mamba_d_head": 24, "mamba_d_state": 8, "attn_layer_indices": [1]},
        refused="no attention",
    ),
    Case(
        "FalconH1ForCausalLM",
        {"mamba_d_ssm": 48, "mamba_n_heads": 4, "mamba_d_head": 12, "mamba_d_state": 8, "head_dim": 12},
        refused="mix outside",
    ),
    Case(
        "Qwen3NextForCausalLM",
        {
            **_EXPERTS,
            **_HEAD,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "shared_expert_intermediate_size": 32,
        },
        refused="no attention",
    ),
    Case("Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention", "conv"]}, refused="no attention"),
    Case("RecurrentGemmaForCausalLM", {"lru_width": 48, "attention_window_size": 8}, refused="no attention"),
    Case(
        "Llama4ForCausalLM",
        {**_HEAD, "num_local_experts": 2, "attention_chunk_size": 8, "intermediate_size_mlp": 64},
        refused="chunked",
    ),
    Case("ZambaForCausalLM", {"attn_layer_period": 2, "attn_layer_offset": 1}, refused="no attention"),
    Case("DogeForCausalLM", refused="mask of its own"),
    Case(
        "RwkvForCausalLM",
        {"hidden_size": 48, "num_hidden_layers": 3, "vocab_size": 199},
        refused="attention by itself",
        alone=True,
    ),
    Case(
        "T5ForConditionalGeneration",
        {"d_model": 48, "d_ff": 64, "num_layers": 2, "num_heads": 3, "d_kv": 16, "vocab_size": 199},
        refused="causal language model",
        alone=True,
    ),
)


BEGIN, END = "<!-- table of the backend: begin -->", "<!-- table of the backend: end -->"


def into(page: str) -> str:
    """`page` with the table between its two marks."""
    rows = ["| architecture | from Transformers' code | |", "|---|---|---|"]
    for case in sorted(CASES, key=lambda case: (case.refused is not None, case.architecture)):
        state = "works" if case.refused is None else f"refused: {case.reason}"
        rows.append(f"| `{case.architecture}` | {state} | {case.note} |")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return "\n".join([before + BEGIN, "", *rows, "", END + after])
