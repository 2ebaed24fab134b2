"""From the core's deltas to what the user sees.

Owns: the text of every sequence, the search for stop strings, logprobs by token id, the gathering of a request's
sequences, and the choice of what each output carries. Of a prompt that is
pooled there is one output. Tells the core, by an `End`, of sequences that a stop string ends: the core may be some
tokens ahead, and whatever it still sends for them is ignored. Knows no queues and no clock but the one it is given.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import msgspec

from quire.engine.detokenizer import Detokenizer, TextStream
from quire.types.errors import ClientError
from quire.types.outputs import (
    CompletionOutput,
    Logprob,
    PoolingOutput,
    PoolingRequestOutput,
    PromptLogprobs,
    RequestMetrics,
    RequestOutput,
)
from quire.types.params import BeamSearchParams, RequestOutputKind, SamplingParams
from quire.types.plan import TokenLogprobs
from quire.types.pooling import PoolingParams
from quire.types.request import Delta, FinishReason, Request

Output = RequestOutput | PoolingRequestOutput[PoolingOutput]


class End(msgspec.Struct, frozen=True):
    """For the core: only the first `at` output tokens of this sequence count."""

    request_id: str
    index: int
    at: int


class Observer(Protocol):
    """Told what the output side sees, for metrics."""

    def between(self, seconds: float, tokens: int) -> None:
        """`tokens` new tokens of a stream came `seconds` after the last ones."""

    def ended(self, request: Request, metrics: RequestMetrics, reasons: list[str], cached: int | None) -> None:
        """A request is over, for `reasons`: one for each of its sequences. `cached`: prompt tokens of the cache's."""


class Unobserved:
    """For those who want no metrics."""

    def between(self, seconds: float, tokens: int) -> None:
        pass

    def ended(self, request: Request, metrics: RequestMetrics, reasons: list[str], cached: int | None) -> None:
        pass


class OutputProcessor:
    """The output side of an engine. `clock` gives seconds; `detokenizer` is None where there is no tokenizer."""

    def __init__(self, detokenizer: Detokenizer | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._detokenizer = detokenizer
        self._clock = clock
        self._requests: dict[str, _RequestState | _PooledState] = {}
        self.observer: Observer = Unobserved()

    def add(self, request: Request, prompt: str | None = None, name: str | None = None) -> None:
        """Expect the deltas of `request`. `prompt` is its text if known; `name` is the id that its outputs carry, where
        it is not `request.id`."""
        if request.id in self._requests:
            raise ClientError(f"request id {request.id!r} is already in use", "request_id", request.id)
        if isinstance(request.params, PoolingParams):
            self._requests[request.id] = _PooledState(request, name, self._clock())
            return
        self._requests[request.id] = _RequestState(request, prompt, name, self._detokenizer, self._clock())

    def abort(self, request_ids: Iterable[str]) -> list[Output]:
        """Forget requests; answers the last output of each, with what there is and the finish reason "abort"."""
        outputs: list[Output] = []
        for request_id in request_ids:
            state = self._requests.pop(request_id, None)
            if state is not None:
                state.abort()
                state.metrics.finished_time = self._clock()
                self.observer.ended(state.request, state.metrics, state.reasons, state.cached_tokens)
                if (last := state.output(finished=True)) is not None:
                    outputs.append(last)
        return outputs

    def process(self, deltas: Iterable[Delta]) -> tuple[list[Output], list[End]]:
        """Take in what a step brought. Answers the outputs that are due and the ends that the core must be told."""
        now = self._clock()
        touched: dict[str, _RequestState | _PooledState] = {}
        ends: list[End] = []
        for delta in deltas:
            state = self._requests.get(delta.request_id)
            if state is None:
                continue
            at = state.take(delta, now, self.observer)
            if at is not None:
                ends.append(End(delta.request_id, delta.index, at))
            touched[delta.request_id] = state
        outputs: list[Output] = []
        for request_id, state in touched.items():
            if finished := state.finished:
                state.metrics.finished_time = now
                del self._requests[request_id]
                self.observer.ended(state.request, state.metrics, state.reasons, state.cached_tokens)
            if (output := state.output(finished)) is not None:
                outputs.append(output)
        return outputs, ends

    @property
    def unfinished(self) -> int:
        return len(self._requests)


class _PooledState:
    """One prompt that is pooled; see `_RequestState`."""

    def __init__(self, request: Request, name: str | None, now: float) -> None:
        self.request, self.name = request, name or request.id
        self.cached_tokens: int | None = None
        self.metrics = RequestMetrics(arrival_time=now)
        self.reasons: list[str] = []
        self._data: Any = None
        self._error: str | None = None

    def take(self, delta: Delta, now: float, observer: Observer) -> None:
        self.cached_tokens, self._data = delta.cached_tokens, delta.pooled
        metrics = self.metrics
        metrics.scheduled_time, metrics.num_preemptions = delta.planned, delta.preemptions
        if delta.finish is not None:
            self.reasons = [delta.finish.value]
        if delta.finish is FinishReason.STOP:
            metrics.first_token_time = metrics.last_token_time = now if delta.first is None else delta.first
        else:
            self._error = delta.error or "the request was aborted"

    def abort(self) -> None:
        self.reasons, self._error = ["abort"], "the request was aborted"

    @property
    def finished(self) -> bool:
        return bool(self.reasons)

    def output(self, finished: bool) -> PoolingRequestOutput[PoolingOutput]:
        return PoolingRequestOutput(
            request_id=self.name,
            outputs=PoolingOutput(self._data),
            prompt_token_ids=self.request.prompt_token_ids,
            finished=finished,
            num_cached_tokens=self.cached_tokens,
            metrics=self.metrics,
            error=self._error,
        )


class _RequestState:
    """One request: its sequences and what they share."""

    def __init__(
        self, request: Request, prompt: str | None, name: str | None, detokenizer: Detokenizer | None, now: float
    ) -> None:
        params = _sampled(request)
        self.request, self.prompt, self.name = request, prompt, name or request.id
        self.beam = isinstance(params, BeamSearchParams)
        count = params.beam_width if isinstance(params, BeamSearchParams) else params.n
        self.kind = RequestOutputKind.FINAL_ONLY if isinstance(params, BeamSearchParams) else params.output_kind
        self.interval = 1 if isinstance(params, BeamSearchParams) else params.stream_interval or 1
        self.sequences = [_SequenceState(i, request, detokenizer) for i in range(count)]
        self.detokenizer = detokenizer
        self.cached_tokens: int | None = None
        self.prompt_logprobs: PromptLogprobs | None = None
        self._names = detokenizer if isinstance(params, SamplingParams) and params.detokenize else None
        if isinstance(params, SamplingParams) and params.prompt_logprobs is not None:
            self.prompt_logprobs = [None for _ in request.prompt_token_ids]
        self.metrics = RequestMetrics(arrival_time=now)

    def take(self, delta: Delta, now: float, observer: Observer) -> int | None:
        """Add a delta; answers the number of tokens at which a stop string ended the sequence, if the core does not
        know that it ended."""
        if self.cached_tokens is None:
            self.cached_tokens = delta.cached_tokens
        for part in delta.prompt_logprobs or ():
            if self.prompt_logprobs is not None:
                lines = _logprob_dicts(part.logprobs, self._names)
                self.prompt_logprobs[part.start : part.start + len(lines)] = lines
        if delta.index >= len(self.sequences):
            return None
        sequence = self.sequences[delta.index]
        before = len(sequence.tokens)
        at = sequence.take(delta, self._names)
        new = len(sequence.tokens) - before
        metrics = self.metrics
        if delta.planned is not None and metrics.scheduled_time is None:
            metrics.scheduled_time = delta.planned
        metrics.num_preemptions += delta.preemptions
        if new:
            metrics.num_generation_tokens += new
            if metrics.first_token_time is None:
                metrics.first_token_time = now if delta.first is None else delta.first
            elif self.request.stream and metrics.last_token_time is not None:
                observer.between(now - metrics.last_token_time, new)
            metrics.last_token_time = now
        return at

    def abort(self) -> None:
        for sequence in self.sequences:
            sequence.end("abort", None)

    @property
    def reasons(self) -> list[str]:
        """Why each sequence ended."""
        return [s.finish_reason for s in self.sequences if s.finish_reason is not None]

    @property
    def finished(self) -> bool:
        """A beam search ends all its beams in one step, though there may be fewer than were asked for."""
        if self.beam and (ended := [s for s in self.sequences if s.finish_reason is not None]):
            self.sequences = ended
            return True
        for sequence in self.sequences:  # noqa: SIM110 - a generator costs a microsecond a request and step
            if sequence.finish_reason is None:
                return False
        return True

    def output(self, finished: bool) -> RequestOutput | None:
        """What is to be told now, if anything is."""
        delta = self.kind is RequestOutputKind.DELTA
        sequences = self.sequences
        if not finished or delta:
            if self.kind is RequestOutputKind.FINAL_ONLY:
                return None
            least = 1 if finished else self.interval
            fresh: list[_SequenceState] = []
            for sequence in sequences:  # most often one: a comprehension is a call
                if sequence.news(least):
                    fresh.append(sequence)
            if not fresh and not finished:
                return None
            sequences = fresh if delta else sequences
        outputs: list[CompletionOutput] = []
        for sequence in sequences:
            outputs.append(sequence.output(delta))
        prompt_logprobs = self.prompt_logprobs
        if delta:  # reported once
            self.prompt_logprobs = None
        return RequestOutput(
            request_id=self.name,
            prompt=self.prompt,
            prompt_token_ids=self.request.prompt_token_ids,
            prompt_logprobs=prompt_logprobs,
            outputs=outputs,
            finished=finished,
            metrics=self.metrics,
            num_cached_tokens=self.cached_tokens,
        )


class _Text:
    """A text that grows at its end, and may be cut there, without being copied each time."""

    def __init__(self) -> None:
        self._buffer = io.StringIO(newline="\n")  # as it is, no line end is translated
        self.length = 0

    def add(self, text: str) -> None:
        self.length += self._buffer.write(text)

    def part(self, start: int, end: int | None = None) -> str:
        if start >= self.length:
            return ""
        self._buffer.seek(start)
        text = self._buffer.read()
        return text if end is None else text[: end - start]

    def cut(self, length: int) -> None:
        self._buffer.seek(length)
        self._buffer.truncate()
        self.length = length


class _SequenceState:
    """One sequence: tokens, text, logprobs, and how much of them was handed out."""

    def __init__(self, index: int, request: Request, detokenizer: Detokenizer | None) -> None:
        params = _sampled(request)
        self.index, self.request, self.params = index, request, params
        self.tokens: list[int] = []
        self.text = _Text()
        self.logprobs: list[dict[int, Logprob]] | None = None
        self.cumulative: float | None = None
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.stops: list[str] = []
        self.hold = 0  # characters that may be the beginning of a stop string
        self.longest = 0
        self.sent_tokens, self.sent_text, self.sent_end = 0, 0, False
        self.stream: TextStream | None = None
        self.lazy = False
        self.detokenizer = detokenizer
        self.ranked = isinstance(params, BeamSearchParams) or not params.logprob_token_ids
        if isinstance(params, BeamSearchParams):
            self.lazy = detokenizer is not None
            return
        if params.num_logprobs is not None:
            self.logprobs, self.cumulative = [], 0.0
        if detokenizer is None or not params.detokenize:
            return
        self.stops = params.stop_strings
        self.longest = max(map(len, self.stops), default=0)
        if self.stops and not params.include_stop_str_in_output:
            self.hold = self.longest - 1
        if request.stream or self.stops:
            options = (params.skip_special_tokens, params.spaces_between_special_tokens)
            self.stream = detokenizer.stream(request.prompt_token_ids, *options)
        else:
            self.lazy = True

    def take(self, delta: Delta, names: Detokenizer | None) -> int | None:
        """See `_RequestState.take`."""
        if self.finish_reason is not None:
            return None
        stopped = None if self.stream is None else self._advance(self.stream, delta.tokens, delta.finish)
        tokens = delta.tokens if stopped is None else delta.tokens[: stopped[0] - len(self.tokens)]
        self.tokens += tokens
        if self.logprobs is not None and delta.logprobs is not None:
            for line in delta.logprobs[: len(tokens)]:
                self.logprobs += _logprob_dicts(line, names, self.ranked)
                self.cumulative = (self.cumulative or 0.0) + float(line.values[0, 0])
        if delta.cumulative_logprob is not None:
            self.cumulative = delta.cumulative_logprob
        if stopped is not None:
            self.end("stop", stopped[1])
            return len(self.tokens) if delta.finish is None else None
        if delta.finish is not None:
            self.end(delta.finish.value, delta.error if delta.finish is FinishReason.ERROR else delta.stop_token)
        return None

    def _advance(self, stream: TextStream, tokens: list[int], finish: FinishReason | None) -> tuple[int, str] | None:
        """Extend the text by `tokens`. Answers (number of tokens, stop string) if one ends the sequence."""
        shown = tokens[:-1] if finish is FinishReason.STOP and not self._shows_stop() else tokens
        if not self.stops:
            self.text.add(stream.push(shown))
            if finish is not None:
                self.text.add(stream.finish())
            return None
        for i, token in enumerate(shown):
            count = len(self.tokens) + i + 1
            if (stop := self._extend(stream.push((token,)), count)) is not None:
                return count, stop
        if finish is not None:
            count = len(self.tokens) + len(shown)
            if (stop := self._extend(stream.finish(), count)) is not None:
                return count, stop
        return None

    def _shows_stop(self) -> bool:
        return self.params.include_stop_str_in_output

    def _extend(self, new: str, count: int) -> str | None:
        """Add text that token number `count` completed; answers the stop string in it, where it cuts the text."""
        params = self.params
        assert isinstance(params, SamplingParams)
        begin = self.text.length
        self.text.add(new)
        if not new or count <= params.min_tokens:
            return None
        window = max(0, begin + 1 - self.longest)
        found = find_stop(self.text.part(window), begin - window, self.stops)
        if found is None:
            return None
        start, stop = found
        self.text.cut(window + start + (len(stop) if params.include_stop_str_in_output else 0))
        return stop

    def end(self, reason: str, stop_reason: int | str | None) -> None:
        """The sequence is over; its text is brought to its final form."""
        if self.finish_reason is not None:
            return
        self.finish_reason, self.stop_reason = reason, stop_reason
        self.stream = None
        if not self.lazy or self.detokenizer is None:
            return
        shown = self.tokens[:-1] if reason == "stop" and self._ends_with_stop() else self.tokens
        params = self.params
        spaces = isinstance(params, BeamSearchParams) or params.spaces_between_special_tokens
        if isinstance(params, BeamSearchParams):
            self.tokens = shown
            prompt = self.request.prompt_token_ids
            self.text.add(self.detokenizer.decode((), [*prompt, *shown], params.skip_special_tokens, spaces))
        else:
            prompt = self.request.prompt_token_ids
            self.text.add(self.detokenizer.decode(prompt, shown, params.skip_special_tokens, spaces))

    def _ends_with_stop(self) -> bool:
        """Whether the last token is an end token that the text does not show. A core that ends beams may have taken it
        off already."""
        if self._shows_stop() or not self.tokens:
            return False
        return not isinstance(self.params, BeamSearchParams) or self.tokens[-1] in self.request.eos_token_ids

    def news(self, least: int) -> bool:
        """Whether there is something to report: an end, or `least` new tokens."""
        if self.finish_reason is not None:
            return not self.sent_end
        new = len(self.tokens) - self.sent_tokens
        return new >= least or (new > 0 and not self.sent_tokens)

    def output(self, delta: bool) -> CompletionOutput:
        ended = self.finish_reason is not None
        shown = self.text.length if ended else max(self.sent_text, self.text.length - self.hold)
        first_token, first_char = (self.sent_tokens, self.sent_text) if delta else (0, 0)
        self.sent_tokens, self.sent_text, self.sent_end = len(self.tokens), shown, ended
        return CompletionOutput(
            index=self.index,
            text=self.text.part(first_char, shown) if first_char < shown else "",
            token_ids=self.tokens[first_token:],
            cumulative_logprob=self.cumulative,
            logprobs=None if self.logprobs is None else self.logprobs[first_token:],
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )


def _sampled(request: Request) -> SamplingParams | BeamSearchParams:
    assert not isinstance(request.params, PoolingParams)
    return request.params


def find_stop(text: str, begin: int, stops: Sequence[str]) -> tuple[int, str] | None:
    """The stop string that is complete first in `text`, if it ends after `begin`: (where it starts, the string). Of
    those that end together the longest. So the answer does not depend on how the text was cut into tokens."""
    best: tuple[int, int, str] | None = None
    for stop in stops:
        start = text.find(stop, max(0, begin + 1 - len(stop)))
        if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
            best = (start + len(stop), start, stop)
    return None if best is None else (best[1], best[2])


def _logprob_dicts(block: TokenLogprobs, names: Detokenizer | None, ranked: bool = True) -> list[dict[int, Logprob]]:
    """One dict for each position: the token itself first, then the likeliest in order; where not `ranked`, then tokens
    that the user named, of which no rank is known."""
    out: list[dict[int, Logprob]] = []
    for ids, values, rank in zip(block.ids.tolist(), block.values.tolist(), block.ranks.tolist(), strict=True):
        line = {ids[0]: Logprob(values[0], rank, names.name(ids[0]) if names else None)}
        for k in range(1, len(ids)):
            if ids[k] not in line:
                line[ids[k]] = Logprob(values[k], k if ranked else None, names.name(ids[k]) if names else None)
        out.append(line)
    return out
