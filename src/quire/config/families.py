# pyright: reportPrivateUsage=false
"""Readers of the families beyond Llama's nearest kin: Falcon, MPT, Phi-3, Gemma, Mixtral, Qwen's mixtures of experts.

Owns: their names and defaults. Shares `arch.py`'s parts, which knows these readers by `READERS` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from quire.config.arch import (
    _LLAMA,
    Experts,
    ModelArch,
    RawConfig,
    RopeParams,
    _bos,
    _kv_heads,
    _llama_like,
    _rope,
    _size,
    _windows_of_kinds,
    token_ids,
)
from quire.types.errors import ClientError

Windows = tuple[int | None, ...]

_FALCON = {
    "vocab_size": 65024,
    "layer_norm_epsilon": 1e-5,
    "num_ln_in_parallel_attn": None,
    "alibi": False,
    "multi_query": True,
    "parallel_attn": True,
    "bias": False,
    "bos_token_id": 11,
    "eos_token_id": 11,
    "activation": "gelu",
    "tie_word_embeddings": True,
}
_MPT = {
    "vocab_size": 50368,
    "expansion_ratio": 4,
    "layer_norm_epsilon": 1e-5,
    "learned_pos_emb": True,
    "no_bias": True,
    "norm_type": "low_precision_layernorm",
    "logit_scale": None,
    "tie_word_embeddings": True,
}
_MPT_ATTENTION = {
    "attn_type": "multihead_attention",
    "clip_qkv": None,
    "softmax_scale": None,
    "prefix_lm": False,
    "qk_ln": False,
    "alibi": True,
    "alibi_bias_max": 8,
}
_PHI3 = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "bos_token_id": 1,
    "eos_token_id": 32000,
    "pad_token_id": 32000,
}
_GEMMA = {
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "tie_word_embeddings": True,
}
_GEMMA2 = {
    **_GEMMA,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}
_GEMMA3 = {
    **_GEMMA2,
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
}
_MIXTRAL = {
    **_LLAMA,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "sliding_window": None,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
}
_QWEN2_MOE = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts_per_tok": 4,
}
_QWEN3_MOE = {
    **_QWEN2_MOE,
    "intermediate_size": 6144,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
}


def _refuse(cfg: RawConfig, **supported: tuple[Any, ...]) -> None:
    """Raises `ClientError` for an entry with a value that nothing here implements."""
    for name, values in supported.items():
        if cfg.get(name) not in values:
            raise ClientError(
                f"config.json: {name}={cfg.get(name)!r} is not in quire: it knows {', '.join(map(repr, values))}",
                parameter=name,
                value=cfg.get(name),
            )


def _same(window: int | None, num_layers: int) -> Windows:
    return (window,) * num_layers


def _read_falcon(architecture: str, cfg: RawConfig) -> ModelArch:
    """Falcon, also as RefinedWeb (40B) and RefinedWebModel (7B and smaller), the names it had first."""
    cfg = {**_FALCON, **cfg}
    cfg.setdefault("new_decoder_architecture", cfg.get("model_type") == "RefinedWeb")
    hidden = _size(cfg, "n_embed", "hidden_size", default=4544)
    num_layers = _size(cfg, "num_hidden_layers", "n_layer", default=32)
    heads = _size(cfg, "num_attention_heads", "n_head", default=71)
    if cfg["new_decoder_architecture"]:
        kv = _kv_heads(heads, _size(cfg, "num_kv_heads", "n_head_kv", default=heads), architecture)
    else:
        kv = 1 if cfg["multi_query"] else heads
    max_position = _size(cfg, "max_position_embeddings", default=2048)
    bias = bool(cfg["bias"])
    return ModelArch(
        architecture=architecture,
        hidden_size=hidden,
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=kv,
        head_dim=hidden // heads,
        intermediate_size=_size(cfg, "ffn_hidden_size", default=4 * hidden),
        vocab_size=_size(cfg, "vocab_size"),
        max_position=max_position,
        norm_eps=float(cfg["layer_norm_epsilon"]),
        activation=str(cfg["activation"]),
        tie_word_embeddings=bool(cfg["tie_word_embeddings"]),
        attention_bias=bias,
        attention_out_bias=bias,
        mlp_bias=bias,
        rope=None if cfg["alibi"] else _rope(cfg, hidden // heads, max_position),
        sliding_windows=_same(None, num_layers),
        attention_scale=(hidden // heads) ** -0.5,
        bos_token_id=_bos(cfg),
        eos_token_ids=token_ids(cfg["eos_token_id"]),
        pad_token_id=cfg.get("pad_token_id"),
        extra=cfg,
    )


def _read_mpt(architecture: str, cfg: RawConfig) -> ModelArch:
    attention: dict[str, Any] = {**_MPT_ATTENTION, **(cfg.get("attn_config") or {})}
    cfg = {**_MPT, **cfg, "attn_config": attention}
    _refuse(cfg, logit_scale=(None,), norm_type=("low_precision_layernorm", "layernorm"))
    kinds = ("multihead_attention", "multiquery_attention", "grouped_query_attention")
    _refuse(attention, prefix_lm=(False,), attn_type=kinds)
    hidden = _size(cfg, "d_model", "hidden_size", default=2048)
    num_layers = _size(cfg, "n_layers", "num_hidden_layers", default=24)
    heads = _size(cfg, "n_heads", "num_attention_heads", default=16)
    kv = {kinds[0]: heads, kinds[1]: 1}.get(attention["attn_type"]) or _size(attention, "kv_n_heads")
    bias = not cfg["no_bias"]
    scale: float | None = attention["softmax_scale"]
    return ModelArch(
        architecture=architecture,
        hidden_size=hidden,
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=_kv_heads(heads, kv, architecture),
        head_dim=hidden // heads,
        intermediate_size=int(cfg["expansion_ratio"] * hidden),
        vocab_size=_size(cfg, "vocab_size"),
        max_position=_size(cfg, "max_seq_len", default=2048),
        norm_eps=float(cfg["layer_norm_epsilon"]),
        activation="gelu",
        tie_word_embeddings=bool(cfg["tie_word_embeddings"]),
        attention_bias=bias,
        attention_out_bias=bias,
        mlp_bias=bias,
        rope=None,
        sliding_windows=_same(None, num_layers),
        attention_scale=(hidden // heads) ** -0.5 if scale is None else float(scale),
        bos_token_id=_bos(cfg),
        eos_token_ids=token_ids(cfg.get("eos_token_id")),
        pad_token_id=cfg.get("pad_token_id"),
        extra=cfg,
    )


def _read_phi3(architecture: str, cfg: RawConfig) -> ModelArch:
    cfg = {**_PHI3, **cfg}
    scaling: dict[str, Any] = cfg.get("rope_scaling") or {}
    if "yarn" in (scaling.get("type"), scaling.get("rope_type")):
        cfg["rope_scaling"] = {**scaling, "rope_type": "longrope"}  # what the first checkpoints meant by it
    return _llama_like(
        architecture,
        cfg,
        defaults=_PHI3,
        windows=lambda cfg, n: _same(cfg["sliding_window"], n),
        qkv_bias=False,
        out_bias=False,
    )


def _read_gemma(architecture: str, cfg: RawConfig) -> ModelArch:
    """Gemma 1, whose first checkpoints say "gelu" where they mean its approximation."""
    cfg = {**_GEMMA, **cfg}
    if cfg["hidden_act"] == "gelu":
        cfg["hidden_act"] = "gelu_pytorch_tanh"
    return _gemma_like(architecture, cfg, lambda cfg, n: _same(None, n))


def _gemma_like(architecture: str, cfg: RawConfig, windows: Callable[[RawConfig, int], Windows]) -> ModelArch:
    _refuse(cfg, use_bidirectional_attention=(None, False))
    bias = bool(cfg.get("attention_bias", False))
    return _llama_like(architecture, cfg, defaults={}, windows=windows, qkv_bias=bias, out_bias=bias)


def _read_gemma2(architecture: str, cfg: RawConfig) -> ModelArch:
    return _later_gemma(architecture, {**_GEMMA2, **cfg}, every=2)


def _read_gemma3(architecture: str, cfg: RawConfig) -> ModelArch:
    """Gemma 3, text only. Layers with a window turn by a base of their own and without scaling."""
    cfg = {**_GEMMA3, **cfg}
    given: dict[str, Any] = cfg.get("rope_parameters") or {}
    local: dict[str, Any] = dict(
        given.get("sliding_attention") or {"rope_theta": cfg.get("rope_local_base_freq") or 10_000.0}
    )
    whole: dict[str, Any] = {"rope_theta": cfg.get("rope_theta") or 1_000_000.0, **(given.get("full_attention") or {})}
    whole.update(cfg.get("rope_scaling") or {})
    every = int(cfg.get("sliding_window_pattern") or cfg.get("_sliding_window_pattern") or 6)
    arch = _later_gemma(architecture, {**cfg, "rope_scaling": None, "rope_parameters": whole}, every)

    def rope(parameters: Any) -> RopeParams:
        return _rope({"rope_parameters": parameters}, arch.head_dim, arch.max_position)

    return replace(arch, local_rope=rope(local))


def _later_gemma(architecture: str, cfg: dict[str, Any], every: int) -> ModelArch:
    """Gemma 2 and 3: all layers have a window but each `every`th, where `layer_types` does not say otherwise."""

    def windows(cfg: RawConfig, n: int) -> Windows:
        kinds = cfg.get("layer_types")
        if kinds is None:
            kinds = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(n)]
        return _windows_of_kinds(kinds, cfg["sliding_window"], n)

    cfg["hidden_act"] = cfg["hidden_activation"]
    return replace(
        _gemma_like(architecture, cfg, windows),
        attention_scale=float(cfg["query_pre_attn_scalar"]) ** -0.5,
        attn_softcap=cfg["attn_logit_softcapping"],
        logit_softcap=cfg["final_logit_softcapping"],
    )


def _read_mixtral(architecture: str, cfg: RawConfig) -> ModelArch:
    arch = _llama_like(
        architecture,
        cfg,
        defaults=_MIXTRAL,
        windows=lambda cfg, n: _same(cfg["sliding_window"], n),
        qkv_bias=False,
        out_bias=False,
    )
    cfg = {**_MIXTRAL, **cfg}
    count, top_k = _size(cfg, "num_local_experts", "num_experts"), _size(cfg, "num_experts_per_tok")
    layers = (True,) * arch.num_layers
    return replace(arch, experts=_experts(Experts(count, top_k, arch.intermediate_size, True, layers)))


def _experts(experts: Experts) -> Experts:
    if experts.top_k > experts.count:
        raise ClientError(
            f"config.json: num_experts_per_tok={experts.top_k} is more than the {experts.count} experts there are",
            parameter="num_experts_per_tok",
            value=experts.top_k,
        )
    return experts


def _qwen_moe(arch: ModelArch, shared: int, experts: int) -> ModelArch:
    """Qwen's rule for which layers are mixtures; `experts`: the number of them by default, for two names."""
    cfg, n = arch.extra, arch.num_layers
    dense, step = set[int](cfg.get("mlp_only_layers") or ()), _size(cfg, "decoder_sparse_step", default=1)
    layers = tuple(i not in dense and (i + 1) % step == 0 for i in range(n))
    count, top_k = _size(cfg, "num_experts", "num_local_experts", default=experts), _size(cfg, "num_experts_per_tok")
    normalised = bool(cfg.get("norm_topk_prob", False))
    return replace(
        arch, experts=_experts(Experts(count, top_k, _size(cfg, "moe_intermediate_size"), normalised, layers, shared))
    )


def _read_qwen2_moe(architecture: str, cfg: RawConfig) -> ModelArch:
    cfg = {**_QWEN2_MOE, **cfg}

    def windows(cfg: RawConfig, n: int) -> Windows:
        if not cfg.get("use_sliding_window", False):
            return _same(None, n)
        kinds = cfg.get("layer_types")
        if kinds is None:
            most = int(cfg.get("max_window_layers", 28))
            kinds = ["full_attention" if i % 2 or i >= most else "sliding_attention" for i in range(n)]
        return _windows_of_kinds(kinds, cfg.get("sliding_window", 4096), n)

    bias = bool(cfg.get("qkv_bias", True))
    arch = _llama_like(architecture, cfg, defaults={}, windows=windows, qkv_bias=bias, out_bias=False)
    return _qwen_moe(arch, _size(cfg, "shared_expert_intermediate_size"), 60)


def _read_qwen3_moe(architecture: str, cfg: RawConfig) -> ModelArch:
    cfg = {**_QWEN3_MOE, **cfg}

    def windows(cfg: RawConfig, n: int) -> Windows:
        return _same(cfg.get("sliding_window", 4096) if cfg.get("use_sliding_window", False) else None, n)

    bias = bool(cfg.get("attention_bias", False))
    arch = _llama_like(architecture, cfg, defaults={}, windows=windows, qkv_bias=bias, out_bias=bias)
    return _qwen_moe(arch, 0, 128)


READERS: Mapping[str, Callable[[str, RawConfig], ModelArch]] = {
    "falcon": _read_falcon,
    "mpt": _read_mpt,
    "phi3": _read_phi3,
    "gemma": _read_gemma,
    "gemma2": _read_gemma2,
    "gemma3_text": _read_gemma3,
    "mixtral": _read_mixtral,
    "qwen2_moe": _read_qwen2_moe,
    "qwen3_moe": _read_qwen3_moe,
}
