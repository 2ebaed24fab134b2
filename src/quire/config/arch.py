"""What a decoder looks like: `ModelArch`, read from a checkpoint's config.json.

Owns: the names and the defaults of the Hugging Face configuration formats of Llama, Mistral, Qwen2, Qwen3, OPT and
GPT-2 (further families: `families.py`), and the two spellings of rotary parameters (`rope_theta` + `rope_scaling`, and
Transformers 5's `rope_parameters`). Knows nothing of tensors, of files, or of which architectures have an
implementation.

Defaults are those of Transformers' own configuration classes, because a config.json leaves out what equals them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from quire.types.errors import ClientError

RawConfig = Mapping[str, Any]

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")

# Checkpoints saved without `architectures` (a bare `LlamaConfig().save_pretrained`) still name their model type.
CAUSAL_LM = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "opt": "OPTForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "falcon": "FalconForCausalLM",
    "mpt": "MptForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}

# Architectures by the names they had before Transformers had them.
OLDER_NAMES = {"RWForCausalLM": "falcon", "MPTForCausalLM": "mpt"}


@dataclass(frozen=True, slots=True)
class RopeParams:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864) and its scalings.

    `kind`: "default"; "linear" (Chen et al. 2023, arXiv 2306.15595); "dynamic" (NTK-aware, base grows with the
    length); "llama3" (Llama 3.1's frequency bands); "yarn" (Peng et al. 2023, arXiv 2309.00071); "longrope" (Ding et
    al. 2024, arXiv 2402.13753: a divisor for each frequency, `long_factor` beyond the original length, else
    `short_factor`).
    `rotary_dim`: the leading dimensions of a head that rotate. `attention_factor` multiplies cos and sin and is
    always concrete (1.0 except for yarn and longrope). `original_max_position` is the length before scaling;
    `max_position` the configuration's `max_position_embeddings`.
    """

    theta: float
    rotary_dim: int
    max_position: int
    kind: str = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts in place of a layer's feed-forward block: `top_k` of `count` experts for each token, by the
    softmax of a router; `normalised`: the weights of the chosen ones are scaled to sum to 1. `layers` has one entry per
    layer: False where it has a dense block. `shared_size`: of an expert that every token has beside them; 0: none.
    """

    count: int
    top_k: int
    size: int
    normalised: bool
    layers: tuple[bool, ...]
    shared_size: int = 0


@dataclass(frozen=True, slots=True)
class ModelArch:
    """A decoder's shape, in one vocabulary for all families.

    `sliding_windows` has one entry per layer: None attends to everything before; w attends to the last w tokens,
    the token itself included. `attention_bias` is that of the q, k and v projections. `max_position` is the longest
    sequence that the checkpoint was made for, before any scaling. `local_rope`: that of the layers with a window, where
    it is another (Gemma 3). `extra` is the raw configuration with the family's
    defaults filled in, for what only one family knows (OPT's projections, GPT-2's scaling by layer).
    """

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position: int
    norm_eps: float
    activation: str
    tie_word_embeddings: bool
    attention_bias: bool
    attention_out_bias: bool
    mlp_bias: bool
    rope: RopeParams | None
    sliding_windows: tuple[int | None, ...]
    attention_scale: float
    logit_softcap: float | None = None
    attn_softcap: float | None = None
    local_rope: RopeParams | None = None
    experts: Experts | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any], hash=False, compare=False, repr=False)

    @property
    def max_supported_length(self) -> int:
        """The longest sequence, in tokens, with rope scaling counted in: what `max_model_len` may at most be."""
        rope = self.rope
        if rope is None or rope.kind in ("default", "llama3", "longrope"):
            # These scalings are written into max_position_embeddings already (131072 for Llama 3.1).
            return self.max_position
        if rope.kind == "yarn":
            return max(self.max_position, int(rope.original_max_position * rope.factor))
        return int(self.max_position * rope.factor)

    def rope_of(self, layer: int) -> RopeParams | None:
        """Rotary parameters of one layer."""
        local = self.local_rope is not None and self.sliding_windows[layer] is not None
        return self.local_rope if local else self.rope


def arch_from_hf(cfg: RawConfig) -> ModelArch:
    """The architecture that a Hugging Face config.json (as a dict) describes.

    Errors: `ClientError` where no architecture is named, where a required size is missing or not a positive
    integer, or where a rope scaling is unknown.
    """
    architecture = architecture_of(cfg)
    return _reader(_family(architecture, cfg))(architecture, cfg)


def _reader(family: str) -> Callable[[str, RawConfig], ModelArch]:
    from quire.config import families  # it is made of the parts below

    return {**_READERS, **families.READERS}.get(family, _read_generic)


def architecture_of(cfg: RawConfig) -> str:
    """The name in `architectures`, or the causal language model of a known `model_type`."""
    names = cfg.get("architectures")
    if isinstance(names, list | tuple) and names and isinstance(names[0], str):
        return names[0]
    if isinstance(names, str):
        text = f'config.json: architectures must be a list, ["{names}"]'
        raise ClientError(text, parameter="hf_overrides", value=names)
    if name := CAUSAL_LM.get(str(cfg.get("model_type"))):
        return name
    raise ClientError(
        'config.json names no architecture: add "architectures": ["LlamaForCausalLM"] (or the model\'s own) to it, '
        'or pass hf_overrides={"architectures": [...]}',
        parameter="model",
    )


def token_ids(value: Any) -> tuple[int, ...]:
    """`eos_token_id` in any of its spellings (None, an id, a list) as a tuple without repeats."""
    if value is None:
        return ()
    values = cast(list[Any], [*value] if isinstance(value, list | tuple) else [value])  # pyright: ignore[reportUnknownArgumentType]
    return tuple(dict.fromkeys(int(v) for v in values if v is not None))


def _family(architecture: str, cfg: RawConfig) -> str:
    for family, name in CAUSAL_LM.items():
        if architecture == name:
            return family
    return OLDER_NAMES.get(architecture, str(cfg.get("model_type", "")))


def _size(cfg: RawConfig, *names: str, default: int | None = None) -> int:
    """The first of `names` that the configuration has, as a positive integer."""
    for name in names:
        value = cfg.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ClientError(f"config.json: {name}={value!r} must be a positive integer", parameter=name, value=value)
        return value
    if default is None:
        raise ClientError(
            f"config.json of {architecture_of(cfg)} has no {names[0]!r}: quire cannot read this architecture's shape",
            parameter="model",
        )
    return default


def _kv_heads(num_heads: int, value: int, architecture: str) -> int:
    if num_heads % value:
        raise ClientError(
            f"config.json of {architecture}: {num_heads} attention heads cannot share {value} key-value heads evenly: "
            "num_attention_heads must be a multiple of num_key_value_heads",
            parameter="num_key_value_heads",
            value=value,
        )
    return value


def _rope(cfg: RawConfig, head_dim: int, max_position: int) -> RopeParams:
    """Rotary parameters; a value inside the dict goes before one beside it, as in Transformers."""
    raw: Any = cfg.get("rope_scaling") or cfg.get("rope_parameters") or {}
    if not isinstance(raw, Mapping):
        raise ClientError(f"config.json: rope_scaling must be an object, not {raw!r}", parameter="rope_scaling")
    params: dict[str, Any] = {k: v for k, v in raw.items() if v is not None}  # pyright: ignore[reportUnknownVariableType]
    kind = str(params.get("rope_type", params.get("type", "default")))
    if kind == "su":  # as Phi-3 called it first
        kind = "longrope"
    if kind not in ROPE_KINDS:
        raise ClientError(
            f"config.json: rope scaling {kind!r} is not yet in quire: it knows {', '.join(ROPE_KINDS)}",
            parameter="rope_scaling",
            value=kind,
        )
    theta = float(params.get("rope_theta", cfg.get("rope_theta") or 10_000.0))
    partial = float(params.get("partial_rotary_factor", cfg.get("partial_rotary_factor") or 1.0))
    rotary_dim = int(head_dim * partial)
    if rotary_dim % 2:
        raise ClientError(f"config.json: rotary embeddings need an even size, not {rotary_dim}", parameter="head_dim")
    original = int(
        cfg.get("original_max_position_embeddings") or params.get("original_max_position_embeddings") or max_position
    )
    if kind in ("linear", "dynamic", "llama3") and "factor" not in params:
        raise ClientError(f"config.json: rope scaling {kind!r} needs a factor", parameter="rope_scaling")
    factor = float(params.get("factor", max_position / original if kind in ("yarn", "longrope") else 1.0))
    mscale, mscale_all_dim = params.get("mscale"), params.get("mscale_all_dim")
    attention_factor = 1.0
    if kind == "yarn":
        attention_factor = params.get("attention_factor", _yarn_attention_factor(factor, mscale, mscale_all_dim))
    elif kind == "longrope":
        grown = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        attention_factor = params.get("attention_factor", grown)
    return RopeParams(
        theta=theta,
        rotary_dim=rotary_dim,
        max_position=max_position,
        kind=kind,
        factor=factor,
        original_max_position=original,
        low_freq_factor=float(params.get("low_freq_factor", 1.0)),
        high_freq_factor=float(params.get("high_freq_factor", 4.0)),
        beta_fast=float(params.get("beta_fast") or 32.0),
        beta_slow=float(params.get("beta_slow") or 1.0),
        attention_factor=float(attention_factor),
        mscale=mscale,
        mscale_all_dim=mscale_all_dim,
        truncate=bool(params.get("truncate", True)),
        short_factor=_divisors(params, "short_factor", rotary_dim) if kind == "longrope" else (),
        long_factor=_divisors(params, "long_factor", rotary_dim) if kind == "longrope" else (),
    )


def _divisors(params: Mapping[str, Any], name: str, rotary_dim: int) -> tuple[float, ...]:
    values: Any = params.get(name)
    if not isinstance(values, list | tuple) or len(values) != rotary_dim // 2:  # pyright: ignore[reportUnknownArgumentType]
        raise ClientError(
            f"config.json: rope scaling 'longrope' needs a {name} of {rotary_dim // 2} numbers, one for each frequency",
            parameter="rope_scaling",
        )
    return tuple(float(value) for value in cast(list[Any], values))


def _yarn_attention_factor(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    """YaRN's temperature on the attention logits (eq. 22 of the paper), with DeepSeek's two extra scales."""

    def m(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    return m(mscale) / m(mscale_all_dim) if mscale and mscale_all_dim else m(1.0)


def _layer_windows(cfg: RawConfig, num_layers: int) -> tuple[int | None, ...]:
    """Qwen's rule: windows only with `use_sliding_window`, in the layers that `layer_types` names, or, without it, in
    those from `max_window_layers` on."""
    window: int | None = cfg.get("sliding_window", 4096) if cfg.get("use_sliding_window", False) else None
    if window is None:
        return (None,) * num_layers
    kinds: Any = cfg.get("layer_types")
    if kinds is None:
        first = int(cfg.get("max_window_layers", 28))
        return tuple(window if i >= first else None for i in range(num_layers))
    return _windows_of_kinds(kinds, window, num_layers)


def _windows_of_kinds(kinds: Any, window: int | None, num_layers: int) -> tuple[int | None, ...]:
    if len(kinds) != num_layers:
        raise ClientError(
            f"config.json: layer_types names {len(kinds)} layers, but the model has {num_layers}",
            parameter="layer_types",
        )
    unknown = sorted({str(k) for k in kinds} - {"full_attention", "sliding_attention"})
    if unknown:
        raise ClientError(f"config.json: layer_types {', '.join(unknown)} not yet in quire", parameter="layer_types")
    return tuple(window if k == "sliding_attention" else None for k in kinds)


def _llama_like(
    architecture: str,
    cfg: RawConfig,
    *,
    defaults: Mapping[str, Any],
    windows: Callable[[RawConfig, int], tuple[int | None, ...]] = lambda cfg, n: (None,) * n,
    qkv_bias: bool,
    out_bias: bool,
    mlp_bias: bool = False,
) -> ModelArch:
    """The family that Llama founded: RMS norm, rotary positions, gated MLP, grouped heads."""
    cfg = {**defaults, **cfg}
    hidden, num_layers, heads = (
        _size(cfg, "hidden_size"),
        _size(cfg, "num_hidden_layers"),
        _size(cfg, "num_attention_heads"),
    )
    head_dim = _size(cfg, "head_dim", default=hidden // heads)
    max_position = _size(cfg, "max_position_embeddings")
    return ModelArch(
        architecture=architecture,
        hidden_size=hidden,
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=_kv_heads(heads, _size(cfg, "num_key_value_heads", default=heads), architecture),
        head_dim=head_dim,
        intermediate_size=_size(cfg, "intermediate_size"),
        vocab_size=_size(cfg, "vocab_size"),
        max_position=max_position,
        norm_eps=float(cfg["rms_norm_eps"]),
        activation=str(cfg["hidden_act"]),
        tie_word_embeddings=bool(cfg.get("tie_word_embeddings", False)),
        attention_bias=qkv_bias,
        attention_out_bias=out_bias,
        mlp_bias=mlp_bias,
        rope=_rope(cfg, head_dim, max_position),
        sliding_windows=windows(cfg, num_layers),
        attention_scale=head_dim**-0.5,
        bos_token_id=_bos(cfg),
        eos_token_ids=token_ids(cfg.get("eos_token_id")),
        pad_token_id=cfg.get("pad_token_id"),
        extra=cfg,
    )


def _bos(cfg: RawConfig) -> int | None:
    ids = token_ids(cfg.get("bos_token_id"))
    return ids[0] if ids else None


_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MISTRAL = {
    **_LLAMA,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
_QWEN2 = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
}
_QWEN3 = {**_QWEN2, "head_dim": 128}
_OPT = {
    "vocab_size": 50272,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "ffn_dim": 3072,
    "max_position_embeddings": 2048,
    "do_layer_norm_before": True,
    "_remove_final_layer_norm": False,
    "word_embed_proj_dim": None,
    "num_attention_heads": 12,
    "activation_function": "relu",
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "tie_word_embeddings": True,
}
_GPT2 = {
    "vocab_size": 50257,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "tie_word_embeddings": True,
}


def _read_llama(architecture: str, cfg: RawConfig) -> ModelArch:
    bias = bool(cfg.get("attention_bias", False))
    mlp_bias = bool(cfg.get("mlp_bias", False))
    return _llama_like(architecture, cfg, defaults=_LLAMA, qkv_bias=bias, out_bias=bias, mlp_bias=mlp_bias)


def _read_mistral(architecture: str, cfg: RawConfig) -> ModelArch:
    return _llama_like(
        architecture,
        cfg,
        defaults=_MISTRAL,
        windows=lambda cfg, n: (cfg["sliding_window"],) * n,
        qkv_bias=False,
        out_bias=False,
    )


def _read_qwen2(architecture: str, cfg: RawConfig) -> ModelArch:
    # The biases are part of the architecture: Qwen2's modeling code reads no flag for them.
    return _llama_like(architecture, cfg, defaults=_QWEN2, windows=_layer_windows, qkv_bias=True, out_bias=False)


def _read_qwen3(architecture: str, cfg: RawConfig) -> ModelArch:
    bias = bool(cfg.get("attention_bias", False))
    return _llama_like(architecture, cfg, defaults=_QWEN3, windows=_layer_windows, qkv_bias=bias, out_bias=bias)


def _read_generic(architecture: str, cfg: RawConfig) -> ModelArch:
    """Architectures registered from outside: Llama's names, and nothing assumed about the sizes."""
    bias = bool(cfg.get("attention_bias", False))
    kinds = cfg.get("layer_types")
    window = cfg.get("sliding_window")

    def windows(cfg: RawConfig, n: int) -> tuple[int | None, ...]:
        return _windows_of_kinds(kinds, window, n) if kinds is not None else (None,) * n

    return _llama_like(
        architecture,
        cfg,
        defaults={"rms_norm_eps": 1e-6, "hidden_act": "silu"},
        windows=windows,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bool(cfg.get("mlp_bias", False)),
    )


def _read_opt(architecture: str, cfg: RawConfig) -> ModelArch:
    cfg = {**_OPT, **cfg}
    hidden, heads, num_layers = (
        _size(cfg, "hidden_size"),
        _size(cfg, "num_attention_heads"),
        _size(cfg, "num_hidden_layers"),
    )
    if cfg["word_embed_proj_dim"] is None:
        cfg["word_embed_proj_dim"] = hidden
    bias = bool(cfg["enable_bias"])
    return ModelArch(
        architecture=architecture,
        hidden_size=hidden,
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=_size(cfg, "ffn_dim"),
        vocab_size=_size(cfg, "vocab_size"),
        max_position=_size(cfg, "max_position_embeddings"),
        norm_eps=1e-5,
        activation=str(cfg["activation_function"]),
        tie_word_embeddings=bool(cfg["tie_word_embeddings"]),
        attention_bias=bias,
        attention_out_bias=bias,
        mlp_bias=bias,
        rope=None,
        sliding_windows=(None,) * num_layers,
        attention_scale=(hidden // heads) ** -0.5,
        bos_token_id=_bos(cfg),
        eos_token_ids=token_ids(cfg["eos_token_id"]),
        pad_token_id=cfg["pad_token_id"],
        extra=cfg,
    )


def _read_gpt2(architecture: str, cfg: RawConfig) -> ModelArch:
    cfg = {**_GPT2, **cfg}
    hidden = _size(cfg, "n_embd", "hidden_size", default=768)
    num_layers = _size(cfg, "n_layer", "num_hidden_layers", default=12)
    heads = _size(cfg, "n_head", "num_attention_heads", default=12)
    return ModelArch(
        architecture=architecture,
        hidden_size=hidden,
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=_size(cfg, "n_inner", default=4 * hidden),
        vocab_size=_size(cfg, "vocab_size"),
        max_position=_size(cfg, "n_positions", "max_position_embeddings", default=1024),
        norm_eps=float(cfg["layer_norm_epsilon"]),
        activation=str(cfg["activation_function"]),
        tie_word_embeddings=bool(cfg["tie_word_embeddings"]),
        attention_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        rope=None,
        sliding_windows=(None,) * num_layers,
        attention_scale=(hidden // heads) ** -0.5 if cfg["scale_attn_weights"] else 1.0,
        bos_token_id=_bos(cfg),
        eos_token_ids=token_ids(cfg["eos_token_id"]),
        pad_token_id=cfg.get("pad_token_id"),
        extra=cfg,
    )


_READERS: Mapping[str, Callable[[str, RawConfig], ModelArch]] = {
    "llama": _read_llama,
    "mistral": _read_mistral,
    "qwen2": _read_qwen2,
    "qwen3": _read_qwen3,
    "opt": _read_opt,
    "gpt2": _read_gpt2,
}
