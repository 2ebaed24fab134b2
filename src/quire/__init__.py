"""quire: an LLM inference engine with vLLM's interface.

Owns: the public names, loaded when they are first used, so that `import quire` takes a moment and no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from quire.utils.version import VERSION as __version__

if TYPE_CHECKING:
    from quire.config.args import EngineArgs
    from quire.engine.async_engine import AsyncLLM
    from quire.engine.llm_engine import LLMEngine
    from quire.llm import LLM
    from quire.models.registry import ModelRegistry
    from quire.types.errors import ClientError, EngineError
    from quire.types.outputs import (
        ClassificationOutput,
        ClassificationRequestOutput,
        CompletionOutput,
        EmbeddingOutput,
        EmbeddingRequestOutput,
        PoolingOutput,
        PoolingRequestOutput,
        RequestOutput,
        ScoringOutput,
        ScoringRequestOutput,
    )
    from quire.types.params import BeamSearchParams, SamplingParams, StructuredOutputsParams
    from quire.types.pooling import PoolingParams
    from quire.types.prompts import PromptType, TextPrompt, TokensPrompt

    AsyncEngineArgs = EngineArgs

_HOMES = {
    "AsyncEngineArgs": "quire.config.args",
    "AsyncLLM": "quire.engine.async_engine",
    "BeamSearchParams": "quire.types.params",
    "ClassificationOutput": "quire.types.outputs",
    "ClassificationRequestOutput": "quire.types.outputs",
    "ClientError": "quire.types.errors",
    "CompletionOutput": "quire.types.outputs",
    "EmbeddingOutput": "quire.types.outputs",
    "EmbeddingRequestOutput": "quire.types.outputs",
    "EngineArgs": "quire.config.args",
    "EngineError": "quire.types.errors",
    "LLM": "quire.llm",
    "LLMEngine": "quire.engine.llm_engine",
    "ModelRegistry": "quire.models.registry",
    "PoolingOutput": "quire.types.outputs",
    "PoolingParams": "quire.types.pooling",
    "PoolingRequestOutput": "quire.types.outputs",
    "PromptType": "quire.types.prompts",
    "RequestOutput": "quire.types.outputs",
    "SamplingParams": "quire.types.params",
    "ScoringOutput": "quire.types.outputs",
    "ScoringRequestOutput": "quire.types.outputs",
    "StructuredOutputsParams": "quire.types.params",
    "TextPrompt": "quire.types.prompts",
    "TokensPrompt": "quire.types.prompts",
}

__all__ = [
    "LLM",
    "AsyncEngineArgs",
    "AsyncLLM",
    "BeamSearchParams",
    "ClassificationOutput",
    "ClassificationRequestOutput",
    "ClientError",
    "CompletionOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "EngineArgs",
    "EngineError",
    "LLMEngine",
    "ModelRegistry",
    "PoolingOutput",
    "PoolingParams",
    "PoolingRequestOutput",
    "PromptType",
    "RequestOutput",
    "SamplingParams",
    "ScoringOutput",
    "ScoringRequestOutput",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'quire' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
