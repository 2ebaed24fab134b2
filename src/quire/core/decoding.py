"""How a job forks, prunes and ends: `Independent(n)` samples, `Beam(k)` search, `Pooled` ends with its prompt. Knows
tokens and scores, not blocks.

The seam for other strategies: `width` sequences at the most, `lead` sampled tokens that may be unknown to the host when
a sequence is planned again, the sampling parameters of its rows, and, for strategies whose tokens the host `chooses`,
`advance`. Rows of a job that is `pooled` are never sampled.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import msgspec

from quire.core.sequence import Sequence
from quire.types.params import BeamSearchParams, SamplingParams
from quire.types.pooling import PoolingParams
from quire.types.request import Request


class Child(NamedTuple):
    """A beam's continuation: `parent` with `token` behind it."""

    parent: Sequence
    token: int
    cumulative_logprob: float


class Ended(NamedTuple):
    """A finished beam: its output tokens and their summed logprob; `stopped` by an end token or by length."""

    tokens: list[int]
    cumulative_logprob: float
    stopped: bool


class Decoding(Protocol):
    width: int
    lead: int
    chooses: bool
    pooled: bool

    def row_params(self) -> SamplingParams: ...

    def advance(self, beams: list[Sequence], limit: int) -> list[Child] | None:
        """All live sequences have their candidates: choose. None: the job is done."""
        ...


class Independent:
    """n samples that share the prompt and nothing else."""

    chooses = False
    pooled = False

    def __init__(self, params: SamplingParams, lead: int) -> None:
        self.width = params.n
        self.lead = 0 if params.logits_processors else lead
        self._params = params

    def row_params(self) -> SamplingParams:
        return self._params

    def advance(self, beams: list[Sequence], limit: int) -> list[Child] | None:
        raise AssertionError("independent samples advance by what the device sampled")


class Beam:
    """Beam search with vLLM's rules: each beam offers its 2k most likely tokens, end tokens complete a beam, the k best
    others go on; the score of a beam is its summed logprob over (tokens, prompt included)^length_penalty."""

    lead = 0
    chooses = True
    pooled = False

    def __init__(self, params: BeamSearchParams, request: Request) -> None:
        self.width = params.beam_width
        self.ended: list[Ended] = []
        self._params = params
        self._prompt = request.prompt_token_ids
        self._eos = frozenset(() if params.ignore_eos else request.eos_token_ids)

    def row_params(self) -> SamplingParams:
        params = SamplingParams(temperature=0.0, max_tokens=self._params.max_tokens, ignore_eos=True, detokenize=False)
        allowed = self._params.allowed_token_ids
        return msgspec.structs.replace(params, logprobs=2 * self.width, allowed_token_ids=allowed)

    def score(self, beam: Ended) -> float:
        length = len(self._prompt) + len(beam.tokens) - beam.stopped
        return beam.cumulative_logprob / length**self._params.length_penalty

    def best(self) -> list[Ended]:
        """The k best finished beams, best first."""
        return sorted(self.ended, key=self.score, reverse=True)[: self.width]

    def advance(self, beams: list[Sequence], limit: int) -> list[Child] | None:
        children: list[Child] = []
        for beam in sorted(beams, key=lambda b: b.cumulative_logprob, reverse=True):
            assert beam.candidates is not None
            ids, values = beam.candidates.ids[0, 1:], beam.candidates.values[0, 1:]
            for token, value in zip(ids.tolist(), values.tolist(), strict=True):
                total = beam.cumulative_logprob + value
                if value == float("-inf"):
                    continue
                if token in self._eos:
                    self.ended.append(Ended([*beam.tokens[len(self._prompt) :], token], total, True))
                else:
                    children.append(Child(beam, token, total))
        children.sort(key=lambda child: child.cumulative_logprob, reverse=True)
        children = children[: self.width]
        if children and len(children[0].parent.tokens) + 1 < limit:
            return children
        outputs = len(self._prompt)
        self.ended += [Ended([*c.parent.tokens[outputs:], c.token], c.cumulative_logprob, False) for c in children]
        return None


class Pooled:
    """The prompt is computed, and that is all."""

    width = 1
    lead = 0
    chooses = False
    pooled = True

    def __init__(self, params: PoolingParams) -> None:
        skip = params.skip_reading_prefix_cache
        self._params = SamplingParams(max_tokens=1, ignore_eos=True, detokenize=False, skip_reading_prefix_cache=skip)

    def row_params(self) -> SamplingParams:
        return self._params

    def advance(self, beams: list[Sequence], limit: int) -> list[Child] | None:
        raise AssertionError("nothing follows a prompt that is pooled")


def decoding_of(request: Request, lead: int) -> Decoding:
    """The strategy that a request's parameters ask for."""
    if isinstance(request.params, BeamSearchParams):
        return Beam(request.params, request)
    if isinstance(request.params, PoolingParams):
        return Pooled(request.params)
    return Independent(request.params, lead)
