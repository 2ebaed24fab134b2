"""An engine core in a process of its own: what that process runs.

Owns: the core's loop around its socket. Messages are taken in between two steps, without waiting while there is work.
Several front ends may be connected; each is sent the deltas of its own requests. The process ends when it is told to,
or when the process that made it is gone (`parallel.launch`).
"""

from __future__ import annotations

import logging
import os
import signal
import time
from typing import Any

import zmq

from quire.config.schema import Config
from quire.engine import wire
from quire.parallel.launch import Channel
from quire.types.errors import ClientError, QuireError
from quire.types.request import Delta, FinishReason, Request
from quire.utils.imports import uncollected
from quire.utils.logging import setup_logging

with uncollected("torch"):
    from quire.engine.client import InProcessClient

log = logging.getLogger(__name__)
_SLICE_MS = 1  # how long a wait for messages is while the device is at work


def serve(channel: Channel, config: Config, address: str, begun: float) -> None:
    """Make the core, then work until told to stop. `begun`: when the process was asked for, in wall-clock seconds."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is the front end that drains, and tells when to stop
    setup_logging(config.observability.log_level, config.observability.log_format)
    seconds = {"process": time.time() - begun}
    start = time.monotonic()
    try:
        core = InProcessClient(config)
    except ClientError as error:
        channel.send(wire.encode(wire.Refused(str(error), error.parameter)))
        channel.receive()  # the end comes from the front end
        return
    seconds["model"] = time.monotonic() - start
    context = zmq.Context(io_threads=1)
    socket = context.socket(zmq.ROUTER)
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.SNDHWM, 0)
    socket.set(zmq.RCVHWM, 0)
    socket.bind(address)
    channel.send(wire.encode(wire.Ready(core.stats(), seconds)))
    try:
        _Loop(core, socket).run()
    finally:
        core.shutdown()
        context.destroy(linger=0)


class _Loop:
    def __init__(self, core: InProcessClient, socket: zmq.Socket[bytes]) -> None:
        self._core, self._socket = core, socket
        self._owner: dict[str, bytes] = {}  # request -> the front end that asked
        self._fronts: set[bytes] = set()
        self._refused: list[Delta] = []
        self._profiler: Any = None
        self._changed = False  # by something that is no step

    def run(self) -> None:
        core = self._core
        while self._take_in():
            deltas = core.step() if core.has_work else []
            if self._refused:
                deltas, self._refused = [*self._refused, *deltas], []
            self._give_out(deltas)

    def _take_in(self) -> bool:
        """Read messages; waits for one if there is nothing else to do, and for more as long as the device has enough
        to do. False: stop."""
        if not self._core.has_work:
            while not self._socket.poll(0) and self._core.idle():
                pass
            self._socket.poll()
        while True:
            try:
                front, data = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                if self._core.spare() < _SLICE_MS / 1e3:
                    return True
                self._socket.poll(_SLICE_MS)
                continue
            if not self._handle(front, wire.decode(data, wire.ToCore)):
                return False

    def _handle(self, front: bytes, message: Any) -> bool:
        self._fronts.add(front)
        self._changed = True
        match message:
            case wire.Add(request):
                self._add(front, request)
            case wire.Abort(names):
                self._core.abort(names)
                for name in names:
                    self._owner.pop(name, None)
            case wire.End(request_id, index, at):
                self._core.end(request_id, index, at)
                if not self._core.alive(request_id):
                    self._owner.pop(request_id, None)
            case wire.Call(number, method, arguments):
                self._socket.send_multipart([front, wire.encode(self._call(number, method, arguments))])
            case wire.Stop():
                return False
        return True

    def _add(self, front: bytes, request: Request) -> None:
        try:
            self._core.add(request)
            self._owner[request.id] = front
        except QuireError as error:
            delta = Delta(request.id, 0, [], FinishReason.ERROR, error=str(error))
            self._owner[request.id] = front
            self._refused.append(delta)

    def _call(self, number: int, method: str, arguments: list[Any]) -> wire.Reply:
        try:
            assert method in wire.CALLS
            own = getattr(self, f"_{method}", None)
            return wire.Reply(number, (own or getattr(self._core, method))(*arguments))
        except ClientError as error:
            return wire.Reply(number, error=str(error), refused=True)
        except Exception as error:
            log.exception("%s failed", method)
            return wire.Reply(number, error=f"{type(error).__name__}: {error}")

    def _give_out(self, deltas: list[Delta]) -> None:
        core = self._core
        tokens = core.step_tokens
        if not deltas and not tokens and not self._changed:
            return
        self._changed = False
        shares: dict[bytes, list[Delta]] = {front: [] for front in self._fronts}
        for delta in deltas:
            if (front := self._owner.get(delta.request_id)) is not None:
                shares[front].append(delta)
        stats = core.stats()
        for front, share in shares.items():
            self._socket.send_multipart([front, wire.encode(wire.Step(share, stats, tokens))])
        for delta in deltas:
            if delta.finish is not None and not core.alive(delta.request_id):
                self._owner.pop(delta.request_id, None)

    def _hello(self) -> None:
        pass

    def _start_profile(self, folder: str) -> str:
        """Record what torch does from now on."""
        import torch.profiler as profiler

        if self._profiler is not None:
            raise ClientError("the profiler is running already: stop it first")
        os.makedirs(folder, exist_ok=True)
        self._profiler = profiler.profile()
        self._profiler.start()
        return folder

    def _stop_profile(self, folder: str) -> str:
        """Write the recording as a trace for Chrome or Perfetto; answers its path."""
        if self._profiler is None:
            raise ClientError("the profiler is not running: start it first")
        running, self._profiler = self._profiler, None
        running.stop()
        path = os.path.join(folder, f"quire-{os.getpid()}-{int(time.time())}.json")
        running.export_chrome_trace(path)
        return path
