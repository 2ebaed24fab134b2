"""Jobs and sequences: what the core remembers of a request. Numbers that every step touches live in `core.rows`."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from quire.core.hashing import root_hash
from quire.types.plan import PromptLogprobs, TokenLogprobs
from quire.types.request import Request

if TYPE_CHECKING:
    from quire.core.decoding import Decoding


class Status(enum.IntEnum):
    WAITING = 0  # in the queue; no row, no device blocks (perhaps host blocks)
    RUNNING = 1  # has a row
    PARKED = 2  # held back, or a preempted beam whose candidates are in and whose siblings' are not
    FINISHED = 3


class Sequence:
    """One line of tokens: the prompt, then what was sampled and is known to the host.

    `tables[g][j]` is the page of group g for block j, -1 where there is none (behind a window, not yet computed).
    `hashes` name the full blocks; the first `published` of them are in the prefix cache. `host` holds
    (group, block index, host page) of a swapped sequence, and `swapped` how many of its tokens they cover.
    `snapshots` are the blocks whose page in a state group holds the state at exactly the block's end.
    """

    __slots__ = (
        "candidates", "cumulative_logprob", "first_page", "hashes", "host", "index", "job", "key", "logprobs",
        "published", "row", "sent", "snapshots", "status", "swapped", "tables", "tokens",
    )  # fmt: skip

    def __init__(self, job: Job, index: int, tokens: list[int], num_groups: int) -> None:
        self.job = job
        self.index = index
        self.key = (job.priority, job.arrival, index)  # its place in every queue: smaller goes first
        self.tokens = tokens
        self.row = -1
        self.status = Status.WAITING
        self.tables: list[list[int]] = [[] for _ in range(num_groups)]
        self.first_page = [0] * num_groups
        self.hashes: list[bytes] = []
        self.published = 0
        self.snapshots: set[int] = set()
        self.host: list[tuple[int, int, int]] | None = None
        self.swapped = 0
        self.sent = len(tokens)
        self.logprobs: list[TokenLogprobs] | None = None
        self.candidates: TokenLogprobs | None = None
        self.cumulative_logprob = 0.0

    @property
    def num_outputs(self) -> int:
        return len(self.tokens) - self.job.prompt_length


class Job:
    """The life of a request in the core: its sequences and how they fork and end.

    `limit`: tokens, prompt included, at which a sequence ends. `eos`, `stops`: the model's and the user's tokens that
    end one, the model's not before `min_tokens`. `cached_tokens`: how much of the prompt the prefix cache gave, None
    until the request has run. `prompt_logprobs_end`: the first prompt token that still owes its logprobs. `skip_cache`:
    it must compute its whole prompt, since it asks for prompt logprobs or not to be given cached ones. `whole`: without
    a break between two steps, since what is pooled is kept beside the pages.
    """

    __slots__ = (
        "arrival", "cached_tokens", "decoding", "eos", "forked", "limit", "live", "min_tokens", "preemptions",
        "priority", "prompt_length", "prompt_logprobs", "prompt_logprobs_end", "request", "root", "skip_cache", "stops",
        "whole",
    )  # fmt: skip

    def __init__(self, request: Request, decoding: Decoding, arrival: int, limit: int, priority: int) -> None:
        self.request = request
        self.decoding = decoding
        self.arrival = arrival
        self.limit = limit
        self.priority = priority
        self.prompt_length = len(request.prompt_token_ids)
        self.root = root_hash(request)
        self.live: dict[int, Sequence] = {}
        self.forked = False
        self.cached_tokens: int | None = None
        self.preemptions = 0
        self.prompt_logprobs: list[PromptLogprobs] = []
        params = decoding.row_params()
        self.prompt_logprobs_end = self.prompt_length if params.prompt_logprobs is None else 1
        # A complete text ends its sequence whatever `ignore_eos` and `min_tokens` say: then an end token is drawn, and
        # only then.
        constrained = params.structured_outputs is not None
        self.eos = frozenset(() if params.ignore_eos and not constrained else request.eos_token_ids)
        self.min_tokens = 0 if constrained else params.min_tokens
        self.stops = frozenset(params.stop_token_ids or ())
        self.skip_cache = bool(params.skip_reading_prefix_cache) or params.prompt_logprobs is not None
        self.whole = decoding.pooled and self.skip_cache
