"""Which tokens the grammar of each constrained row allows next.

Owns: the place of each such row in its grammar, and the bits of its next mask. All of it happens in one thread of its
own, in the order of the calls here, so that masks are computed while the host plans and the device runs the next
forward pass; only `masks` waits. Knows no logits. A row without a grammar never comes here.

Where reasoning comes first (`SamplingParams.structured_after`), a row is free until that text has been generated.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from quire.types.params import SamplingParams
from quire.types.plan import Ints, NewRow


class Matcher(Protocol):
    """See `structured.grammar.Matcher`."""

    def copy(self) -> Matcher: ...
    def consume(self, tokens: list[int]) -> bool: ...
    def fill(self, words: NDArray[np.int32]) -> None: ...
    @property
    def stopped(self) -> bool: ...
    @property
    def error(self) -> str: ...


class Grammar(Protocol):
    def matcher(self) -> Matcher: ...


class Compiler(Protocol):
    """See `structured.compiler.Compiler`."""

    size: int

    def trusted(self, source: str) -> Grammar: ...
    def tokenize(self, text: bytes) -> list[int]: ...
    def token_bytes(self, token: int) -> bytes: ...


Compilers = Callable[[tuple[int, ...]], Compiler]  # of the ids of the end tokens


@dataclass
class _Row:
    """`after`: the text that must come first, "" once it has; `tail`: the last bytes generated before it. `drawn`:
    output tokens so far. `error`: why no token can be drawn. `over`: the text is complete, only an end token is left.
    """

    params: SamplingParams
    compiler: Compiler
    matcher: Matcher
    after: bytes
    tail: bytes = b""
    drawn: int = 0
    error: str = ""
    over: bool = False
    words: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))

    def consume(self, tokens: list[int]) -> None:
        for token in tokens:
            self.drawn += 1
            if self.after:
                self._free(token)
            elif not (self.error or self.over or self.matcher.consume([token])):
                self.error = f"the grammar does not allow token {token}: {self.matcher.error}"

    def _free(self, token: int) -> None:
        self.tail += self.compiler.token_bytes(token)
        at = self.tail.find(self.after)
        if at < 0:
            self.tail = self.tail[-len(self.after) :]
            return
        rest = self.tail[at + len(self.after) :].lstrip()
        self.after = b""
        if rest and not self.matcher.consume(self.compiler.tokenize(rest)):
            self.error = "what followed the reasoning in the same token is not allowed by the grammar"

    def fill(self) -> None:
        """Compute the next mask into new `words`: the old ones may still be on their way to the device."""
        if self.error or self.over:
            return
        ends = self.params.eos_token_ids
        if self.after:
            self.words = np.full(-(-self.compiler.size // 32), -1, np.int32)
            if self.params.ignore_eos:
                _clear(self.words, ends)
            return
        self.words = np.zeros(-(-self.compiler.size // 32), np.int32)
        self.matcher.fill(self.words)
        self.error = self.matcher.error
        if self.error:
            return
        others = self.words.copy()
        _clear(others, ends)
        self.over = self.matcher.stopped or not others.any()
        if not self.over and (self.params.ignore_eos or self.drawn < self.params.min_tokens):
            self.words = others

    def copy(self) -> _Row:
        return replace(self, matcher=self.matcher.copy())


class Masks(NamedTuple):
    """`words_GW`: 32 tokens a word, of the rows asked for. `over`: (index among them, end token) of those whose text is
    complete. `failed`: (index, message)."""

    words_GW: NDArray[np.int32]
    over: list[tuple[int, int]]
    failed: list[tuple[int, str]]


class GrammarRows:
    """Rows by their device row. `compilers`: where grammars come from; they were compiled once before."""

    def __init__(self, compilers: Compilers) -> None:
        self._compilers = compilers
        self._rows: dict[int, _Row | str] = {}  # a text: why the row has no grammar
        self._thread: ThreadPoolExecutor | None = None
        self._last: Future[object] | None = None
        self.live: set[int] = set()

    def add(self, new: NewRow) -> None:
        """A constrained sequence enters, perhaps again, with its tokens."""
        self.live.add(new.row)
        self._post(self._add, new)

    def fork(self, sources: list[int], destinations: list[int]) -> None:
        """All sources are read before any destination is written."""
        if not self.live.isdisjoint((*sources, *destinations)):
            copied = [d for s, d in zip(sources, destinations, strict=True) if s in self.live]
            self.live -= set(destinations)
            self.live |= set(copied)
            self._post(self._fork, sources, destinations)

    def drop(self, row: int) -> None:
        if row in self.live:
            self.live.discard(row)
            self._post(self._rows.pop, row, None)

    def advance(self, rows: Ints, tokens: Callable[[], Ints]) -> None:
        """The rows have drawn; `tokens` waits for what, one for each of `rows`."""
        if self.live and (mine := [(i, row) for i, row in enumerate(rows.tolist()) if row in self.live]):
            self._post(self._advance, mine, tokens)

    def masks(self, rows: list[int]) -> Masks:
        """Of constrained rows, for their next draw. Waits for the thread."""
        assert self._last is not None
        self._last.result()
        width = max((len(r.words) for r in self._rows.values() if isinstance(r, _Row)), default=0)
        words_GW = np.full((len(rows), width), -1, np.int32)
        over: list[tuple[int, int]] = []
        failed: list[tuple[int, str]] = []
        for g, number in enumerate(rows):
            row = self._rows[number]
            error = row if isinstance(row, str) else row.error
            if error:
                failed.append((g, f"structured_outputs: {error}"))
            elif isinstance(row, _Row):
                words_GW[g, : len(row.words)] = row.words
                if row.over:
                    over.append((g, row.params.eos_token_ids[0]))
        return Masks(words_GW, over, failed)

    def _post(self, work: Callable[..., object], *arguments: object) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "quire-masks")
        self._last = self._thread.submit(work, *arguments)

    # --- in the thread ---

    def _add(self, new: NewRow) -> None:
        params = new.params
        assert params.structured_outputs is not None and params.structured_outputs.grammar is not None
        try:
            compiler = self._compilers(params.eos_token_ids)
            matcher = compiler.trusted(params.structured_outputs.grammar).matcher()
            row = _Row(params, compiler, matcher, params.structured_after.encode())
            row.consume(new.tokens[new.prompt_length :].tolist())
            row.fill()
        except Exception as e:
            self._rows[new.row] = f"{type(e).__name__}: {e}"
        else:
            self._rows[new.row] = row

    def _fork(self, sources: list[int], destinations: list[int]) -> None:
        copies = [self._rows.get(s) for s in sources]
        for d, row in zip(destinations, copies, strict=True):
            self._rows.pop(d, None)
            if row is not None:
                self._rows[d] = row if isinstance(row, str) else row.copy()

    def _advance(self, mine: list[tuple[int, int]], tokens: Callable[[], Ints]) -> None:
        for i, number in mine:
            row = self._rows.get(number)
            if isinstance(row, _Row):
                try:
                    row.consume([int(tokens()[i])])
                    row.fill()
                except Exception as e:  # it fails its row, at the next draw
                    row.error = f"{type(e).__name__}: {e}"


def _clear(words: NDArray[np.int32], tokens: tuple[int, ...]) -> None:
    for token in tokens:
        words[token // 32] &= ~np.int32(np.uint32(1 << token % 32).view(np.int32))
