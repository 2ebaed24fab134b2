"""The compilers of grammars of one worker, made when the first constrained request comes.

Owns: one compiler for each set of end tokens, and the threads that compile beside the steps. Knows no worker, so that
whoever holds this keeps no model alive.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor

from quire.config.hub import tokenizer_folder
from quire.config.schema import Config
from quire.structured.compiler import THREADS, Compiler, compiler


class GrammarCompilers:
    def __init__(self, config: Config) -> None:
        self._config = config
        self._made: dict[tuple[int, ...], Compiler] = {}
        self._threads = ThreadPoolExecutor(THREADS, "quire-grammars")
        self._lock = threading.Lock()  # of making a compiler

    def __call__(self, eos: tuple[int, ...]) -> Compiler:
        """Of grammars for texts that `eos` end."""
        model, limit = self._config.model, self._config.structured.grammar_timeout
        with self._lock:
            if (made := self._made.get(eos)) is None:
                made = compiler(tokenizer_folder(self._config), model.arch.vocab_size, eos, limit)
                self._made[eos] = made
        return made

    def prepare(self, grammar: str, eos: tuple[int, ...]) -> Future[None]:
        """Compile a grammar, which another process has tried, beside the steps; a row with it finds it made."""
        made = self._made.get(eos)
        if made is None or not made.knows(grammar):
            return self._threads.submit(self._prepare, grammar, eos)
        known: Future[None] = Future()
        known.set_result(None)
        return known

    def _prepare(self, grammar: str, eos: tuple[int, ...]) -> None:
        self(eos).trusted(grammar)
