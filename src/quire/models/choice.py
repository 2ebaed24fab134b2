"""Whose code runs a checkpoint: quire's own class, or the model's from Transformers.

Owns: that choice, and the architecture that goes with it. Imports neither torch nor Transformers where the class is
quire's own.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from quire.config.arch import ModelArch, arch_from_hf, architecture_of
from quire.models.bodies import body_architecture
from quire.models.registry import ModelRegistry
from quire.types.errors import ClientError

QUIRE, TRANSFORMERS = "quire", "transformers"
ENCODER = "encoder"  # from Transformers' code too, over whole sequences


def choose(
    raw: dict[str, Any], folder: Path, impl: str, trust_remote_code: bool, pools: bool = False
) -> tuple[ModelArch, str]:
    """(architecture, `QUIRE` | `TRANSFORMERS` | `ENCODER`) for the configuration `raw` of the checkpoint in `folder`.

    `impl`: "auto" takes quire's own class where there is one, "quire" (or "vllm") insists on it, "transformers" never
    takes it. `pools`: it is to embed or classify, not to generate. Raises `ClientError` for what nobody can run.
    """
    if pools:
        return _choose_pooling(raw, folder, impl, trust_remote_code)
    if impl == TRANSFORMERS:
        return _backend().describe(raw, folder, trust_remote_code), TRANSFORMERS
    if impl != "auto" or "model_type" not in raw or architecture_of(raw) in ModelRegistry.get_supported_archs():
        return arch_from_hf(raw), QUIRE
    try:
        return _backend().describe(raw, folder, trust_remote_code), TRANSFORMERS
    except ClientError as error:
        text = f"quire has no class of its own for {architecture_of(raw)}, and {error}"
        raise ClientError(text, error.parameter, error.value) from error


def _choose_pooling(raw: dict[str, Any], folder: Path, impl: str, trust_remote_code: bool) -> tuple[ModelArch, str]:
    name = architecture_of(raw)
    known = body_architecture(name) in ModelRegistry.get_supported_archs()
    if looks_back_only(raw) and impl != TRANSFORMERS and (known or impl != "auto"):
        return arch_from_hf(raw), QUIRE
    try:
        return _backend(".encoders").describe(raw, folder, trust_remote_code), ENCODER
    except ClientError as error:
        if error.parameter == "trust_remote_code":
            raise
        raise ClientError(f"{error}; of decoders quire pools those that it has a class for", "model", name) from error


def looks_back_only(raw: dict[str, Any]) -> bool:
    """Whether a decoder's configuration says nothing of attention to what follows."""
    return raw.get("is_causal") is not False and not raw.get("use_bidirectional_attention")


def _backend(module: str = ".describe") -> Any:
    try:
        return import_module(module, "quire.models.transformers")
    except ImportError as error:
        raise ClientError(
            f"running it from Transformers' code needs the package transformers, version 5.17 ({error}): "
            "pip install 'quire[transformers]'",
            "model_impl",
            TRANSFORMERS,
        ) from error


def backend_class() -> type[Any]:
    """The class of models that run from Transformers' code."""
    return import_module("quire.models.transformers.model").TransformersForCausalLM


def encoder_class() -> type[Any]:
    """The class of encoders that run from Transformers' code."""
    return import_module("quire.models.transformers.encoder").TransformersEncoder
