"""Draws one token for each sampled row, with its logprobs.

Owns: the order of the steps (vLLM's) and the choice of the cheapest path for the rows at hand; `Sampled`, the draw on
its way to the host. Knows nothing of plans, blocks or models. What a parameter means is in `ops.sampling`; where it is
kept, in `sampling_state`.

The order for a row: logprobs of the raw logits; allowed_token_ids, bad_words, min_tokens and logit_bias; custom
processors; grammar; penalties; argmax if greedy, else temperature, min_p, top_k, top_p and the draw.

Until `Sampled.finish` nothing waits for the device, except where a row has host-side processors. With static shapes,
so that a graph can record them: `sample_greedy`, and the op `sample` for one (max_k, nucleus).

Shape legend: S sampled rows, G rows of a group, V vocabulary, L prompt tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.ops.dispatch import Binder
from quire.ops.sampling import (
    ADD_EDITS,
    FORBID_WORDS,
    MASK,
    NEG_INF,
    PENALISE,
    SAMPLE,
    TOKEN_LOGPROBS,
    Kind,
    Noise,
    Out,
    draw_greedy,
)
from quire.runner.grammars import Compilers
from quire.runner.processors import LogitsProcessor, one_line
from quire.runner.sampling_state import LineTable, Needs, Real, SamplingState, Whole, to_device
from quire.types.errors import ClientError
from quire.types.plan import Ints, PromptLogprobs, TokenLogprobs, ints

__all__ = ["LOGPROBS_MODES", "Finished", "Sampled", "Sampler", "SamplingState", "sample_greedy"]

DrawFrom = Callable[[Tensor, Kind], Out]
LOGPROBS_MODES = ("raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits")


class SamplingOps(NamedTuple):
    """The implementations of the ops of these names."""

    sample: Callable[..., tuple[Tensor, Tensor, Tensor]] = SAMPLE.reference
    add_edits: Callable[..., None] = ADD_EDITS.reference
    forbid_words: Callable[..., None] = FORBID_WORDS.reference
    penalise: Callable[..., None] = PENALISE.reference
    mask: Callable[..., None] = MASK.reference
    token_logprobs: Callable[..., tuple[Tensor, Tensor, Tensor]] = TOKEN_LOGPROBS.reference

    @staticmethod
    def bound(ops: Binder) -> SamplingOps:
        return SamplingOps(*map(ops.bind, (SAMPLE, ADD_EDITS, FORBID_WORDS, PENALISE, MASK, TOKEN_LOGPROBS)))


class Finished(NamedTuple):
    """A draw on the host; the fields are those of `StepResult`."""

    tokens: Ints
    accepted: Ints
    logprobs: tuple[TokenLogprobs | None, ...] | None
    failed: tuple[tuple[int, str], ...]


class _Lines(NamedTuple):
    """Logprobs of the sampled rows `at`, on the device."""

    at: list[int]
    ids: Tensor
    values: Tensor
    ranks: Tensor


@dataclass
class Sampled:
    """A draw on its way to the host. `tokens_S` (int64, device) may be used at once; `finish` waits for the device.

    `failed`: (index into the sampled rows, message) of rows whose processors failed. Rows with NaN logits, or with
    every token masked, are found by `finish`; the token of a failed row is some valid id.
    """

    tokens_S: Tensor
    failed: list[tuple[int, str]]
    _host: Tensor  # float64 (S, 2): token, largest logit; or int32 (S, 2): token, 0 or 1 (NaN) or 2 (all masked)
    _lines: list[_Lines] = field(default_factory=list)
    _event: torch.cuda.Event | None = None

    def tokens(self) -> Ints:
        """(S,) the tokens on the host. Waits for the device; from any thread."""
        if self._event is not None:
            self._event.synchronize()
        return ints(self._host[:, 0].numpy())

    def done(self) -> bool:
        """Whether the tokens are on the host."""
        return self._event is None or self._event.query()

    def finish(self) -> Finished:
        if self._event is not None:
            self._event.synchronize()
        drawn = self._host.numpy()
        failed = dict(self.failed)
        packed = drawn.dtype == np.int32
        for s in np.flatnonzero(drawn[:, 1] if packed else ~(drawn[:, 1] > NEG_INF)).tolist():
            nan = drawn[s, 1] == 1 if packed else np.isnan(drawn[s, 1])
            why = "the model's logits are NaN" if nan else "every token is masked"
            failed.setdefault(s, f"{why}: no token can be drawn")
        tokens = ints(drawn[:, :1])
        return Finished(
            tokens, np.ones(len(drawn), dtype=np.int32), self._logprobs(failed), tuple(sorted(failed.items()))
        )

    def _logprobs(self, failed: dict[int, str]) -> tuple[TokenLogprobs | None, ...] | None:
        if not self._lines:
            return None
        out: list[TokenLogprobs | None] = [None] * len(self._host)
        for lines in self._lines:
            ids, values, ranks = (t.numpy() for t in lines[1:])
            ids, ranks = ids.astype(np.int32), ranks.astype(np.int32)
            for g, s in enumerate(lines.at):
                if s not in failed:
                    out[s] = TokenLogprobs(ids[g : g + 1], values[g : g + 1], ranks[g : g + 1])
        return tuple(out)


def sample_greedy(logits_SV: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens, largest logit) of rows that are all greedy."""
    return draw_greedy(logits_SV)


class Sampler:
    """Draws tokens from logits.

    Args:
        vocab_size: width of the logits.
        device: where they are.
        max_logprobs: the engine's limit; requests have been checked against it.
        engine_processors: engine-wide logits processors; the `SamplingState` must be made with the same.
        logprobs_mode: what logprobs are taken from, one of `LOGPROBS_MODES`. "raw": before any change to the logits;
            "processed": after temperature and truncation.
        compilers: where the grammars of constrained rows come from.
        ops: what it does with logits.
    """

    def __init__(
        self,
        vocab_size: int,
        device: torch.device | str,
        max_logprobs: int = 20,
        engine_processors: Sequence[LogitsProcessor] = (),
        logprobs_mode: str = "raw_logprobs",
        ops: SamplingOps = SamplingOps(),  # noqa: B008 (it is immutable)
        compilers: Compilers | None = None,
    ) -> None:
        if logprobs_mode not in LOGPROBS_MODES:
            known = ", ".join(LOGPROBS_MODES)
            raise ClientError(f"logprobs_mode must be one of {known}; got {logprobs_mode!r}", "logprobs_mode")
        self.vocab_size, self.device, self.max_logprobs = vocab_size, torch.device(device), max_logprobs
        self.engine_processors = tuple(engine_processors)
        self._compilers = compilers
        self._ops = ops
        self._raw = logprobs_mode.startswith("raw")
        self._normalise = logprobs_mode.endswith("logprobs")

    @property
    def processed(self) -> bool:
        """Whether logprobs are taken from what is drawn from, after temperature and truncation."""
        return not self._raw

    def new_state(self, max_rows: int, max_len: int) -> SamplingState:
        """The state that goes with this sampler."""
        return SamplingState(max_rows, self.vocab_size, max_len, self.device, self.engine_processors, self._compilers)

    def __call__(
        self,
        logits_SV: Tensor,
        rows: Ints,
        positions_S: Tensor,
        state: SamplingState,
        rows_S: Tensor | None = None,
        draw: DrawFrom | None = None,
    ) -> Sampled:
        """Draws the token at index `positions_S` (int64) of each of `rows`.

        logits_SV: float32, overwritten, or of a smaller type, kept. rows_S: `rows` as int64 on the device, where the
        caller has them there. draw: draws from logits by the parameters on the device, and keeps them, as the op
        `draw_step` does; the op `sample` if None.
        """
        assert state.engine_processors.processors == self.engine_processors, "state made with other processors"
        needs_S = state.needs[rows]
        union = Needs(int(np.bitwise_or.reduce(needs_S, initial=0)))
        if draw is None and not union & ~Needs.HISTORY:
            tokens_S, top_S = sample_greedy(logits_SV)
            return self._sampled(tokens_S, top_S, [], [])
        if rows_S is None:
            rows_S = to_device(rows.astype(np.int64), self.device)
        numbers = _Numbers(*state.numbers(rows_S), positions_S)
        wanted = _logprob_groups(rows, needs_S, state) if union & Needs.LOGPROBS else []
        x_SV = logits_SV.float() if draw is None or union & Needs.CHANGES else logits_SV
        overwritten = x_SV is logits_SV and bool(union & (Needs.CHANGES | (Needs.NOISE if draw is None else 0)))
        raw = [self._raw_logits(logits_SV, at, overwritten) if self._raw else None for at, _ in wanted]
        failed: list[tuple[int, str]] = []
        if union & Needs.CHANGES:
            failed = _Changes(x_SV, rows, needs_S, state, numbers, self._ops).apply(union)
        out = self._draw(x_SV, rows, union, state, numbers) if draw is None else draw(x_SV, state.kind(rows))
        lines: list[_Lines] = []
        for (at, top), logits in zip(wanted, raw, strict=True):
            index_G = to_device(np.array(at), self.device)
            if logits is None:
                heat_S = None if draw is None else numbers.reals_SC[:, Real.TEMPERATURE].float()
                logits = self._processed(x_SV, heat_S, out.low_S, numbers, index_G), None
            found = self._ops.token_logprobs(
                logits[0], out.tokens_S[index_G], self._top(top, len(at)), self._normalise, logits[1]
            )
            lines.append(_Lines(at, *found))
        if draw is not None:
            return self.drawn(out, failed, lines)
        return self._sampled(out.tokens_S, out.top_S, failed, lines)

    def _draw(self, x_SV: Tensor, rows: Ints, union: Needs, state: SamplingState, numbers: _Numbers) -> Out:
        """By the op `sample`; `x_SV` is then what was drawn from."""
        if not union & Needs.NOISE:
            return Out(*sample_greedy(x_SV))
        reals_SC, wholes_SC = numbers.reals_SC, numbers.wholes_SC
        found = self._ops.sample(
            x_SV,
            reals_SC[:, Real.TEMPERATURE].float(),
            reals_SC[:, Real.LOG_MIN_P].float(),
            wholes_SC[:, Whole.TOP_K],
            reals_SC[:, Real.TOP_P],
            wholes_SC[:, Whole.GREEDY] != 0,
            Noise(wholes_SC[:, Whole.SEED], wholes_SC[:, Whole.SAMPLE], numbers.positions_S),
            int(state.top_k[rows].max(initial=0)) if union & Needs.TOP_K else 0,
            bool(union & Needs.TOP_P),
            _static(self.device),
        )
        return Out(*found)

    def greedy(self, tokens_S: Tensor, top_S: Tensor) -> Sampled:
        """A draw that was made already, by an argmax (on the host)."""
        return self._sampled(tokens_S, top_S, [], [])

    def drawn(
        self, out: Out, failed: list[tuple[int, str]] | None = None, lines: list[_Lines] | None = None
    ) -> Sampled:
        """A draw that the op `draw_step` made, into buffers that the next one may write; starts the copy to the
        host."""
        assert out.packed_S2 is not None
        packed_S2 = out.packed_S2.clone() if self.device.type == "cpu" else out.packed_S2
        return self._to_host(out.tokens_S, packed_S2, failed or [], lines or [])

    def prompt_logprobs(self, logits_LV: Tensor, row: int, start: int, state: SamplingState) -> PromptLogprobs:
        """Logprobs of the prompt tokens at indices start .. start+L-1 of `row`; `logits_LV[i]` (float32) predicts token
        start + i. They are raw whatever the mode: prompt tokens were not drawn. Waits for the device."""
        params = state.params[row]
        assert params is not None and params.prompt_logprobs is not None
        tokens_L = state.history.line(row)[start : start + len(logits_LV)]
        top = self._top(params.prompt_logprobs, len(tokens_L))
        found = self._ops.token_logprobs(logits_LV, tokens_L, top, self._normalise)
        ids, values, ranks = (t.cpu().numpy() for t in found)
        return PromptLogprobs(row, start, TokenLogprobs(ids.astype(np.int32), values, ranks.astype(np.int32)))

    def _top(self, top: int | tuple[int, ...], rows: int) -> int | Tensor:
        if isinstance(top, int):
            return self.vocab_size if top < 0 else top
        return to_device(np.tile(np.array(top, dtype=np.int64), (rows, 1)), self.device)

    def _raw_logits(self, logits_SV: Tensor, at: list[int], overwritten: bool) -> tuple[Tensor, Tensor | None]:
        """Logits that stay as they are, and which lines of them are those of `at`; None: all."""
        index_G = None if len(at) == len(logits_SV) else to_device(np.array(at), self.device)
        if not overwritten:
            return logits_SV, index_G
        return logits_SV.clone() if index_G is None else logits_SV[index_G], None

    def _processed(
        self, x_SV: Tensor, heat_S: Tensor | None, low_S: Tensor | None, numbers: _Numbers, index_G: Tensor
    ) -> Tensor:
        """The lines after temperature and truncation. `heat`: by what they are still to be divided."""
        x_GV = x_SV[index_G].float()
        if heat_S is not None:
            x_GV = x_GV / heat_S[index_G].unsqueeze(1)
        if low_S is None:
            return x_GV
        # that greedy rows keep their likeliest tokens only is how they are drawn, not what the user asked for
        low_G = low_S[index_G].masked_fill(numbers.wholes_SC[index_G, Whole.GREEDY] != 0, NEG_INF)
        return x_GV.masked_fill(x_GV < low_G.unsqueeze(1), NEG_INF)

    def _sampled(self, tokens_S: Tensor, top_S: Tensor, failed: list[tuple[int, str]], lines: list[_Lines]) -> Sampled:
        """Starts the copies to the host."""
        if self.device.type == "cpu":  # torch's operations, which each step evicts from the caches, take 0.1 ms
            host = np.empty((len(tokens_S), 2))
            host[:, 0], host[:, 1] = tokens_S.numpy(), top_S.numpy()
            return Sampled(tokens_S, failed, torch.from_numpy(host), lines)
        return self._to_host(tokens_S, torch.stack((tokens_S.double(), top_S.double()), 1), failed, lines)

    def _to_host(self, tokens_S: Tensor, packed: Tensor, failed: list[tuple[int, str]], lines: list[_Lines]) -> Sampled:
        if self.device.type == "cpu":
            return Sampled(tokens_S, failed, packed, lines)
        packed = packed.to("cpu", non_blocking=True)
        lines = [_Lines(g.at, *(t.to("cpu", non_blocking=True) for t in g[1:])) for g in lines]
        event = torch.cuda.Event()
        event.record()
        return Sampled(tokens_S, failed, packed, lines, event)


def _static(device: torch.device) -> bool:
    """Whether sizes that depend on values are to be avoided: they cost a wait for the device, and no graph can hold
    them. On a CPU there is nothing to wait for."""
    return device.type != "cpu"


def _logprob_groups(
    rows: Ints, needs_S: NDArray[np.int32], state: SamplingState
) -> list[tuple[list[int], int | tuple[int, ...]]]:
    """(indices of sampled rows, what they ask for): a number of likeliest tokens, or token ids. Rows that ask for
    different numbers are apart, so that one which wants all does not make the others sort."""
    groups: dict[int | tuple[int, ...], list[int]] = {}
    for s in np.flatnonzero(needs_S & Needs.LOGPROBS).tolist():
        params = state.params[rows[s]]
        assert params is not None
        ids = params.logprob_token_ids
        top = tuple(ids) if ids else params.num_logprobs
        assert top is not None
        groups.setdefault(top, []).append(s)
    return [(at, top) for top, at in groups.items()]


class _Numbers(NamedTuple):
    """Of the sampled rows: the lines of the tables, and the index of the token to draw."""

    reals_SC: Tensor
    wholes_SC: Tensor
    positions_S: Tensor


class _Group(NamedTuple):
    """Rows that ask for a change. `at_G`: their lines in the logits; None: all, in order. `lines_G`: in the table that
    holds what they ask for."""

    rows: list[int]
    at_G: Tensor | None
    lines_G: Tensor

    def of(self, values_S: Tensor) -> Tensor:
        return values_S if self.at_G is None else values_S[self.at_G]


@dataclass(frozen=True)
class _Changes:
    """The changes to the logits that few rows ask for, each done on those rows alone."""

    logits_SV: Tensor
    rows: Ints
    needs_S: NDArray[np.int32]
    state: SamplingState
    numbers: _Numbers
    ops: SamplingOps

    def apply(self, union: Needs) -> list[tuple[int, str]]:
        """Applies what `union` names; returns the rows whose processors failed."""
        failed: list[tuple[int, str]] = []
        steps: Iterable[tuple[Needs, Callable[[], None]]] = (
            (Needs.ALLOWED, self._allowed),
            (Needs.WORDS, self._words),
            (Needs.EDITS, self._edits),
        )
        for need, step in steps:
            if union & need:
                step()
        if union & Needs.PROCESSORS:
            failed = self._processors()
        if union & Needs.GRAMMAR:
            failed += self._grammars()
        if union & Needs.PENALTIES:
            self._penalties()
        return failed

    def _group(self, need: Needs, table: LineTable) -> _Group:
        at = np.flatnonzero(self.needs_S & need)
        rows = self.rows[at].tolist()
        both = to_device(np.stack((at, table.numbers(rows))), self.logits_SV.device)
        return _Group(rows, None if at.size == len(self.rows) else both[0], both[1])

    def _allowed(self) -> None:
        group = self._group(Needs.ALLOWED, self.state.allowed)
        self.ops.mask(self.logits_SV, self.state.allowed.data, group.at_G, group.lines_G)

    def _words(self) -> None:
        group = self._group(Needs.WORDS, self.state.words)
        words_GWL = self.state.words.data[group.lines_G]
        prompt_G = group.of(self.numbers.wholes_SC[:, Whole.PROMPT_LENGTH])
        tail_GL = self.state.tail(group.rows, group.of(self.numbers.positions_S), prompt_G, words_GWL.shape[-1] - 1)
        self.ops.forbid_words(self.logits_SV, words_GWL, tail_GL, group.at_G)

    def _edits(self) -> None:
        state, group = self.state, self._group(Needs.EDITS, self.state.edit_ids)
        drawn_G = group.of(self.numbers.positions_S - self.numbers.wholes_SC[:, Whole.PROMPT_LENGTH])
        # the three tables are written together, so that a row has the same line in each
        tables = state.edit_ids, state.edit_values, state.edit_until
        self.ops.add_edits(self.logits_SV, *(t.data[group.lines_G] for t in tables), drawn_G, group.at_G)

    def _penalties(self) -> None:
        group = self._group(Needs.PENALTIES, self.state.counts)
        reals_GC = group.of(self.numbers.reals_SC).float()
        numbers = (reals_GC[:, c] for c in (Real.REPETITION, Real.PRESENCE, Real.FREQUENCY))
        self.ops.penalise(self.logits_SV, self.state.counts.data, *numbers, group.at_G, group.lines_G)

    def _grammars(self) -> list[tuple[int, str]]:
        """What is not allowed is masked; of a text that is complete the end token is all that is left, even where it
        was forbidden before (min_tokens)."""
        lines = np.flatnonzero(self.needs_S & Needs.GRAMMAR)
        device = self.logits_SV.device
        masks = self.state.grammars.masks(self.rows[lines].tolist())
        at_G = None if lines.size == len(self.rows) else to_device(lines, device)
        self.ops.mask(self.logits_SV, to_device(masks.words_GW, device), at_G)
        if masks.over:
            over = to_device(np.array([(lines[g], token) for g, token in masks.over], np.int64).T.copy(), device)
            self.logits_SV[over[0]] = NEG_INF
            self.logits_SV[over[0], over[1]] = 0.0
        return [(int(lines[g]), message) for g, message in masks.failed]

    def _processors(self) -> list[tuple[int, str]]:
        """Engine-wide processors, then those of the requests; the latter get a row of their own to work on."""
        rows, state = self.rows.tolist(), self.state
        failed = dict(state.engine_processors.apply(self.logits_SV, rows, state.tokens))
        for s in np.flatnonzero(self.needs_S & Needs.PROCESSORS).tolist():
            functions = state.request_processors(rows[s])
            if functions is None or s in failed:
                continue
            try:
                self.logits_SV[s] = functions(self.logits_SV[s].clone(), *state.tokens(rows[s]))
            except Exception as error:
                failed[s] = f"a logits processor of the request failed: {one_line(error)}"
        return sorted(failed.items())
