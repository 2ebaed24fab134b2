"""A server from its first moment to its last.

Owns: the socket, the event loop, signals, and the order of things: the socket is bound before the model is loaded, so
that a port in use is known at once; while it loads, /health is answered with 503. On SIGTERM readiness goes off, new
requests and those still in preparation get 503, running ones end or, after `shutdown_timeout`, are ended with an error;
then the engine goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any

import uvicorn

from quire.config.args import EngineArgs, ServerArgs
from quire.config.resolve import resolve
from quire.config.schema import Config
from quire.engine.async_engine import AsyncLLM
from quire.engine.llm_engine import LLMEngine
from quire.engine.process import ProcessClient
from quire.server.app import build
from quire.server.errors import unavailable
from quire.server.protocol_http import Protocol
from quire.server.served import Served
from quire.types.errors import ClientError
from quire.utils.logging import fields, setup_logging

log = logging.getLogger(__name__)

_POLL_S = 0.05
_LAST_WORDS_S = 2.0  # for error frames to reach their clients
_FILES = 65_536  # descriptors, where the system allows so many: a connection is one


def serve(engine_args: EngineArgs, args: ServerArgs, begun: float | None = None) -> int:
    """Serve until a signal; the exit status. `begun`: when the program began, in wall-clock seconds.

    Raises ClientError for a configuration that cannot be met.
    """
    setup_logging(engine_args.log_level, engine_args.log_format)
    for handler in logging.getLogger("quire").handlers:  # what uvicorn warns of looks like the rest
        logging.getLogger("uvicorn.error").addHandler(handler)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (_FILES if most < 0 else min(_FILES, most), most))
    sock = _bind(args)
    try:
        config = resolve(engine_args, usage="server")
        served = Served(config, args)
        server = _Server(served, sock, time.time() if begun is None else begun)
        return asyncio.run(server.run(), loop_factory=_loop_factory()) if sys.version_info >= (3, 12) else _run(server)
    finally:
        sock.close()
        if args.uds is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(args.uds)


def _run(server: _Server) -> int:
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(server.run())


def _loop_factory() -> Any:
    import uvloop

    return uvloop.new_event_loop


def _bind(args: ServerArgs) -> socket.socket:
    """The listening socket. Raises ClientError."""
    if args.uds is not None:
        sock = socket.socket(socket.AF_UNIX)
        where: Any = args.uds
        _clear(args.uds)
    else:
        host = args.host or "0.0.0.0"
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        where = (host, args.port)
    try:
        sock.bind(where)
    except OSError as error:
        sock.close()
        text = f"cannot listen on {args.uds or f'{where[0]} port {args.port}'} ({error.strerror}): choose another"
        raise ClientError(text, "port", args.port) from error
    return sock


def _clear(path: str) -> None:
    """Remove the socket that a killed server left behind."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as other:
        if stat.S_ISSOCK(os.stat(path).st_mode) and other.connect_ex(path) != 0:
            os.unlink(path)


def _http(served: Served) -> uvicorn.Config:
    """Raises ClientError where certificate and key are of no use."""
    args = served.args
    config = uvicorn.Config(
        build(served),
        http=partial(Protocol, head_timeout_s=args.request_timeout),  # type: ignore[arg-type]
        ws="none",
        log_config=None,
        access_log=False,
        lifespan="off",
        ssl_keyfile=args.ssl_keyfile,
        ssl_certfile=args.ssl_certfile,
        timeout_graceful_shutdown=int(_LAST_WORDS_S),
    )
    try:
        config.load()
    except OSError as error:  # an SSLError is one
        text = f"ssl_certfile={args.ssl_certfile!r} and ssl_keyfile={args.ssl_keyfile!r} cannot be used: {error}"
        raise ClientError(text, "ssl_certfile", args.ssl_certfile) from error
    return config


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are this module's."""
        yield


def _make(config: Config, stall_s: float, made: Future[AsyncLLM]) -> None:
    try:
        client = partial(ProcessClient, stall_s=stall_s)
        made.set_result(AsyncLLM(make=partial(LLMEngine, config, client)))
    except BaseException as error:
        made.set_exception(error)


class _Server:
    def __init__(self, served: Served, sock: socket.socket, begun: float) -> None:
        self._served, self._sock, self._begun = served, sock, begun
        self._args = served.args
        self._engine: AsyncLLM | None = None
        self._stop = asyncio.Event()
        self._status = 0
        self._uvicorn = _Uvicorn(_http(served))

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)
        http = asyncio.create_task(self._uvicorn.serve([self._sock]))
        starting = asyncio.create_task(self._start())
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({http, starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                watching = asyncio.create_task(self._watch())
                await asyncio.wait({http, stopping, watching}, return_when=asyncio.FIRST_COMPLETED)
                watching.cancel()
            if http.done():
                self._status = 1
                http.result()
            await self._drain()
        finally:
            starting.cancel()
            stopping.cancel()
            self._uvicorn.should_exit = True
            await asyncio.wait({http}, timeout=2 * _LAST_WORDS_S)
            if self._engine is not None:
                await asyncio.to_thread(self._engine.shutdown)
        return self._status

    def _signalled(self, number: int) -> None:
        if self._stop.is_set():
            log.warning("a second signal: running requests are ended now")
            self._hurry()
        self._served.draining = True
        self._stop.set()

    async def _start(self) -> None:
        """Load the model, beside the event loop."""
        config = self._served.config
        begin = time.monotonic()
        made: Future[AsyncLLM] = Future()
        made.set_running_or_notify_cancel()
        # A thread that the end of the program does not wait for: whoever stops a server does not wait for its model.
        make = partial(_make, config, self._args.engine_stall_timeout, made)
        threading.Thread(target=make, name="quire-start", daemon=True).start()
        self._engine = engine = await asyncio.wrap_future(made)
        client = engine.engine.client
        assert isinstance(client, ProcessClient)
        metrics = self._served.metrics
        seconds = {**client.seconds, "engine": time.monotonic() - begin, "total": time.time() - self._begun}
        metrics.started(seconds)
        metrics.watch(client.stats, client.take_steps)
        self._served.start(engine)
        parts = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
        name = self._sock.getsockname()
        where = name if isinstance(name, str) else f"http://{name[0]}:{name[1]}"
        about = fields(models=list(self._served.names), where=where, start=seconds)
        log.info("serving %s on %s; the start took: %s", ", ".join(self._served.names), where, parts, extra=about)

    async def _watch(self) -> None:
        """Returns when the engine is beyond help."""
        assert self._engine is not None
        while self._engine.is_running:
            await asyncio.sleep(10 * _POLL_S)
        log.critical("the engine failed for good; the server ends")
        self._served.draining = True
        self._status = 1

    async def _drain(self) -> None:
        """Wait for running requests, as long as they may take, then end them."""
        served = self._served
        served.draining = True
        for task in list(served.preparing):  # `Guard` answers them
            task.cancel()
        if served.runs:
            log.info("shutting down: %d requests may take up to %g s", len(served.runs), self._args.shutdown_timeout)
        until = time.monotonic() + self._args.shutdown_timeout
        while served.runs and time.monotonic() < until and not self._hurried:
            await asyncio.sleep(_POLL_S)
        if served.runs:
            log.warning("%d requests have not ended in time and are ended with an error", len(served.runs))
            for run in list(served.runs):
                run.close(unavailable("the server is shutting down", "shutting_down"))
        await asyncio.sleep(_POLL_S)  # for the last frames to be written

    _hurried = False

    def _hurry(self) -> None:
        self._hurried = True
