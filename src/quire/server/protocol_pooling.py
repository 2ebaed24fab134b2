"""The bodies of the endpoints that pool: OpenAI's embeddings, vLLM's pooling, classes and scores, Jina's and Cohere's
reranking.

Owns: names, types, defaults, and how a body's fields become `PoolingParams`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from quire.server.protocol import (
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_SEQUENCES,
    Body,
    Count,
    Int64,
    Items,
    Message,
    RequestId,
    TokenId,
    Tool,
)
from quire.types.errors import ClientError
from quire.types.pooling import PoolingParams

MAX_PAIRS = 2048

Texts = (
    str
    | Annotated[Items[str], Field(max_length=MAX_SEQUENCES)]
    | Items[TokenId]
    | Annotated[Items[Items[TokenId]], Field(max_length=MAX_SEQUENCES)]
)
NOT_YET: dict[str, tuple[Any, ...]] = {
    "late_chunking_params": (),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
}


class Pooling(Body):
    """What every body that pools may say."""

    model: str | None = None
    user: str | None = None
    truncate_prompt_tokens: Annotated[Count, Field(ge=-1)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    padding: Literal["max_length", "do_not_pad"] | None = None
    use_activation: bool | None = None
    normalize: bool | None = None
    request_id: RequestId | None = None
    priority: Int64 = 0
    cache_salt: str | None = Field(default=None, min_length=1, max_length=1024)

    def params(self, task: str | None, dimensions: int | None = None) -> PoolingParams:
        """Raises ClientError."""
        for name, value in (self.model_extra or {}).items():
            if name in NOT_YET and value is not None and value not in NOT_YET[name]:
                raise ClientError(f"{name} is not supported: leave it out", name)
        if self.padding == "max_length":
            raise ClientError("padding='max_length' is not supported: prompts are never padded", "padding")
        return PoolingParams(
            task=task,
            dimensions=dimensions,
            use_activation=self.use_activation,
            normalize=self.normalize,
            truncate_prompt_tokens=self.truncate_prompt_tokens,
            truncation_side=self.truncation_side,
        )


class Inputs(Pooling):
    """Texts, token ids, or a conversation that becomes one prompt by the chat template."""

    input: Texts | None = None
    messages: Annotated[Items[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = False
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[Items[Tool], Field(max_length=MAX_PARTS)] | None = None


class Encoding(Inputs):
    """How vectors are written: as numbers, or as the bytes of numbers in base64."""

    encoding_format: Literal["float", "base64"] = "float"
    embed_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    endianness: Literal["native", "little", "big"] = "native"
    dimensions: Annotated[Count, Field(ge=1)] | None = None


class EmbeddingRequest(Encoding):
    pass


class PoolingRequest(Encoding):
    task: Literal["embed", "classify", "token_embed", "token_classify"] | None = None


class ClassifyRequest(Inputs):
    pass


class ScoreText(Body):
    """A text in parts."""

    text: str | None = None
    content: str | Annotated[Items[dict[str, Any]], Field(max_length=MAX_PARTS)] | None = None


ScoreTexts = str | ScoreText | Annotated[Items[str | ScoreText], Field(max_length=MAX_PAIRS)]


class Scoring(Pooling):
    max_tokens_per_query: Annotated[Count, Field(ge=0)] = 0
    max_tokens_per_doc: Annotated[Count, Field(ge=0)] = 0
    instruction: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class ScoreRequest(Scoring):
    """Pairs, under any one of these pairs of names."""

    text_1: ScoreTexts | None = None
    text_2: ScoreTexts | None = None
    data_1: ScoreTexts | None = None
    data_2: ScoreTexts | None = None
    queries: ScoreTexts | None = None
    documents: ScoreTexts | None = None
    items: ScoreTexts | None = None


class RerankRequest(Scoring):
    query: str | ScoreText
    documents: Annotated[Items[str | ScoreText], Field(min_length=1, max_length=MAX_PAIRS)]
    top_n: Annotated[Count, Field(ge=0)] | None = None
    return_documents: bool | None = None


# -- answers ---------------------------------------------------------------------------------------------------------


class PoolingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: dict[str, int] | None = None


class Answer(BaseModel):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    usage: PoolingUsage


class EmbeddingData(BaseModel):
    index: int
    object: Literal["embedding"] = "embedding"
    embedding: list[float] | str


class EmbeddingResponse(Answer):
    data: list[EmbeddingData]


class PoolingData(BaseModel):
    index: int
    object: Literal["pooling"] = "pooling"
    data: list[list[float]] | list[float] | str


class PoolingResponse(Answer):
    data: list[PoolingData]


class ClassData(BaseModel):
    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassifyResponse(Answer):
    data: list[ClassData]


class ScoreData(BaseModel):
    index: int
    object: Literal["score"] = "score"
    score: float


class ScoreResponse(Answer):
    data: list[ScoreData]


class RerankDocument(BaseModel):
    text: str


class RerankResult(BaseModel):
    index: int
    document: RerankDocument | None = None
    relevance_score: float


class RerankResponse(BaseModel):
    id: str
    model: str
    usage: PoolingUsage
    results: list[RerankResult]
