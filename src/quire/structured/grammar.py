"""Compiled grammars and the state of one sequence in them: a thin layer over llguidance.

Owns: the limits under which grammars are compiled and followed, which bound each of llguidance's calls, and how its
errors are told. Imported where llguidance is needed at once; others import `compiler`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

# Fuel, counted and not timed, so that a grammar is refused on every machine or on none.
LIMITS: dict[str, Any] = dict(
    max_items_in_row=1000,
    initial_lexer_fuel=500_000,
    step_lexer_fuel=50_000,
    step_max_items=10_000,
    max_lexer_states=50_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)


def make_tokenizer(tokenizer: str, size: int, eos: tuple[int, ...]) -> LLTokenizer:
    """From tokenizer.json's text; `size` token ids, of which `eos` end a text. Raises `ValueError` for kinds of
    tokenizers that llguidance does not know."""
    return LLTokenizer(tokenizer, n_vocab=size, eos_token=list(eos))


class Matcher:
    """Where one text is in a grammar."""

    def __init__(self, inner: LLMatcher) -> None:
        self._inner = inner

    def copy(self) -> Matcher:
        return Matcher(self._inner.deep_copy())

    def consume(self, tokens: list[int]) -> bool:
        """Go on by tokens; False (and an error from then on) if one is not allowed."""
        return self._inner.consume_tokens(tokens)

    def fill(self, words: NDArray[np.int32]) -> None:
        """Set the bits (32 to a word) of the tokens that are allowed next; end tokens where the text may end."""
        self._inner.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)

    @property
    def stopped(self) -> bool:
        """Whether nothing but an end token can come."""
        return self._inner.is_stopped()

    @property
    def error(self) -> str:
        """Why the grammar cannot be followed any further, in one line; "" if it can."""
        return one_line(self._inner.get_error()) if self._inner.is_error() else ""


class Grammar:
    """A compiled grammar, from which matchers are made. Immutable."""

    def __init__(self, source: str, tokenizer: LLTokenizer) -> None:
        """Raises `ValueError` for grammars that are wrong or too large."""
        self._start = LLMatcher(tokenizer, source, limits=LLParserLimits(**LIMITS), log_level=0)
        if self._start.is_error():
            raise ValueError(one_line(self._start.get_error()))

    def matcher(self) -> Matcher:
        """At the beginning of a text."""
        return Matcher(self._start.deep_copy())


def one_line(error: str) -> str:
    """The part of llguidance's message that says what is wrong."""
    lines = [line.strip() for line in error.replace("<non-verbose/>", "").splitlines() if line.strip()]
    text = " ".join(line for line in lines[:4] if not set(line) <= set("^ "))
    return text[:300] or "unknown error"
