"""The way to a core in a process of its own: `ProcessClient`.

Owns: that process, the socket to it, and what is known of the requests that it runs. When the process is lost it is
started again, and its requests are replayed from their tokens: the noise of a token depends on the request's seed and
the token's position alone, so they go on as if nothing had happened. Requests that were there twice when the core died
are replayed one after the other, each once the one before has got a token: if the core dies again, it is clear of whose
work, and that request ends with an error. A process that is there and computes nothing, though there is work, counts as
lost after a while. All from one thread, except `wake`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import time
from collections import deque
from concurrent.futures import Future
from typing import Any

import msgspec
import zmq

from quire.config.schema import Config
from quire.engine import wire
from quire.models.registry import travelling
from quire.parallel.launch import ERROR, Child, describe_exit
from quire.types.errors import ClientError, EngineError
from quire.types.params import SamplingParams
from quire.types.request import Delta, FinishReason, Request
from quire.types.stats import EngineStats

log = logging.getLogger(__name__)

_SERVE = "quire.engine.serve:serve"
_SOCKET = "core"
_STOP_S = 5.0  # how long the core may take to end when asked
_CALL_S = 120.0
COUNTERS = ("preemptions", "prefix_queries", "prefix_hits", "prompt_tokens", "generation_tokens")
HELLO = 0  # the number of a call that only wants an answer
MAX_DEATHS = 2  # of the core under one request, before it is suspected
MAX_STARTS = 3  # in a row that fail, or that no step follows
CALM_S = 30.0  # a process that was ready so long counts as a success
_LOOK_S = 1.0  # how often to look whether the core makes progress


class _Live:
    """A request that runs: what is known of its sequences."""

    def __init__(self, request: Request) -> None:
        params = request.params
        self.request, self.deaths = request, 0
        self.samples = params.n if isinstance(params, SamplingParams) else 0
        self.tokens: list[list[int] | None] = [[] for _ in range(self.samples)]
        self.begun = False
        self.sent = False  # to the core that runs now

    def take(self, delta: Delta) -> bool:
        """Answers whether the request is over with this."""
        if delta.finish is None:
            if (known := self.tokens[delta.index]) is not None:
                known += delta.tokens
                self.begun = True
            return False
        return self.end(delta.index)

    def end(self, index: int) -> bool:
        if not self.samples:  # beams end together
            return True
        self.tokens[index], self.begun = None, True
        return all(known is None for known in self.tokens)

    def resumed(self) -> Request:
        """The request for another core."""
        request = self.request
        if not self.begun:
            return request
        params = request.params
        if isinstance(params, SamplingParams) and params.prompt_logprobs is not None:
            params = params.clone()
            params.prompt_logprobs = None  # they came with the first token
        return msgspec.structs.replace(request, params=params, resume=tuple(self.tokens))


class ProcessClient:
    """Raises `ClientError` for a configuration that the core refuses, `EngineError` where it cannot be started.

    Make it in a thread that lives as long as the engine: on Linux the core's process ends with the thread that made it.
    After `stall_s` seconds in which there was work and nothing was computed, the process is replaced; so is one that,
    started again, takes longer than that, and than twice what the first one took, to be ready. 0: never.
    """

    def __init__(self, config: Config, stall_s: float = 0.0) -> None:
        self._config, self._stall_s = travelling(config), stall_s
        self._context = zmq.Context(io_threads=1)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._live: dict[str, _Live] = {}
        self._suspects: deque[str] = deque()  # the first one is being tried, and nothing new begins meanwhile
        self._late: list[Delta] = []  # for the next `step`
        self._asked: dict[int, tuple[str, Future[Any]]] = {}
        self._calls = 0
        self._stats = EngineStats()
        self._before: EngineStats | None = None
        self._meant = 0  # requests that the core has been given, or will be
        self._closed = False
        self._ready = False
        self._starts = 0
        self._since = 0.0  # when the process was started, then when it was ready
        self._patience = stall_s  # seconds that a process which is started again may take
        self.restarts = 0
        self.steps: deque[int] = deque(maxlen=100_000)  # how many tokens each step computed, till somebody asks
        self.progress = time.monotonic()  # when something last moved, or there was nothing to move
        self._looked = self._awake = self.progress  # the last look at it; the end of the last long pause between two
        self.seconds: dict[str, float] = {}
        self._start()
        begin = time.monotonic()
        while not self._ready:
            self._turn(None)
        self._patience = max(stall_s, 2 * (time.monotonic() - begin))

    # -- the client's face ---------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        if not self._live:
            self.progress = time.monotonic()
        try:  # now, even if it is sent later: what cannot be sent must not come up then
            data = wire.encode(wire.Add(request))
        except NotImplementedError as error:
            text = f"logits_processors of a request cannot be sent to another process ({error}): name the class in"
            raise ClientError(f"{text} the engine's logits_processors", "logits_processors") from error
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            text = f"extra_args cannot be sent to the engine's process: {error}"
            raise ClientError(text, "extra_args") from error
        live = self._live[request.id] = _Live(request)
        self._meant += 1
        if self._ready and not self._suspects:
            self._give(live, data)

    def abort(self, request_ids: list[str]) -> None:
        for name in request_ids:
            self._forget(name)
        if self._ready:
            self._send(wire.Abort(request_ids))
            self._try()

    def end(self, request_id: str, index: int, at: int) -> None:
        if (live := self._live.get(request_id)) is not None and live.end(index):
            self._forget(request_id)
        if self._ready:
            self._send(wire.End(request_id, index, at))
            self._try()

    def step(self) -> list[Delta]:
        """Waits for what the core's next step brings, or for `wake`. Raises `EngineError` where the core is lost and
        cannot be started again."""
        if not self._late:
            self._turn(_LOOK_S if self._stall_s and (self._live or not self._ready) else None)
            self._look()
        late, self._late = self._late, []
        return late

    def wake(self) -> None:
        """From any thread: have `step` return."""
        if not self._closed:
            os.eventfd_write(self._wake, 1)

    @property
    def has_work(self) -> bool:
        """There may always be a message."""
        return True

    @property
    def ready(self) -> bool:
        """Whether the core's process is there; False while it is started again."""
        return self._ready

    def stats(self) -> EngineStats:
        """As of the core's last step; counters go on where the last process left off."""
        return self._stats if self._before is None else _added(self._stats, self._before)

    def queue(self) -> tuple[EngineStats, int]:
        """The core's last statistics, and how many requests they do not know of yet."""
        stats = self._stats
        return stats, max(0, self._meant - stats.received)

    def take_steps(self) -> list[int]:
        """How many tokens each step since the last call computed. From any thread."""
        return [self.steps.popleft() for _ in range(len(self.steps))]

    def reset_prefix_cache(self) -> bool:
        return self.call("reset_prefix_cache")

    def ask(self, method: str, *arguments: Any) -> Future[Any]:
        """The answer of one of `wire.CALLS`, when it comes; `EngineError` where it does not, `ClientError` where the
        core refuses. Raises `EngineError`."""
        if not self._ready:
            raise EngineError("the engine's process is being started again")
        self._calls += 1
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()  # whoever does not wait for it any more leaves it as it is
        self._asked[self._calls] = method, future
        self._send(wire.Call(self._calls, method, list(arguments)))
        return future

    def call(self, method: str, *arguments: Any) -> Any:
        """As `ask`, and waits. Raises `EngineError`, `ClientError`."""
        future = self.ask(method, *arguments)
        until = time.monotonic() + _CALL_S
        while not future.done():
            left = until - time.monotonic()
            if left <= 0:
                raise EngineError(f"{method}: the engine's process does not answer")
            self._turn(left)
        return future.result()

    def shutdown(self) -> None:
        """End the process, in bounded time. May be repeated."""
        if self._closed:
            return
        self._closed = True
        if self._ready:
            self._send(wire.Stop())
            if self._child.exit_code(_STOP_S) is None:
                log.warning("the engine's process did not end when asked and is killed")
        self._drop()
        os.close(self._wake)
        self._context.destroy(linger=0)

    # -- the process ---------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="quire-")
        self._address = f"ipc://{self._folder}/{_SOCKET}"
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set(zmq.LINGER, 0)
        self._socket.set(zmq.SNDHWM, 0)
        self._socket.set(zmq.RCVHWM, 0)
        self._since = time.monotonic()
        self._child = Child(_SERVE, (self._config, self._address, time.time()))
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._child.channel.fileno(), zmq.POLLIN)
        self._poller.register(self._wake, zmq.POLLIN)

    def _drop(self) -> None:
        self._ready = False
        for number in list(self._asked):
            self._answered(wire.Reply(number, error="the engine's process has ended"))
        self._child.kill()
        self._child.channel.close()
        self._socket.close()
        _unlink(self._folder, _SOCKET)

    def _turn(self, timeout_s: float | None) -> None:
        """Wait for something and take it in."""
        events = dict(self._poller.poll(None if timeout_s is None else max(1, int(timeout_s * 1000))))
        if self._wake in events:
            os.eventfd_read(self._wake)
        while self._ready:  # before the channel: what a dying core has said still counts
            try:
                data = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            self._take(wire.decode(data, wire.FromCore))
        if self._child.channel.fileno() in events:
            self._hear()

    def _look(self) -> None:
        """Give up a core that hangs. Time in which this process was stopped itself is not held against it."""
        now = time.monotonic()
        if now - self._looked > 3 * _LOOK_S:
            self._awake = now
        self._looked = now
        if not self._stall_s:
            return
        if not self._ready:
            late = now - max(self._since, self._awake)
            if late > self._patience:
                self._child.kill()
                self._lost(f"it was killed, since it was not ready after {late:.0f} s")
            return
        quiet = now - max(self.progress, self._awake)
        if self._live and quiet > self._stall_s:
            self._child.kill()
            self._lost(f"it was killed, since requests waited and nothing was computed for {quiet:.0f} s")

    def _take(self, message: wire.FromCore) -> None:
        if isinstance(message, wire.Reply):
            if message.number == HELLO:
                _unlink(self._folder, _SOCKET)  # connected: a crash leaves nothing behind now
                return
            self._answered(message)
            return
        self._stats = message.stats
        self._starts = 0
        if message.tokens:
            self.steps.append(message.tokens)
            self.progress = time.monotonic()
        for delta in message.deltas:
            live = self._live.get(delta.request_id)
            if live is not None and live.take(delta):
                del self._live[delta.request_id]
            if self._suspects and delta.request_id == self._suspects[0]:
                self._suspects.popleft()
                self._begin()
        self._late += message.deltas

    def _answered(self, reply: wire.Reply) -> None:
        method, future = self._asked.pop(reply.number)
        if reply.error is not None and reply.refused:
            future.set_exception(ClientError(reply.error))
        elif reply.error is not None:
            future.set_exception(EngineError(f"{method}: {reply.error}"))
        else:
            future.set_result(reply.value)

    def _hear(self) -> None:
        """The channel says that the core is ready, or how it ended."""
        text = ""
        try:
            data = self._child.channel.recv_bytes()
            if not data.startswith(ERROR):
                first = wire.decode(data, wire.Ready | wire.Refused)
                if isinstance(first, wire.Refused):
                    self.shutdown()
                    raise ClientError(first.text, first.parameter)
                self._connect(first)
                return
            text = data[len(ERROR) :].decode(errors="replace").rstrip()
        except (EOFError, OSError):
            pass
        self._lost(text)

    def _connect(self, ready: wire.Ready) -> None:
        self._socket.connect(self._address)
        self._stats, self.seconds = ready.stats, ready.seconds
        self._ready = True
        self._since = time.monotonic()
        self.progress = time.monotonic()
        self._send(wire.Call(HELLO, "hello"))
        self._suspects.extend(name for name, live in self._live.items() if live.deaths >= MAX_DEATHS)
        self._begin()

    def _begin(self) -> None:
        """Send the next suspect, or, where there is none, all that wait."""
        while self._suspects and self._suspects[0] not in self._live:
            self._suspects.popleft()
        for live in [self._live[self._suspects[0]]] if self._suspects else self._live.values():
            if not live.sent:
                self._give(live, wire.encode(wire.Add(live.resumed())))

    def _try(self) -> None:
        """Go on with the next suspect if the one that was tried has ended."""
        if self._suspects and self._suspects[0] not in self._live:
            self._begin()

    def _give(self, live: _Live, data: bytes) -> None:
        self._socket.send(data)
        live.sent = True

    def _forget(self, name: str) -> None:
        if (live := self._live.pop(name, None)) is not None and not live.sent:
            self._meant -= 1

    def _guilty(self) -> list[str]:
        """Of whose work the core died, as far as that can be told; counts the deaths of all."""
        if self._suspects:
            return [self._suspects[0]]
        for live in self._live.values():
            live.deaths += live.sent
        found = [name for name, live in self._live.items() if live.deaths >= MAX_DEATHS]
        return found if len(found) == 1 else [name for name in found if self._live[name].deaths > MAX_DEATHS]

    def _lost(self, text: str) -> None:
        code = self._child.exit_code(1.0)
        last = text.splitlines()[-1] if text else ""
        reason = f"the engine's process {describe_exit(code)}" + (f": {last}" if last else "")
        first = not self._ready and self.restarts == 0
        calm = self._ready and time.monotonic() - self._since > CALM_S
        self._drop()
        self._starts = 1 if calm else self._starts + 1
        if self._closed or first or self._starts > MAX_STARTS:
            raise EngineError(f"{reason}\n{text}" if text else reason)
        log.error("%s; it is started again, with its %d requests", reason, len(self._live))
        if text:
            log.error("%s", text)
        self.restarts += 1
        self._before, self._stats = self.stats(), EngineStats()
        for name in self._guilty():
            if self._live.pop(name, None) is not None:
                self._late.append(Delta(name, 0, [], FinishReason.ERROR, error=reason))
        self._suspects.clear()
        for live in self._live.values():
            live.sent = False
        self._meant = len(self._live)
        self._start()

    def _send(self, message: wire.ToCore) -> None:
        self._socket.send(wire.encode(message))


def _added(now: EngineStats, before: EngineStats) -> EngineStats:
    return msgspec.structs.replace(now, **{name: getattr(now, name) + getattr(before, name) for name in COUNTERS})


def _unlink(folder: str, name: str) -> None:
    """Remove the socket's file and folder: whoever is connected stays so, and nothing is left for a crash to leave."""
    with contextlib.suppress(OSError):
        os.unlink(os.path.join(folder, name))
    with contextlib.suppress(OSError):
        os.rmdir(folder)
