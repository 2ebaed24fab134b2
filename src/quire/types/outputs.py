"""What the user sees of a request. Owns: the names of vLLM's output fields; computes nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Generic, TypeAlias, TypeVar


@dataclass(slots=True)
class Logprob:
    """Natural log probability of one token; `rank` is 1 for the most likely token of its position."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


SampleLogprobs: TypeAlias = list[dict[int, Logprob]]
PromptLogprobs: TypeAlias = list[dict[int, Logprob] | None]


@dataclass(slots=True)
class CompletionOutput:
    """One sequence of a request.

    `finish_reason` is "stop", "length" or "abort", None while it runs; `stop_reason` is the stop string or the
    stop token id that ended it, None for the model's own end token.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: SampleLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    lora_request: Any = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """Times in seconds of the output side's clock (`arrival_time` when the request was made)."""

    arrival_time: float
    scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    num_generation_tokens: int = 0
    num_preemptions: int = 0

    @property
    def first_token_latency(self) -> float | None:
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time


@dataclass(slots=True)
class RequestOutput:
    """The state of a request, `outputs` in the order of their indices.

    `prompt_logprobs` has one entry for each prompt token, the first None. `num_cached_tokens` is how much of the prompt
    came from the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: PromptLogprobs | None = None
    outputs: list[CompletionOutput] = field(default_factory=list[CompletionOutput])
    finished: bool = False
    metrics: RequestMetrics | None = None
    lora_request: Any = None
    num_cached_tokens: int | None = None


@dataclass(slots=True)
class PoolingOutput:
    """What became of a prompt: a vector (D,), or one for each of its tokens (L, D), float32. A `torch.Tensor` where
    `LLM` or `AsyncLLM.encode` answers, a NumPy array before."""

    data: Any


@dataclass(slots=True)
class EmbeddingOutput:
    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        return len(self.embedding)


@dataclass(slots=True)
class ClassificationOutput:
    """`probs`: one for each class; raw scores where `use_activation` is off."""

    probs: list[float]

    @property
    def num_classes(self) -> int:
        return len(self.probs)


@dataclass(slots=True)
class ScoringOutput:
    score: float


Pooled = TypeVar("Pooled")


@dataclass(slots=True)
class PoolingRequestOutput(Generic[Pooled]):
    """A prompt that was pooled. `num_cached_tokens` is how much of it came from the prefix cache. `error`: why there is
    nothing in `outputs`, where something went wrong."""

    request_id: str
    outputs: Pooled
    prompt_token_ids: list[int]
    finished: bool = True
    num_cached_tokens: int | None = None
    metrics: RequestMetrics | None = None
    error: str | None = None


class EmbeddingRequestOutput(PoolingRequestOutput[EmbeddingOutput]):
    """A prompt that was embedded."""


class ClassificationRequestOutput(PoolingRequestOutput[ClassificationOutput]):
    """A prompt that was classified."""


class ScoringRequestOutput(PoolingRequestOutput[ScoringOutput]):
    """A pair of texts that was scored."""


def error_of(output: RequestOutput | PoolingRequestOutput[Any]) -> str | None:
    """Why a request ended with an error, if it did."""
    if isinstance(output, PoolingRequestOutput):
        return output.error
    return next((str(o.stop_reason) for o in output.outputs if o.finish_reason == "error"), None)


@dataclass(slots=True)
class BeamSearchSequence:
    """One beam: `tokens` begins with the prompt; `cum_logprob` is the sum over the generated tokens."""

    tokens: list[int]
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: SampleLogprobs = field(default_factory=list[dict[int, Logprob]])
    lora_request: Any = None


@dataclass(slots=True)
class BeamSearchOutput:
    """The beams of one prompt, best first."""

    sequences: list[BeamSearchSequence]
