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
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import msgspec
import torch

from quire.config.schema import Config
from quire.parallel.groups import join
from quire.parallel.launch import ERROR, Channel, Child, describe_exit, load
from quire.types.errors import EngineError
from quire.types.kv import KVGroup
from quire.types.plan import Plan, StepResult, decode, encode

WORKER = "quire.runner.worker:Worker"
_SERVE = "quire.executor.multiproc:serve"
_STOP = b""
_STOP_S = 5.0  # how long the workers may take to end when asked
_GRACE_S = 0.5  # how long after the first failure others are listened to, to tell the cause from its consequences


class Ready(msgspec.Struct, frozen=True):
    """A worker's first message: what it can hold. The ranks have agreed on `num_blocks`."""

    num_blocks: int
    kv_groups: tuple[KVGroup, ...]


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
    """Runs `world` workers, by default as many as the configuration says, in processes of this machine.

    Args:
        config: passed to each worker.
        worker: "module:Class", made in each process as cls(config, rank=..., world=...); it has `execute(plan)`,
            `num_blocks` and `kv_groups`.

    Raises:
        EngineError: a worker could not be made; the text holds its traceback.
    """

    def __init__(self, config: Config, world: int | None = None, worker: str = WORKER) -> None:
        self.world = world or config.parallel.world_size
        self._folder = Path(tempfile.mkdtemp(prefix="quire-"))
        self._ready: Future[Ready] = Future()
        self._lock = threading.Lock()  # of the four below
        self._pending: deque[Future[StepResult]] = deque()
        self._broken: str | None = None
        self._closing = False
        self._children: list[Child] = []
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        arguments = [(config, rank, self.world, str(self._folder / "meeting"), worker) for rank in range(self.world)]
        self._listener = threading.Thread(target=self._listen, args=(arguments,), name="quire-listen", daemon=True)
        self._sender = threading.Thread(target=self._send, name="quire-send", daemon=True)
        # reached at the interpreter's exit; an executor that is merely forgotten is kept alive by its threads
        self._finalizer = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._listener.start()
        self._sender.start()
        try:
            ready = self._ready.result()
        except BaseException:
            self.shutdown()
            raise
        self.num_blocks: int = ready.num_blocks
        self.kv_groups: tuple[KVGroup, ...] = ready.kv_groups

    def submit(self, plan: Plan) -> Future[StepResult]:
        """Sends the plan to all workers. The future fails with `EngineError` where a worker fails or has failed."""
        future: Future[StepResult] = Future()
        future.set_running_or_notify_cancel()  # a plan that is sent cannot be called back
        try:
            data = encode(plan)
        except NotImplementedError as error:  # a callable among the sampling parameters
            future.set_exception(EngineError(f"the step cannot be sent to worker processes: {error}"))
            return future
        with self._lock:
            if self._broken is None and not self._closing:
                self._pending.append(future)
                self._outbox.put(data)
                return future
            reason = self._broken or "the executor is shut down"
        future.set_exception(EngineError(reason))
        return future

    def shutdown(self) -> None:
        """Ends the workers, in bounded time; what is pending fails. May be called again."""
        with self._lock:
            first, self._closing = not self._closing, True
        if first:
            self._outbox.put(_STOP)
            self._outbox.put(None)
        self._listener.join(_STOP_S)
        for child in self._children:
            child.kill()
        self._listener.join()
        self._sender.join()
        self._fail_pending("the executor is shut down")
        self._finalizer()

    # --- sending ---

    def _send(self) -> None:
        """Runs in a thread: every message to every rank."""
        while (data := self._outbox.get()) is not None:
            for child in self._children:
                with contextlib.suppress(OSError):  # a dead rank: the listener sees it
                    child.channel.send_bytes(data)

    # --- listening ---

    def _listen(self, arguments: list[tuple[Any, ...]]) -> None:
        """Runs in a thread, which also makes the processes: they die with it (`parallel.launch`)."""
        try:
            with self._lock:  # a shutdown comes before the first process or after the last
                for each in () if self._closing else arguments:
                    self._children.append(Child(_SERVE, each))
            self._hear()
        except BaseException as error:
            self._fail(f"the worker processes could not be run: {error!r}")
            raise
        finally:
            for child in self._children:
                child.kill()
                child.channel.close()

    def _hear(self) -> None:
        """Until the ranks have ended, or one has failed."""
        ranks = {child.channel: rank for rank, child in enumerate(self._children)}
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
                    ready[rank] = decode(data, Ready)
                    if len(ready) == self.world:
                        self._ready.set_result(ready[0])
                else:
                    with self._lock:
                        future = self._pending.popleft()
                    future.set_result(decode(data, StepResult))

    def _receive(self, rank: int) -> bytes | _End:
        """The next message of a rank that has one, or how it ended."""
        child, text = self._children[rank], ""
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
        channels = {self._children[rank].channel: rank for rank in others}
        while channels and (left := until - time.monotonic()) > 0:
            for channel in wait(list(channels), left):
                end = self._receive(channels[channel])  # type: ignore[index]
                if isinstance(end, _End):
                    ends.append(end)
                    del channels[channel]  # type: ignore[arg-type]
        ends.sort(key=lambda end: end.code is None or end.code >= 0)
        return "\n".join(end.describe(self.world) for end in ends)

    def _fail(self, reason: str) -> None:
        if not self._closing and not self._ready.done():
            reason = f"the engine could not be started: {reason}"
        with self._lock:
            self._broken = self._broken or reason
        if not self._ready.done():
            self._ready.set_exception(EngineError(reason))
        self._fail_pending(reason)

    def _fail_pending(self, reason: str) -> None:
        with self._lock:
            failed, self._pending = self._pending, deque()
        for future in failed:
            future.set_exception(EngineError(reason))


def serve(channel: Channel, config: Config, rank: int, world: int, meeting: str, worker: str) -> None:
    """What each process runs: makes the worker, then executes plans in the order they come until it is stopped."""
    group = join(rank, world, Path(meeting))
    made = load(worker)(config, rank=rank, world=world)
    blocks = group.all_reduce(torch.tensor([made.num_blocks]), "min")  # the ranks may have measured differently
    channel.send(encode(Ready(int(blocks), tuple(made.kv_groups))))
    while data := channel.receive():
        result = made.execute(decode(data, Plan))
        if rank == 0:
            channel.send(encode(result))
    group.close()
