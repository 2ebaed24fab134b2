"""Sampling parameters and token histories of the device rows.

Owns: `SamplingState`, what the sampler needs to know of each live row. Knows nothing of how tokens are drawn, of
blocks, plans or the batch.

Numbers every row has are columns of two small tables, kept on the host and copied to the device when a row has changed.
What few rows have (biases, masks, histories) lives in `LineTable`s with a line for each row that asked, made when the
first one does. Histories live on the device, because the host may not know the last token yet.

Shape legend: R device rows, S sampled rows, G rows of a group, V vocabulary, L tokens, W words of a row.
"""

from __future__ import annotations

from enum import IntFlag, auto
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.ops.sampling import IN_PROMPT, NEG_INF, Kind, Real, Whole
from quire.runner.grammars import Compilers, GrammarRows
from quire.runner.logits import EngineProcessors, RequestProcessors
from quire.runner.processors import LogitsProcessor
from quire.runner.upload import Pinned
from quire.types.params import SamplingParams
from quire.types.plan import Ints, NewRow

FOREVER = 2**62  # more tokens than any row draws


class Needs(IntFlag):
    """What sampling a row takes beyond an argmax."""

    EDITS = auto()  # logit_bias, min_tokens, single-token bad words
    ALLOWED = auto()  # allowed_token_ids
    WORDS = auto()  # bad words of several tokens
    PENALTIES = auto()
    PROCESSORS = auto()  # host-side code
    GRAMMAR = auto()  # structured_outputs
    NOISE = auto()  # not greedy
    MIN_P = auto()
    TOP_K = auto()
    TOP_P = auto()
    LOGPROBS = auto()
    HISTORY = auto()  # tokens are recorded as they are drawn

    DRAW = NOISE | MIN_P | TOP_K | TOP_P
    CHANGES = EDITS | ALLOWED | WORDS | PENALTIES | PROCESSORS | GRAMMAR


_MORE = int(Needs.CHANGES | Needs.LOGPROBS)
_TOP_P, _TRUNCATED, _NOISE = int(Needs.TOP_P), int(Needs.TOP_K | Needs.MIN_P), int(Needs.NOISE)


def to_device(values: NDArray[np.generic], device: torch.device) -> Tensor:
    """A tensor of `values` on `device`, without waiting for the device."""
    tensor = torch.from_numpy(values)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def _no_grammars(eos: tuple[int, ...]) -> NoReturn:
    raise RuntimeError("this worker was made without a compiler of grammars")


class LineTable:
    """A device tensor with one line for each row that put something there. Grows as needed, in extents and in lines, of
    which there are `most`."""

    def __init__(self, device: torch.device, dtype: torch.dtype, fill: float, most: int) -> None:
        self._device, self._dtype, self._fill, self._most = device, dtype, fill, most
        self._line: dict[int, int] = {}
        self._free: list[int] = []
        self._data: Tensor | None = None

    def __contains__(self, row: int) -> bool:
        return row in self._line

    def put(self, row: int, values: Tensor) -> Tensor:
        """Sets the row's line to `values` (on the host), filled up to the table's extents. Waits for nothing. Returns
        the line, to be written to."""
        line = self.clear(row, tuple(values.shape))
        line[tuple(slice(n) for n in values.shape)] = to_device(values.to(self._dtype).numpy(), self._device)
        return line

    def clear(self, row: int, extents: tuple[int, ...]) -> Tensor:
        """The row's line, empty, of these extents at least."""
        self._reserve(row, extents)
        return self.line(row).fill_(self._fill)

    def drop(self, row: int) -> None:
        line = self._line.pop(row, None)
        if line is not None:
            self._free.append(line)

    def copy(self, sources: list[int], destinations: list[int]) -> None:
        """Lines of `sources` (of those that have one) become lines of `destinations`; reads all before it writes."""
        pairs = [(s, d) for s, d in zip(sources, destinations, strict=True) if s in self._line]
        lines = self.gather([s for s, _ in pairs]) if pairs else None
        for row in destinations:
            self.drop(row)
        if lines is not None:
            for _, row in pairs:
                self._reserve(row, tuple(lines.shape[1:]))
            self.data[self.lines([d for _, d in pairs])] = lines

    def line(self, row: int) -> Tensor:
        return self.data[self._line[row]]

    def lines(self, rows: list[int]) -> Tensor:
        """The line numbers of `rows` on the device."""
        return to_device(self.numbers(rows), self._device)

    def numbers(self, rows: list[int]) -> NDArray[np.int64]:
        """The line numbers of `rows`."""
        return np.array([self._line[row] for row in rows], dtype=np.int64)

    def gather(self, rows: list[int]) -> Tensor:
        """(G, ...) lines of `rows`."""
        return self.data.index_select(0, self.lines(rows))

    @property
    def data(self) -> Tensor:
        assert self._data is not None
        return self._data

    def _reserve(self, row: int, extents: tuple[int, ...]) -> None:
        """Makes sure that `row` has a line with at least these extents."""
        if row not in self._line:
            self._line[row] = self._free.pop() if self._free else len(self._line)
        old = self._data
        lines, held = (0, (0,) * len(extents)) if old is None else (old.shape[0], tuple(old.shape[1:]))
        if self._line[row] < lines and all(n <= m for n, m in zip(extents, held, strict=True)):
            return
        lines = lines if self._line[row] < lines else min(max(4, 2 * lines), self._most)
        shape = tuple(max(n, m) for n, m in zip(extents, held, strict=True))
        with torch.inference_mode(False):  # a table made in inference mode could not be written outside it
            new = torch.full((lines, *shape), self._fill, dtype=self._dtype, device=self._device)
        if old is not None:
            new[tuple(slice(n) for n in old.shape)] = old
        self._data = new


class SamplingState:
    """What sampling needs to know of each device row.

    Args:
        max_rows: number of device rows.
        vocab_size: width of the logits.
        max_len: longest sequence in tokens (bounds the histories).
        device: where the logits are.
        processors: engine-wide logits processors.
        compilers: where grammars come from; None: no row may have one.
    """

    def __init__(
        self,
        max_rows: int,
        vocab_size: int,
        max_len: int,
        device: torch.device | str,
        processors: tuple[LogitsProcessor, ...] = (),
        compilers: Compilers | None = None,
    ) -> None:
        self.vocab_size, self.max_len = vocab_size, max_len
        self.device = device = torch.device(device)
        self.needs: NDArray[np.int32] = np.zeros(max_rows, dtype=np.int32)
        self.top_k: NDArray[np.int32] = np.zeros(max_rows, dtype=np.int32)
        self.params: list[SamplingParams | None] = [None] * max_rows
        self.engine_processors = EngineProcessors(processors)
        self.grammars = GrammarRows(compilers or _no_grammars)
        self._request_processors: list[RequestProcessors | None] = [None] * max_rows
        self._host_reals = torch.zeros((max_rows, len(Real)), dtype=torch.float64)
        self._host_wholes = torch.zeros((max_rows, len(Whole)), dtype=torch.int64)
        self.reals_RC, self.wholes_RC = (
            self._host_reals,
            self._host_wholes,
        )  # on a CPU the host's tables are the device's
        self._numbers: Tensor | None = None
        if device.type != "cpu":
            reals = 2 * self._host_reals.numel()
            self._numbers = torch.zeros(reals + 2 * self._host_wholes.numel(), dtype=torch.int32, device=device)
            self._pinned = Pinned(self._numbers.numel(), 3, device)
            self.reals_RC = self._numbers[:reals].view(torch.float64).view(self._host_reals.shape)
            self.wholes_RC = self._numbers[reals:].view(torch.int64).view(self._host_wholes.shape)
        self._dirty = False
        self.edit_ids = LineTable(device, torch.int64, 0, max_rows)
        self.edit_values = LineTable(device, torch.float32, 0.0, max_rows)
        self.edit_until = LineTable(device, torch.int64, FOREVER, max_rows)
        self.allowed = LineTable(device, torch.int32, 0, max_rows)  # words of 32 tokens, as for the op `mask`
        self.words = LineTable(device, torch.int64, -1, max_rows)
        self.counts = LineTable(device, torch.int32, 0, max_rows)
        self.history = LineTable(device, torch.int64, 0, max_rows)
        self._lengths_R = torch.zeros(max_rows, dtype=torch.int64, device=device)  # of the histories
        self._tables = (
            self.edit_ids, self.edit_values, self.edit_until, self.allowed, self.words, self.counts, self.history,
        )  # fmt: skip

    # --- rows ---

    def add(self, new_row: NewRow) -> None:
        """Takes over the parameters of a row that enters, and its tokens where sampling needs them."""
        row, params = new_row.row, new_row.params
        self._drop(row)
        self.params[row] = params
        needs = self._put_numbers(new_row) | self._put_edits(new_row) | self._put_masks(row, params)
        if params.logits_processors:
            self._request_processors[row] = RequestProcessors(params.logits_processors)
            needs |= Needs.PROCESSORS
        if self.engine_processors.processors and self.engine_processors.add(new_row):
            needs |= Needs.PROCESSORS
        if params.structured_outputs is not None:
            self.grammars.add(new_row)
            needs |= Needs.GRAMMAR
        if params.num_logprobs is not None or params.logprob_token_ids:
            needs |= Needs.LOGPROBS
        assert len(new_row.tokens) or not params.needs_history, "a row that needs its history came without tokens"
        if len(new_row.tokens):
            needs |= self._put_history(new_row, needs)
        self.needs[row] = needs

    def retire(self, rows: Ints) -> None:
        for row in rows.tolist():
            self._drop(row)

    def fork(self, forks: Ints) -> None:
        """forks (F, 3): source row, destination row, sample index. All sources are read before any destination."""
        if not len(forks):
            return
        sources, destinations = forks[:, 0].tolist(), forks[:, 1].tolist()
        sample = torch.from_numpy(forks[:, 2].astype(np.int64))
        params = [self.params[s] for s in sources]
        processors = [self._request_processors[s] for s in sources]
        for d, p, f in zip(destinations, params, processors, strict=True):
            self.params[d], self._request_processors[d] = p, f
        for values in (self.needs, self.top_k):
            values[destinations] = values[sources]
        for table in (self._host_reals, self._host_wholes):
            table[destinations] = table[sources]
        self._host_wholes[destinations, Whole.SAMPLE] = sample
        self._dirty = True
        for table in self._tables:
            table.copy(sources, destinations)
        self.grammars.fork(sources, destinations)
        pair = to_device(np.ascontiguousarray(forks[:, :2].T.astype(np.int64)), self.device)
        self._lengths_R[pair[1]] = self._lengths_R[pair[0]]
        if self.engine_processors.processors:
            assert not set(sources) & set(destinations), "processors cannot exchange rows"
            for s, d in zip(sources, destinations, strict=True):
                self.engine_processors.fork(s, d)

    def append(self, rows: Ints, tokens_S: Tensor) -> None:
        """Records the drawn tokens of the rows that keep a history; `tokens_S` stays on the device."""
        at = np.flatnonzero(self.needs[rows] & Needs.HISTORY)
        if not at.size:
            return
        kept = rows[at].tolist()
        at_G, rows_G, lines_G = to_device(np.stack((at, rows[at], self.history.numbers(kept))), self.device)
        ends_G = self._lengths_R[rows_G]
        histories = self.history.data
        # a token drawn beyond the end (it will be dropped) must not leave the table
        histories[lines_G, ends_G.clamp_max(histories.shape[1] - 1)] = tokens_S[at_G]
        self._lengths_R[rows_G] = ends_G + 1
        counted = [i for i, row in enumerate(kept) if row in self.counts]
        if counted:
            lines = self.counts.numbers([kept[i] for i in counted])
            at_G, lines_G = to_device(np.stack((at[counted], lines)), self.device)
            self.counts.data[lines_G, tokens_S[at_G]] += 1

    # --- what the sampler reads ---

    def numbers(self, rows_S: Tensor) -> tuple[Tensor, Tensor]:
        """(S, len(Real)) float64 and (S, len(Whole)) int64 of the rows; `rows_S` int64 on the device."""
        self.update()
        return self.reals_RC.index_select(0, rows_S), self.wholes_RC.index_select(0, rows_S)

    def update(self) -> None:
        """Bring `reals_RC` and `wholes_RC` on the device up to date."""
        if self._dirty and self._numbers is not None:
            host, split = self._pinned.next(), 2 * self._host_reals.numel()
            host[:split] = self._host_reals.numpy().reshape(-1).view(np.int32)
            host[split:] = self._host_wholes.numpy().reshape(-1).view(np.int32)
            self._pinned.send(self._numbers)
        self._dirty = False

    def drawn_only(self, rows: Ints) -> bool:
        """Whether a draw is all that is to be done with the logits of these rows."""
        return not int(np.bitwise_or.reduce(self.needs[rows], initial=0)) & _MORE

    def kind(self, rows: Ints) -> Kind:
        """What a draw of these rows takes."""
        union = int(np.bitwise_or.reduce(self.needs[rows], initial=0))
        if union & _TOP_P:
            return Kind.TOP_P
        if union & _TRUNCATED:
            return Kind.TOP_K
        return Kind.NOISE if union & _NOISE else Kind.GREEDY

    def tail(self, rows: list[int], position_G: Tensor, prompt_length_G: Tensor, length: int) -> Tensor:
        """(G, length) the last drawn tokens before `position`, back to front, -2 where the output has not begun."""
        back = torch.arange(1, length + 1, device=self.device)
        at_GL = position_G.unsqueeze(1) - back
        tokens_GL = self.history.data[self.history.lines(rows).unsqueeze(1), at_GL.clamp_min(0)]
        return torch.where(at_GL >= prompt_length_G.unsqueeze(1), tokens_GL, -2)

    def tokens(self, row: int) -> tuple[list[int], list[int]]:
        """(prompt ids, output ids) of a row that keeps a history. Waits for the device."""
        if row not in self.history:
            raise RuntimeError("the token history of this request is not kept")
        tokens = self.history.line(row)[: int(self._lengths_R[row])].tolist()
        prompt = int(self._host_wholes[row, Whole.PROMPT_LENGTH])
        return tokens[:prompt], tokens[prompt:]

    def request_processors(self, row: int) -> RequestProcessors | None:
        return self._request_processors[row]

    # --- parts of add ---

    def _drop(self, row: int) -> None:
        if self.params[row] is None:
            return
        self.params[row] = self._request_processors[row] = None
        self.needs[row] = self.top_k[row] = 0
        for table in self._tables:
            table.drop(row)
        self.grammars.drop(row)
        if self.engine_processors.processors:
            self.engine_processors.retire(row)

    def _put_numbers(self, new: NewRow) -> Needs:
        p, greedy = new.params, new.params.greedy
        top_k = p.top_k if not greedy and 0 < p.top_k < self.vocab_size else 0
        top_p = 1.0 if greedy else p.top_p
        # a greedy row among others: temperature 1, and min_p 1 leaves the likeliest tokens only
        min_p = 1.0 if greedy else p.min_p
        reals = [
            1.0 if greedy else p.temperature, np.log(min_p) if min_p else NEG_INF, top_p,
            p.repetition_penalty, p.presence_penalty, p.frequency_penalty,
        ]  # fmt: skip
        seed = new.seed & (2**64 - 1)
        wholes = [seed - 2**64 if seed >= 2**63 else seed, new.sample_index, new.prompt_length, top_k, int(greedy)]
        self._host_reals[new.row] = torch.tensor(reals, dtype=torch.float64)
        self._host_wholes[new.row] = torch.tensor(wholes, dtype=torch.int64)
        self.top_k[new.row] = top_k
        self._dirty = True
        needs = Needs(0) if greedy else Needs.NOISE | (Needs.MIN_P if min_p else 0)
        return needs | (Needs.TOP_K if top_k else 0) | (Needs.TOP_P if top_p < 1.0 else 0)

    def _put_edits(self, new: NewRow) -> Needs:
        params = new.params
        edits = [(token, value, FOREVER) for token, value in (params.logit_bias or {}).items()]
        edits += [(word[0], NEG_INF, FOREVER) for word in params.bad_words_token_ids if len(word) == 1]
        if params.min_tokens:
            ends = sorted(params.all_stop_token_ids | set(new.eos_token_ids))
            edits += [(token, NEG_INF, params.min_tokens) for token in ends]
        edits = [edit for edit in edits if edit[0] < self.vocab_size]
        if not edits:
            return Needs(0)
        ids, values, until = zip(*edits, strict=True)
        self.edit_ids.put(new.row, torch.tensor(ids))
        self.edit_values.put(new.row, torch.tensor(values, dtype=torch.float32))
        self.edit_until.put(new.row, torch.tensor(until))
        return Needs.EDITS

    def _put_masks(self, row: int, params: SamplingParams) -> Needs:
        needs = Needs(0)
        if params.allowed_token_ids is not None:
            bits = np.zeros(-(-self.vocab_size // 32) * 32, np.uint8)
            bits[[token for token in params.allowed_token_ids if token < self.vocab_size]] = 1
            self.allowed.put(row, torch.from_numpy(np.packbits(bits, bitorder="little").view(np.int32)))
            needs |= Needs.ALLOWED
        words = [word[::-1] for word in params.bad_words_token_ids if len(word) > 1 and word[-1] < self.vocab_size]
        if words:
            length = max(len(word) for word in words)
            self.words.put(row, torch.tensor([word + [-1] * (length - len(word)) for word in words]))
            needs |= Needs.WORDS
        return needs

    def _put_history(self, new: NewRow, needs: Needs) -> Needs:
        p = new.params
        penalties = p.repetition_penalty != 1.0 or bool(p.presence_penalty) or bool(p.frequency_penalty)
        if not (penalties or needs & (Needs.WORDS | Needs.PROCESSORS) or p.prompt_logprobs is not None):
            return Needs(0)
        longest = self.max_len if p.max_tokens is None else min(self.max_len, new.prompt_length + p.max_tokens)
        tokens = to_device(new.tokens.astype(np.int64), self.device)
        self.history.clear(new.row, (max(longest, len(tokens)),))[: len(tokens)] = tokens
        self._lengths_R[new.row] = len(tokens)
        if not penalties:
            return Needs.HISTORY
        counts_V = self.counts.clear(new.row, (self.vocab_size,))
        # tokens beyond the vocabulary stand for features: they have no logits
        parts = [part[part < self.vocab_size] for part in np.split(new.tokens, [new.prompt_length])]
        prompt, output = to_device(np.concatenate(parts).astype(np.int64), self.device).split([len(p) for p in parts])
        counts_V[prompt] = IN_PROMPT
        counts_V.scatter_add_(0, output, torch.ones_like(output, dtype=torch.int32))
        return Needs.HISTORY | Needs.PENALTIES
