"""A checkpoint's configuration as Transformers understands it, and the `ModelArch` that follows from it.

Owns: `hf_config`, the rule when code from a checkpoint may run, and the reading of sizes. What is read here is held to
what the model then does (`proof`), so a guess that is wrong is refused, never run.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from quire.config.arch import ModelArch, architecture_of, token_ids
from quire.types.errors import ClientError

OLDEST = (5, 17)


def describe(raw: Mapping[str, Any], folder: Path, trust_remote_code: bool) -> ModelArch:
    """The architecture of the decoder that `raw` (config.json, overrides included) describes."""
    config = hf_config(raw, folder, trust_remote_code)
    model_class(config, raw, folder, trust_remote_code)
    return arch_of(config, raw)


def uses_own_code(raw: Mapping[str, Any], trust_remote_code: bool) -> bool:
    """Whether code of the checkpoint runs: where it is trusted and there, or where nothing else could. Raises
    `ClientError` where it would have to run untrusted."""
    has_code = bool(raw.get("auto_map"))
    if has_code and trust_remote_code:
        return True
    known = str(raw.get("model_type", "")) in transformers.CONFIG_MAPPING
    if has_code and not known:
        raise ClientError(
            f"the model's code ({architecture_of(raw)}) comes with the checkpoint, as {raw['auto_map']}, and would run "
            "on this machine with your rights: read it, then pass trust_remote_code=True (--trust-remote-code)",
            "trust_remote_code",
            False,
        )
    if not known:
        raise ClientError(
            f"transformers {transformers.__version__} does not know model_type={raw.get('model_type')!r} either: "
            "upgrade it, or register the model with ModelRegistry.register_model",
            "model",
            raw.get("model_type"),
        )
    return False


def hf_config(raw: Mapping[str, Any], folder: Path, trust_remote_code: bool) -> Any:
    """Transformers' configuration object of `raw`."""
    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < OLDEST:
        raise ClientError(
            f"transformers {transformers.__version__} is too old to run models from its code: "
            f"pip install 'transformers>={'.'.join(map(str, OLDEST))}'",
            "model_impl",
            "transformers",
        )
    own = uses_own_code(raw, trust_remote_code)
    try:
        if own and "AutoConfig" in raw["auto_map"]:
            made = get_class_from_dynamic_module(raw["auto_map"]["AutoConfig"], str(folder))
        else:
            made = type(AutoConfig.for_model(str(raw["model_type"])))
        config = made.from_dict(made._decode_special_floats(dict(raw)))
    except ClientError:
        raise
    except Exception as error:  # anything that a configuration's code may raise
        raise _unreadable(raw, error) from error
    config.name_or_path = str(folder)
    return config


def _unreadable(raw: Mapping[str, Any], error: Exception) -> ClientError:
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    return ClientError(f"Transformers cannot read config.json of {architecture_of(raw)} ({text})", "model")


def model_class(config: Any, raw: Mapping[str, Any], folder: Path, trust_remote_code: bool) -> type[Any]:
    """The class with a language model's head. Raises `ClientError` where there is none, or where it computes its
    attention by itself."""
    if uses_own_code(raw, trust_remote_code):
        names = raw["auto_map"]
        reference = names.get("AutoModelForCausalLM") or names.get("AutoModel")
        if reference is not None:
            return get_class_from_dynamic_module(reference, str(folder))
    name = architecture_of(raw)
    if not hasattr(transformers, name):
        heads = [known for known in dir(transformers) if known.endswith(("ForCausalLM", "LMHeadModel"))]
        near = difflib.get_close_matches(name, heads, 3, 0.5)
        closest = f": the closest are {', '.join(near)}" if near else ""
        raise ClientError(f"Transformers has no {name}{closest}", "model", name)
    found: Any = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if isinstance(found, tuple):
        found = found[0]
    if found is None or config.is_encoder_decoder:
        raise ClientError(f"Transformers has no causal language model for {name}", "model", name)
    if found.__name__.endswith("ForConditionalGeneration"):
        raise ClientError(f"{found.__name__} takes images or sounds: models are text-only for now", "model", name)
    if not asks_for_attention(found):
        raise ClientError(
            f"{found.__name__} computes its attention by itself, not through Transformers' attention interface, so "
            "that quire's paged attention cannot take its place",
            "model",
            name,
        )
    return found


def asks_for_attention(made: type[Any]) -> bool:
    """Whether the module in which the class is written uses the attention interface at all."""
    return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(inspect.getmodule(made) or made)


def arch_of(config: Any, raw: Mapping[str, Any]) -> ModelArch:
    """Sizes by the names that Transformers gives them in every configuration."""
    text = config.get_text_config(decoder=True)
    layers, heads, hidden = (_size(text, n) for n in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    kv_heads = getattr(text, "num_key_value_heads", None) or (1 if getattr(text, "multi_query", False) else heads)
    head_dim = getattr(text, "head_dim", None) or hidden // heads
    if (plain := getattr(text, "qk_nope_head_dim", None)) is not None:  # latent attention, kept as whole keys
        head_dim, kv_heads = plain + text.qk_rope_head_dim, heads
    longest = getattr(text, "max_position_embeddings", None) or getattr(text, "seq_length", None) or 2048
    return ModelArch(
        architecture=architecture_of(raw),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=int(kv_heads),
        head_dim=int(head_dim),
        intermediate_size=int(getattr(text, "intermediate_size", None) or 4 * hidden),
        vocab_size=_size(text, "vocab_size"),
        max_position=longest_of(text, int(longest)),
        norm_eps=float(getattr(text, "rms_norm_eps", None) or 1e-6),
        activation=str(getattr(text, "hidden_act", None) or ""),
        tie_word_embeddings=bool(getattr(config, "tie_word_embeddings", False)),
        attention_bias=False,
        attention_out_bias=False,
        mlp_bias=False,
        rope=None,
        sliding_windows=windows(text, layers),
        attention_scale=float(head_dim) ** -0.5,
        bos_token_id=next(iter(token_ids(getattr(text, "bos_token_id", None))), None),
        eos_token_ids=token_ids(getattr(text, "eos_token_id", None)),
        pad_token_id=getattr(text, "pad_token_id", None),
        extra=dict(raw),
    )


def _size(text: Any, name: str) -> int:
    value = getattr(text, name, None)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ClientError(f"config.json: {name}={value!r} must be a positive integer", name, value)
    return value


def longest_of(text: Any, written: int) -> int:
    """The longest sequence, with rope scaling counted in where it does not depend on the batch."""
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor")
    if not isinstance(factor, int | float):
        return written
    if kind == "yarn":
        return max(written, int(factor * (rope.get("original_max_position_embeddings") or written)))
    return int(written * factor) if kind == "linear" else written


def windows(text: Any, layers: int) -> tuple[int | None, ...]:
    """The layers' windows where the configuration names each layer's kind. Elsewhere none: a layer's own window holds
    all the same, only the blocks behind it are kept."""
    kinds, window = getattr(text, "layer_types", None), getattr(text, "sliding_window", None)
    if kinds is None or not isinstance(window, int) or len(kinds) != layers:
        return (None,) * layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
