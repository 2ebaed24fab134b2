"""Which of Transformers' classes runs an encoder: one in which every token of a text sees every other.

Owns: that choice and what is read of the configuration. Nothing is made here (`encoder` does).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from quire.config.arch import ModelArch, architecture_of
from quire.models.transformers.describe import arch_of, asks_for_attention, hf_config, uses_own_code
from quire.types.errors import ClientError

# In Transformers' code this function counts positions from behind the padding's.
COUNTED = "create_position_ids_from_input_ids"


def describe(raw: Mapping[str, Any], folder: Path, trust_remote_code: bool) -> ModelArch:
    """Raises `ClientError` for what is no encoder, or cannot run as one."""
    config = hf_config(raw, folder, trust_remote_code)
    made = encoder_class(config, raw, folder, trust_remote_code, "embed")
    arch = arch_of(config, raw)
    first = first_position(made, config)
    return replace(arch, max_position=arch.max_position - first, sliding_windows=(None,) * arch.num_layers)


def encoder_class(config: Any, raw: Mapping[str, Any], folder: Path, trust_remote_code: bool, head: str) -> type[Any]:
    """`head`: "embed" (none), "classify" or "token_classify". Raises `ClientError`."""
    name = architecture_of(raw)
    mapping, key = _MAPPINGS[head]
    own = raw.get("auto_map", {}).get(key) if uses_own_code(raw, trust_remote_code) else None
    if own is not None:
        return get_class_from_dynamic_module(own, str(folder))
    found: Any = mapping._model_mapping.get(type(config), None)
    found = found[0] if isinstance(found, tuple) else found
    if found is None:
        raise ClientError(f"Transformers has no class that makes {name} {_WANTED[head]}", "model", name)
    both_ways = config.__dict__.get("is_causal") is False or getattr(config, "use_bidirectional_attention", False)
    masked = type(config) in AutoModelForMaskedLM._model_mapping
    if not both_ways and (not masked or getattr(config, "is_decoder", False) or config.is_encoder_decoder):
        raise ClientError(f"{name} is neither an encoder of Transformers' nor a decoder that quire has", "model", name)
    if not asks_for_attention(found):
        raise ClientError(
            f"{found.__name__} computes its attention by itself, not through Transformers' attention interface",
            "model",
            name,
        )
    return found


def first_position(made: type[Any], config: Any) -> int:
    """The number of a text's first position."""
    module = inspect.getmodule(made)
    counted = module is not None and COUNTED in inspect.getsource(module)
    return int(config.pad_token_id or 0) + 1 if counted else 0


_MAPPINGS: Mapping[str, tuple[Any, str]] = {
    "embed": (AutoModel, "AutoModel"),
    "classify": (AutoModelForSequenceClassification, "AutoModelForSequenceClassification"),
    "token_classify": (AutoModelForTokenClassification, "AutoModelForTokenClassification"),
}
_WANTED = {"embed": "an encoder", "classify": "classify texts", "token_classify": "classify tokens"}
