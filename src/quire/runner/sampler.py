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

from quire.ops.sampling import (
    NEG_INF,
    Noise,
    Out,
    add_edits,
    allowed_bits,
    draw_greedy,
    forbid_words,
    penalise,
    sample,
    token_logprobs,
)
from quire.runner.grammars import Compilers
from quire.runner.processors import LogitsProcessor, one_line
from quire.runner.sampling_state import Needs, Real, SamplingState, Whole, to_device
from quire.types.errors import ClientError
from quire.types.plan import Ints, PromptLogprobs, TokenLogprobs, ints

__all__ = ["LOGPROBS_MODES", "Finished", "Sampled", "Sampler", "SamplingState", "sample_greedy"]

LOGPROBS_MODES = ("raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits")


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
        op: the implementation of the op `sample`.
    """

    def __init__(
        self,
        vocab_size: int,
        device: torch.device | str,
        max_logprobs: int = 20,
        engine_processors: Sequence[LogitsProcessor] = (),
        logprobs_mode: str = "raw_logprobs",
        op: Callable[..., tuple[Tensor, Tensor, Tensor]] = sample,
        compilers: Compilers | None = None,
    ) -> None:
        if logprobs_mode not in LOGPROBS_MODES:
            known = ", ".join(LOGPROBS_MODES)
            raise ClientError(f"logprobs_mode must be one of {known}; got {logprobs_mode!r}", "logprobs_mode")
        self.vocab_size, self.device, self.max_logprobs = vocab_size, torch.device(device), max_logprobs
        self.engine_processors = tuple(engine_processors)
        self._compilers = compilers
        self._sample = op
        self._raw = logprobs_mode.startswith("raw")
        self._normalise = logprobs_mode.endswith("logprobs")

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
    ) -> Sampled:
        """Draws the token at index `positions_S` (int64) of each of `rows`.

        logits_SV: float32, overwritten, or of a smaller type, kept. rows_S: `rows` as int64 on the device, where the
        caller has them there.
        """
        assert state.engine_processors.processors == self.engine_processors, "state made with other processors"
        needs_S = state.needs[rows]
        union = Needs(int(np.bitwise_or.reduce(needs_S, initial=0)))
        if not union & ~Needs.HISTORY:
            tokens_S, top_S = sample_greedy(logits_SV)
            return self._sampled(tokens_S, top_S, [], [])
        logits_SV = logits_SV.float()
        if rows_S is None:
            rows_S = to_device(rows.astype(np.int64), self.device)
        reals_SP, wholes_SP = state.numbers(rows_S)
        wanted = _logprob_groups(rows, needs_S, state) if union & Needs.LOGPROBS else []
        overwritten = bool(union & (Needs.CHANGES | Needs.NOISE))
        kept = [self._select(logits_SV, at, overwritten) if self._raw else None for at, _ in wanted]
        failed: list[tuple[int, str]] = []
        if union & Needs.CHANGES:
            failed = _Changes(logits_SV, rows, needs_S, state, positions_S, reals_SP, wholes_SP).apply(union)
        if not union & Needs.NOISE:
            tokens_S, top_S = sample_greedy(logits_SV)
            low_S = None
        else:
            max_k = int(state.top_k[rows].max(initial=0)) if union & Needs.TOP_K else 0
            greedy_S = wholes_SP[:, Whole.GREEDY] != 0
            tokens_S, top_S, low_S = self._sample(
                logits_SV,
                reals_SP[:, Real.TEMPERATURE].float(),
                reals_SP[:, Real.LOG_MIN_P].float(),
                wholes_SP[:, Whole.TOP_K],
                reals_SP[:, Real.TOP_P],
                greedy_S,
                Noise(wholes_SP[:, Whole.SEED], wholes_SP[:, Whole.SAMPLE], positions_S),
                max_k,
                bool(union & Needs.TOP_P),
                _static(self.device),
            )
            # that greedy rows keep their likeliest tokens only is how they are drawn, not what the user asked for
            low_S = low_S.masked_fill(greedy_S, NEG_INF)
        lines = []
        for (at, top), raw_GV in zip(wanted, kept, strict=True):
            index = to_device(np.array(at), self.device)
            x_GV = self._processed(logits_SV, low_S, index) if raw_GV is None else raw_GV
            lines.append(_Lines(at, *token_logprobs(x_GV, tokens_S[index], self._top(top, len(at)), self._normalise)))
        return self._sampled(tokens_S, top_S, failed, lines)

    def greedy(self, tokens_S: Tensor, top_S: Tensor) -> Sampled:
        """A draw that was made already, by an argmax (on the host)."""
        return self._sampled(tokens_S, top_S, [], [])

    def drawn(self, out: Out) -> Sampled:
        """A draw that the op `draw_step` made; starts the copy to the host."""
        assert out.packed_S2 is not None
        packed_S2 = out.packed_S2.clone() if self.device.type == "cpu" else out.packed_S2
        return self._to_host(out.tokens_S, packed_S2, [], [])

    def prompt_logprobs(self, logits_LV: Tensor, row: int, start: int, state: SamplingState) -> PromptLogprobs:
        """Logprobs of the prompt tokens at indices start .. start+L-1 of `row`; `logits_LV[i]` (float32) predicts token
        start + i. They are raw whatever the mode: prompt tokens were not drawn. Waits for the device."""
        params = state.params[row]
        assert params is not None and params.prompt_logprobs is not None
        tokens_L = state.history.line(row)[start : start + len(logits_LV)]
        top = self._top(params.prompt_logprobs, len(tokens_L))
        ids, values, ranks = (t.cpu().numpy() for t in token_logprobs(logits_LV, tokens_L, top, self._normalise))
        return PromptLogprobs(row, start, TokenLogprobs(ids.astype(np.int32), values, ranks.astype(np.int32)))

    def _top(self, top: int | tuple[int, ...], rows: int) -> int | Tensor:
        if isinstance(top, int):
            return self.vocab_size if top < 0 else top
        return to_device(np.tile(np.array(top, dtype=np.int64), (rows, 1)), self.device)

    def _select(self, logits_SV: Tensor, at: list[int], copy: bool) -> Tensor:
        if len(at) == len(logits_SV):
            return logits_SV.clone() if copy else logits_SV
        return logits_SV[to_device(np.array(at), self.device)]

    def _processed(self, logits_SV: Tensor, low_S: Tensor | None, index: Tensor) -> Tensor:
        x_GV = logits_SV[index]
        return x_GV if low_S is None else x_GV.masked_fill(x_GV < low_S[index].unsqueeze(1), NEG_INF)

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


@dataclass(frozen=True)
class _Changes:
    """The changes to the logits that few rows ask for, each done on those rows alone."""

    logits_SV: Tensor
    rows: Ints
    needs_S: NDArray[np.int32]
    state: SamplingState
    positions_S: Tensor
    reals_SP: Tensor
    wholes_SP: Tensor

    def apply(self, union: Needs) -> list[tuple[int, str]]:
        """Applies what `union` names; returns the rows whose processors failed."""
        failed: list[tuple[int, str]] = []
        steps: Iterable[tuple[Needs, Callable[[Tensor, list[int], Tensor], None]]] = (
            (Needs.ALLOWED, self._allowed),
            (Needs.WORDS, self._words),
            (Needs.EDITS, self._edits),
        )
        for need, step in steps:
            if union & need:
                self._on(need, step)
        if union & Needs.PROCESSORS:
            failed = self._processors()
        if union & Needs.GRAMMAR:
            failed += self._grammars()
        if union & Needs.PENALTIES:
            self._on(Needs.PENALTIES, self._penalties)
        return failed

    def _on(self, need: Needs, step: Callable[[Tensor, list[int], Tensor], None]) -> None:
        """Runs step(logits_GV, rows, index_G) over the rows with `need`; it works in place."""
        lines = np.flatnonzero(self.needs_S & need)
        index_G = to_device(lines, self.logits_SV.device)
        rows = self.rows[lines].tolist()
        if lines.size == len(self.rows):
            step(self.logits_SV, rows, index_G)
            return
        logits_GV = self.logits_SV[index_G]
        step(logits_GV, rows, index_G)
        self.logits_SV[index_G] = logits_GV

    def _allowed(self, logits_GV: Tensor, rows: list[int], index_G: Tensor) -> None:
        logits_GV.masked_fill_(~self.state.allowed.gather(rows), NEG_INF)

    def _words(self, logits_GV: Tensor, rows: list[int], index_G: Tensor) -> None:
        words_GWL = self.state.words.gather(rows)
        prompt_G = self.wholes_SP[index_G, Whole.PROMPT_LENGTH]
        tail_GL = self.state.tail(rows, self.positions_S[index_G], prompt_G, words_GWL.shape[-1] - 1)
        forbid_words(logits_GV, words_GWL, tail_GL)

    def _edits(self, logits_GV: Tensor, rows: list[int], index_G: Tensor) -> None:
        s = self.state
        drawn_G = self.positions_S[index_G] - self.wholes_SP[index_G, Whole.PROMPT_LENGTH]
        ids, values, until = s.edit_ids.gather(rows), s.edit_values.gather(rows), s.edit_until.gather(rows)
        add_edits(logits_GV, ids, values, until, drawn_G)

    def _penalties(self, logits_GV: Tensor, rows: list[int], index_G: Tensor) -> None:
        reals = self.reals_SP[index_G].float()
        repetition, presence, frequency = (reals[:, c] for c in (Real.REPETITION, Real.PRESENCE, Real.FREQUENCY))
        penalise(logits_GV, self.state.counts.gather(rows), repetition, presence, frequency)

    def _grammars(self) -> list[tuple[int, str]]:
        """What is not allowed is masked; of a text that is complete the end token is all that is left, even where it
        was forbidden before (min_tokens)."""
        lines = np.flatnonzero(self.needs_S & Needs.GRAMMAR)
        device, vocab = self.logits_SV.device, self.logits_SV.shape[1]
        masks = self.state.grammars.masks(self.rows[lines].tolist())
        allowed_GV = allowed_bits(to_device(masks.words_GW, device), vocab)
        if lines.size == len(self.rows):
            self.logits_SV.masked_fill_(~allowed_GV, NEG_INF)
        else:
            index_G = to_device(lines, device)
            self.logits_SV[index_G] = self.logits_SV[index_G].masked_fill_(~allowed_GV, NEG_INF)
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
