"""What was asked (`Request`) and what the core answers (`Delta`).

Owns: the values that cross between the front (tokenizer, output processing) and the core. No torch, no clock, no text.
"""

from __future__ import annotations

import enum

import msgspec
import numpy as np
from numpy.typing import NDArray

from quire.types.params import BeamSearchParams, SamplingParams
from quire.types.plan import PromptLogprobs, TokenLogprobs
from quire.types.pooling import PoolingParams


class FinishReason(enum.StrEnum):
    """Why a sequence ended. `STOP`: an end token, a stop token or a stop string; `LENGTH`: max_tokens or max_model_len;
    `ABORT`: the caller ended it; `ERROR`: its own work failed (the message is in `Delta.error`)."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class Request(msgspec.Struct, frozen=True):
    """One request as the core sees it: integers only.

    `seed` is the resolved 64-bit seed of its noise. `eos_token_ids` end a sequence unless `params.ignore_eos`.
    `stream`: a delta after each step; else one when a sequence ends (requests with stop strings always stream, since
    the output side looks for them). `cache_salt` and `lora_id` separate prefix-cache entries. `item_hashes` are
    (token index, length, hash) of the multimodal items inside the prompt. `resume`: the request was running elsewhere;
    of each of its sequences the output tokens that are known, None for those that have ended.
    """

    id: str
    prompt_token_ids: list[int]
    params: SamplingParams | BeamSearchParams | PoolingParams
    seed: int
    eos_token_ids: tuple[int, ...] = ()
    priority: int = 0
    stream: bool = True
    cache_salt: str = ""
    lora_id: int = 0
    item_hashes: tuple[tuple[int, int, bytes], ...] = ()
    resume: tuple[list[int] | None, ...] = ()


class Delta(msgspec.Struct, omit_defaults=True):
    """New tokens of one sequence (`index` of its request), perhaps its end.

    `logprobs[i]` belongs to `tokens[i]` (one line each). `stop_token` is the stop token that ended it, if one did that
    the user named. `cumulative_logprob` is set by beam search. `cached_tokens`: how much of the prompt came from the
    prefix cache (set on a request's first delta of each sequence). `planned`, `first`: when the request was first
    planned and when its first token came, in seconds of the machine's monotonic clock (set on its first delta).
    `preemptions`: of its request so far, set
    with `finish`. `pooled`: what a request for pooling asked for, see `StepResult`.
    """

    request_id: str
    index: int
    tokens: list[int]
    finish: FinishReason | None = None
    stop_token: int | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[PromptLogprobs] | None = None
    cumulative_logprob: float | None = None
    cached_tokens: int | None = None
    error: str | None = None
    planned: float | None = None
    first: float | None = None
    preemptions: int = 0
    pooled: NDArray[np.float32] | None = None
