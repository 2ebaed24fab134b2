"""Whose code runs a checkpoint: quire's own class, or the model's from Transformers.

Owns: that choice, and the architecture that goes with it. Imports neither torch nor Transformers where the class is
quire's own.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from quire.config.arch import ModelArch, arch_from_hf, architecture_of
from quire.models.registry import whole_of
from quire.types.errors import ClientError

QUIRE, TRANSFORMERS = "quire", "transformers"


def choose(raw: dict[str, Any], folder: Path, impl: str, trust_remote_code: bool) -> tuple[ModelArch, str]:
    """(architecture, `QUIRE` | `TRANSFORMERS`) for the configuration `raw` of the checkpoint in `folder`.

    `impl`: "auto" takes quire's own class where there is one, "quire" (or "vllm") insists on it, "transformers" never
    takes it. Raises `ClientError` for what nobody can run.
    """
    if impl == TRANSFORMERS:
        return _backend().describe(raw, folder, trust_remote_code), TRANSFORMERS
    if impl != "auto" or "model_type" not in raw or whole_of(architecture_of(raw)) is not None:
        return arch_from_hf(raw), QUIRE
    try:
        return _backend().describe(raw, folder, trust_remote_code), TRANSFORMERS
    except ClientError as error:
        name = architecture_of(raw)
        raise ClientError(f"quire has no class of its own for {name}, and {error}", "model", name) from error


def _backend() -> Any:
    try:
        return import_module("quire.models.transformers.describe")
    except ImportError as error:
        raise ClientError(
            f"running it from Transformers' code needs the package transformers, version 5 ({error}): "
            "pip install 'quire[transformers]'",
            "model_impl",
            TRANSFORMERS,
        ) from error


def backend_class() -> type[Any]:
    """The class of models that run from Transformers' code."""
    return import_module("quire.models.transformers.model").TransformersForCausalLM
