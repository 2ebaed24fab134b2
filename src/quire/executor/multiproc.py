"""An executor that runs one worker per process.

Owns: the workers' processes, the way of plans to them and of results back, and what happens when one fails. Knows
nothing of what a plan means.

Each plan is encoded once and its bytes go to every rank; the ranks meet in collectives (`parallel.groups`), and rank
0's result comes back. Results come in the order of the plans, as the plans are executed.

Two threads of the executor do all the waiting. One sends, so that a Ctrl-C in the caller can never cut a message in
two; the other starts the processes and listens to all of them, so a dead rank fails what is pending at once and nobody
waits for an answer that cannot come. A failure is final: ranks that have lost one of them cannot be brought back to
step one by one.
"""

from __future__ import annotations

import contextlib
import queue
import shutil
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import msgspec
import torch

from quire.config.schema import Config
from quire.executor.base import Result
from quire.models.registry import travelling
from quire.parallel.groups import join
from quire.parallel.launch import ERROR, Channel, Child, describe_exit, load
from quire.types.errors import ClientError, EngineError
from quire.types.kv import KVGroup
from quire.types.plan import Plan, StepResult, decode, encode
from quire.utils.logging import setup_logging

WORKER = "quire.runner.worker:Worker"
_SERVE = "quire.executor.multiproc:serve"
_STOP = b""
_GRAMMAR = b"G"  # begins a message about a grammar, either way; those about plans begin as msgpack's arrays and maps do
_STOP_S = 5.0  # how long the workers may take to end when asked
_GRACE_S = 0.5  # how long after the first failure others are listened to, to tell the cause from its consequences


class Ready(msgspec.Struct, frozen=True, tag=True):
    """A worker's first message: what it can hold. The ranks have agreed on the numbers of blocks."""

    num_blocks: int
    num_host_blocks: int
    kv_groups: tuple[KVGroup, ...]


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The other first message: the worker cannot be made, and the caller can mend it."""

    text: str
    parameter: str | None


class Grammar(msgspec.Struct, frozen=True):
    """To be compiled."""

    number: int
    source: str
    eos_token_ids: tuple[int, ...]


class Compiled(msgspec.Struct, frozen=True):
    """A rank has compiled the grammar of this number, or cannot."""

    number: int
    error: str | None = None


@dataclass(frozen=True)
class _End:
    """How a rank ended. `text`: its traceback, where it could still tell."""

    rank: int
    code: int | None
    text: str

    def describe(self, size: int) -> str:
        told = f":\n{self.text.rstrip()}" if self.text else ""
        return f"worker {self.rank} of {size} {describe_exit(self.code)}{told}"


class MultiprocExecutor:
    """Runs `world` workers, by default as many as the configuration says, in processes of this machine. They end with
    `shutdown`, or when the executor is no longer referred to.

    Args:
        config: passed to each worker.
        worker: "module:Class", made in each process as cls(config, rank=..., world=...): see `runner.worker.Worker`.

    Raises:
        ClientError: what a worker found wrong with the configuration or the checkpoint.
        EngineError: a worker could not be made for another reason; the text holds its traceback.
    """

    def __init__(self, config: Config, world: int | None = None, worker: str = WORKER) -> None:
        self._ranks = ranks = _Ranks(travelling(config), world or config.parallel.world_size, worker)
        self._finalizer = weakref.finalize(self, ranks.shutdown)
        try:
            ready = ranks.ready.result()
        except BaseException:
            self.shutdown()
            raise
        self.num_blocks: int = ready.num_blocks
        self.num_host_blocks: int = ready.num_host_blocks
        self.kv_groups: tuple[KVGroup, ...] = ready.kv_groups

    def submit(self, plan: Plan) -> Future[StepResult]:
        """Sends the plan to all workers. The future fails with `EngineError` where a worker fails or has failed."""
        return self._ranks.submit(plan)

    def idle(self) -> bool:
        return False

    def shutdown(self) -> None:
        """Ends the workers, in bounded time; what is pending fails. May be called again."""
        self._ranks.shutdown()
        self._finalizer.detach()

    def prepare(self, grammar: str, eos_token_ids: tuple[int, ...]) -> Future[None]:
        """The future is done when every rank has compiled the grammar; it fails where one cannot, or has failed."""
        return self._ranks.prepare(grammar, eos_token_ids)


class _Ranks:
    """The processes and the threads that serve them; apart from the executor, which its threads must not keep alive."""

    def __init__(self, config: Config, world: int, worker: str) -> None:
        self.world = world
        self.ready: Future[Ready] = Future()
        self.folder = Path(tempfile.mkdtemp(prefix="quire-"))
        self.children: list[Child] = []
        self.broken: str | None = None
        self._closing = False
        self._pending: deque[Future[StepResult]] = deque()
        self._grammars: dict[int, tuple[Future[None], int]] = {}  # by number; how many ranks are not ready
        self._grammar = 0  # the last number
        self._lock = threading.Lock()  # of the six above
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        arguments = [(config, rank, world, str(self.folder / "meeting"), worker) for rank in range(world)]
        self._listener = threading.Thread(target=self._listen, args=(arguments,), name="quire-listen", daemon=True)
        self._sender = threading.Thread(target=self._send, name="quire-send", daemon=True)
        self._listener.start()
        self._sender.start()

    def submit(self, plan: Plan) -> Future[StepResult]:
        future: Future[StepResult] = Future()
        future.set_running_or_notify_cancel()  # a plan that is sent cannot be called back
        try:
            data = encode(plan)
        except NotImplementedError as error:
            text = f"logits_processors of a request cannot be sent to worker processes ({error}); use engine-wide ones"
            future.set_exception(ClientError(text, "logits_processors"))
            return future
        with self._lock:
            if self.broken is None and not self._closing:
                self._pending.append(future)
                self._outbox.put(data)
                return future
            reason = self.broken or "the executor is shut down"
        future.set_exception(EngineError(reason))
        return future

    def prepare(self, source: str, eos_token_ids: tuple[int, ...]) -> Future[None]:
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            if self.broken is None and not self._closing:
                self._grammar += 1
                self._grammars[self._grammar] = future, self.world
                self._outbox.put(_GRAMMAR + encode(Grammar(self._grammar, source, eos_token_ids)))
                return future
            reason = self.broken or "the executor is shut down"
        future.set_exception(EngineError(reason))
        return future

    def shutdown(self) -> None:
        with self._lock:
            first, self._closing = not self._closing, True
        if first:
            self._outbox.put(_STOP)
            self._outbox.put(None)
        self._listener.join(_STOP_S)
        with self._lock:
            for child in self.children:
                child.kill()
        self._listener.join()
        self._sender.join()
        for child in self.children:
            child.channel.close()
        self._fail_pending("the executor is shut down")
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- sending ---

    def _send(self) -> None:
        """Runs in a thread: every message to every rank."""
        while (data := self._outbox.get()) is not None:
            for child in self.children:
                with contextlib.suppress(OSError):  # a dead rank: the listener sees it
                    child.channel.send_bytes(data)

    # --- listening ---

    def _listen(self, arguments: list[tuple[Any, ...]]) -> None:
        """Runs in a thread, which also makes the processes: they die with it (`parallel.launch`)."""
        try:
            with self._lock:  # a shutdown comes before the first process or after the last
                for each in () if self._closing else arguments:
                    self.children.append(Child(_SERVE, each))
            self._hear()
        except BaseException as error:
            self._fail(f"the worker processes could not be run: {error!r}")
            raise
        finally:
            for child in self.children:
                child.kill()

    def _hear(self) -> None:
        """Until the ranks have ended, or one has failed."""
        ranks = {child.channel: rank for rank, child in enumerate(self.children)}
        ready: dict[int, Ready] = {}
        while ranks:
            for channel in wait(list(ranks)):
                rank = ranks[channel]  # type: ignore[index]
                data = self._receive(rank)
                if isinstance(data, _End):
                    del ranks[channel]  # type: ignore[arg-type]
                    if not (self._closing and data.code == 0):
                        self._fail(self._report(data, list(ranks.values())))
                        return
                elif rank not in ready:
                    first = decode(data, Ready | Refused)
                    if isinstance(first, Refused):
                        self.ready.set_exception(ClientError(first.text, first.parameter))
                        return
                    ready[rank] = first
                    if len(ready) == self.world:
                        self.ready.set_result(first)
                elif data.startswith(_GRAMMAR):
                    self._compiled(decode(data[len(_GRAMMAR) :], Compiled))
                else:
                    result = decode(data, StepResult)
                    with self._lock:
                        future = self._pending.popleft()
                    future.set_result(result)

    def _compiled(self, answer: Compiled) -> None:
        with self._lock:
            future, left = self._grammars[answer.number]
            self._grammars[answer.number] = future, left - 1
            if left == 1:
                del self._grammars[answer.number]
        if answer.error is not None and not future.done():
            future.set_exception(EngineError(answer.error))
        if left == 1 and not future.done():
            future.set_result(None)

    def _receive(self, rank: int) -> bytes | _End:
        """The next message of a rank that has one, or how it ended."""
        child, text = self.children[rank], ""
        try:
            data = child.channel.recv_bytes()
            if not data.startswith(ERROR):
                return data
            text = data[len(ERROR) :].decode(errors="replace")
        except (EOFError, OSError):
            pass
        return _End(rank, child.exit_code(_GRACE_S), text)

    def _report(self, first: _End, others: list[int]) -> str:
        """What failed, causes first: a rank that was killed says nothing, while its neighbours complain loudly about
        the connection to it, perhaps sooner."""
        ends, until = [first], time.monotonic() + _GRACE_S
        channels = {self.children[rank].channel: rank for rank in others}
        while channels and (left := until - time.monotonic()) > 0:
            for channel in wait(list(channels), left):
                end = self._receive(channels[channel])  # type: ignore[index]
                if isinstance(end, _End):
                    ends.append(end)
                    del channels[channel]  # type: ignore[arg-type]
        ends.sort(key=lambda end: end.code is None or end.code >= 0)
        return "\n".join(end.describe(self.world) for end in ends)

    def _fail(self, reason: str) -> None:
        if not self._closing and not self.ready.done():
            reason = f"the engine could not be started: {reason}"
        with self._lock:
            self.broken = self.broken or reason
        if not self.ready.done():
            self.ready.set_exception(EngineError(reason))
        self._fail_pending(reason)

    def _fail_pending(self, reason: str) -> None:
        with self._lock:
            failed = [*self._pending, *(future for future, _ in self._grammars.values() if not future.done())]
            self._pending.clear()
            self._grammars.clear()
        for future in failed:
            future.set_exception(EngineError(reason))


def serve(channel: Channel, config: Config, rank: int, world: int, meeting: str, worker: str) -> None:
    """What each process runs: makes the worker, then executes plans in the order they come until it is stopped."""
    shown = config.observability
    setup_logging(shown.log_level if rank == 0 else "warning", shown.log_format)
    group = join(rank, world, Path(meeting))
    try:
        made = load(worker)(config, rank=rank, world=world)
    except ClientError as error:
        channel.send(encode(Refused(str(error), error.parameter)))
        channel.receive()  # the others may still be loading; the end comes from the parent
        return
    # the ranks may have measured differently
    blocks, host_blocks = group.all_reduce(torch.tensor([made.num_blocks, made.num_host_blocks]), "min").tolist()
    channel.send(encode(Ready(blocks, host_blocks, tuple(made.kv_groups))))
    answers: queue.SimpleQueue[Callable[[], bytes] | None] = queue.SimpleQueue()
    answering = threading.Thread(target=_answer, args=(channel, answers), name="quire-answer", daemon=True)
    answering.start()
    while data := channel.receive():
        if data.startswith(_GRAMMAR):
            _compile(made, decode(data[len(_GRAMMAR) :], Grammar), answers)
            continue
        result: Result = made.submit(decode(data, Plan))
        if rank == 0:
            answers.put(lambda result=result: encode(result.result()))
    answers.put(None)
    answering.join()
    group.close()


def _compile(worker: Any, grammar: Grammar, answers: queue.SimpleQueue[Callable[[], bytes] | None]) -> None:
    def done(future: Future[None]) -> None:
        error = future.exception()
        text = None if error is None else f"{type(error).__name__}: {error}"
        answers.put(lambda: _GRAMMAR + encode(Compiled(grammar.number, text)))

    worker.prepare(grammar.source, grammar.eos_token_ids).add_done_callback(done)


def _answer(channel: Channel, answers: queue.SimpleQueue[Callable[[], bytes] | None]) -> None:
    """Runs in a thread: waits for the device, so that the main thread can start the next plan meanwhile."""
    with channel.failing():
        while (answer := answers.get()) is not None:
            channel.send(answer())
