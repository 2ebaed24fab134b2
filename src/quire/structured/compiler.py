"""Grammars compiled aside: by a few threads, each with a process in which it tries a grammar first, under limits.

Owns: those threads and processes, and the cache of grammars by their text. One hostile grammar costs one thread its
time limit and no request anything else. Knows no sequences.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import OrderedDict
from concurrent.futures import Future
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.parallel.launch import Child
from quire.structured.source import grammar_source, kind
from quire.structured.vocabulary import name_special, read_tokenizer, size_of, special_tokens
from quire.types.errors import BusyError, ClientError, EngineError
from quire.types.params import StructuredOutputsParams

if TYPE_CHECKING:
    from quire.structured.grammar import Grammar

log = logging.getLogger(__name__)

KEPT = 512  # grammars in the cache, refusals among them
KEPT_LENGTH = 4 << 20  # characters of their texts, together; a compiled grammar takes many times its text
THREADS = 2
IDLE_S = 60.0  # how long a process waits for the next grammar
START_S = 120.0  # most that it may take to start, on a busy machine
WAIT_S = 300.0  # most that anybody waits for a grammar
STACK = 32 << 20  # bytes of stack for compiling: more than a trial has


class Compiler:
    """For one tokenizer: the tokenizer.json of `folder`, `vocab_size` token ids of which `eos` end a text. A grammar
    may take `limit_s` seconds of CPU time to compile.

    Raises `ClientError` where the tokenizer cannot be used.
    """

    def __init__(self, folder: Path, vocab_size: int, eos: tuple[int, ...], limit_s: float) -> None:
        if not eos:
            raise ClientError("structured_outputs need an end token, and this model has none", "structured_outputs")
        from quire.structured.grammar import make_tokenizer

        text = read_tokenizer(folder)
        self.size = max(vocab_size, size_of(text))
        self._special = special_tokens(text)
        self._arguments = (text, self.size, eos, limit_s)
        self._limit_s = limit_s
        try:
            self._tokenizer = make_tokenizer(text, self.size, eos)
        except Exception as e:  # the library raises bare Exception
            why = str(e).strip().splitlines()[:1]
            raise ClientError(f"structured_outputs cannot use this tokenizer: {why}", "structured_outputs") from e
        self._grammars: OrderedDict[str, Future[Grammar]] = OrderedDict()
        self._length = 0  # of their texts
        self._jobs: queue.SimpleQueue[tuple[str, str, Future[Grammar]]] = queue.SimpleQueue()
        self._threads = self._idle = 0
        self._lock = threading.Lock()

    def source(self, params: StructuredOutputsParams) -> str:
        """The grammar that `params` ask for, as text for `submit`. Raises `ClientError`."""
        if params.structural_tag is not None:
            text = "structured_outputs.structural_tag is not supported: write it as a grammar"
            raise ClientError(text, "structured_outputs")
        source = grammar_source(params)
        return source if source.startswith("{") else name_special(source, self._special)

    def submit(self, params: StructuredOutputsParams, most: int | None = None) -> Future[Grammar]:
        """Start to compile; the future fails with `ClientError` for grammars that are wrong or beyond the limits.
        Raises `BusyError` for a new grammar where `most` are waiting for a thread."""
        source, name = self.source(params), kind(params)
        with self._lock:
            if (known := self._grammars.get(source)) is not None:
                self._grammars.move_to_end(source)
                return known
            if most is not None and self._jobs.qsize() >= most:
                raise BusyError(f"{most} grammars are waiting to be compiled, and no more may")
            if self._jobs.qsize() >= self._idle and self._threads < THREADS:
                _start(self._work)  # before the grammar is kept: a thread that cannot be had leaves no trace
                self._threads += 1
            future: Future[Grammar] = Future()
            future.set_running_or_notify_cancel()  # others may wait for it as well: who leaves leaves it as it is
            self._keep(source, future)
            self._jobs.put((source, name, future))
        return future

    def compile(self, params: StructuredOutputsParams) -> Grammar:
        """As `submit`, waiting for it. Raises `EngineError` where the compilation fails or does not end."""
        return compiled(self.submit(params))

    def knows(self, source: str) -> bool:
        """Whether a grammar is compiled."""
        with self._lock:
            known = self._grammars.get(source)
        return known is not None and known.done()

    def trusted(self, source: str) -> Grammar:
        """A grammar that was compiled before, here or in another process."""
        with self._lock:
            known = self._grammars.get(source)
        if known is not None:
            return compiled(known)
        from quire.structured.grammar import Grammar

        future: Future[Grammar] = Future()
        future.set_result(Grammar(source, self._tokenizer))
        with self._lock:
            self._keep(source, future)
        return future.result()

    def tokenize(self, text: bytes) -> list[int]:
        return self._tokenizer.tokenize_bytes(text)

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to the text; special tokens by their names."""
        return self._tokenizer.decode_bytes([token])

    def _keep(self, source: str, future: Future[Grammar]) -> None:
        """The newest is kept, whatever its length."""
        self._forget(source)
        self._grammars[source] = future
        self._length += len(source)
        while len(self._grammars) > KEPT or (self._length > KEPT_LENGTH and len(self._grammars) > 1):
            self._forget(next(iter(self._grammars)))

    def _forget(self, source: str) -> None:
        if self._grammars.pop(source, None) is not None:
            self._length -= len(source)

    # --- in a thread ---

    def _work(self) -> None:
        """Compile until nothing comes for a while."""
        child: Child | None = None
        try:
            while True:
                job = self._next()
                if job is None:
                    return
                source, name, future = job
                try:
                    child = child or self._child()
                    error, alive = self._trial(child, source)
                    if not alive:
                        child.kill()
                        child = None
                    if error:
                        raise ClientError(f"structured_outputs.{name} cannot be used: {error}", "structured_outputs")
                    from quire.structured.grammar import Grammar

                    future.set_result(Grammar(source, self._tokenizer))
                except ClientError as e:
                    future.set_exception(e)
                except Exception as e:
                    log.exception("compiling a grammar failed")
                    with self._lock:
                        self._forget(source)  # not the grammar's fault: it may be tried again
                    future.set_exception(EngineError(f"compiling a grammar failed: {type(e).__name__}: {e}"))
        finally:
            if child is not None:
                child.kill()
                child.channel.close()

    def _next(self) -> tuple[str, str, Future[Grammar]] | None:
        with self._lock:
            self._idle += 1
        try:
            job = self._jobs.get(timeout=IDLE_S)
        except queue.Empty:
            job = None
        with self._lock:
            self._idle -= 1
            if job is None and not self._jobs.empty():
                job = self._jobs.get()
            if job is None:
                self._threads -= 1
        return job

    def _child(self) -> Child:
        child = Child("quire.structured.trial:serve", self._arguments)
        if not child.channel.poll(START_S) or child.channel.recv_bytes() != b"ready":
            child.kill()
            raise EngineError("the process that tries grammars did not start")
        return child

    def _trial(self, child: Child, source: str) -> tuple[str, bool]:
        """(what is wrong, whether the child lives on)."""
        try:
            child.channel.send_bytes(source.encode())
            if child.channel.poll(20 * self._limit_s + 5):
                return child.channel.recv_bytes().decode(), True
        except (EOFError, OSError):
            code = child.exit_code(5.0)
            if code is not None and code not in (-27, None):  # not SIGPROF
                return "it is too large or nested too deeply to compile", False
        return f"it takes more than {self._limit_s:g} s to compile", False


def compiled(future: Future[Grammar], timeout_s: float = WAIT_S) -> Grammar:
    """The grammar that `submit` promised; waits for it. Raises `ClientError`, `EngineError`."""
    try:
        return future.result(timeout_s)
    except ClientError as e:  # a refusal is kept, and raised for each who asks: with a traceback of its own
        raise ClientError(str(e), e.parameter) from None
    except EngineError as e:
        raise EngineError(str(e)) from None
    except TimeoutError:
        raise EngineError("a grammar was not compiled in time") from None


def _start(work: Any) -> None:
    with _stack_lock:
        before = threading.stack_size(STACK)
        try:
            threading.Thread(target=work, name="quire-grammar", daemon=True).start()
        finally:
            threading.stack_size(before)


_stack_lock = threading.Lock()


@lru_cache(maxsize=4)
def compiler(folder: Path, vocab_size: int, eos: tuple[int, ...], limit_s: float) -> Compiler:
    """The compiler of a tokenizer: one in a process, so that what the front compiled is there for the worker."""
    return Compiler(folder, vocab_size, eos, limit_s)
