"""Child processes that live and die with the process that started them.

Owns: `Child` (a fresh interpreter that runs one function, and the channel to it) and the child's side of that. Knows
nothing of what is computed or said.

A child is started by command line, not by multiprocessing's spawn: spawn imports the caller's main module again, so
that a script without `if __name__ == "__main__"`, a notebook or a pipe into `python -` fails in ways hard to
understand. The channel is a socket pair with multiprocessing's framing; only bytes travel on it. The start message
alone is a pickle, from a process to the child that it has just made, as with spawn.

A child ends when its channel closes (the parent is gone, however it went), on Linux also by the kernel's parent-death
signal, and it leaves Ctrl-C to the parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from importlib import import_module
from multiprocessing.connection import Connection, Pipe
from typing import Any

_PR_SET_PDEATHSIG = 1
ERROR = b"!"  # begins a child's last message: the text of a traceback
FAILED = 70  # exit code of a child whose function raised (EX_SOFTWARE)


class Child:
    """A child process that runs `target` ("module:function") as function(channel, *arguments).

    Start it from a thread that lives as long as the child should: Linux sends the parent-death signal when the
    *thread* that made the child ends.
    """

    def __init__(self, target: str, arguments: tuple[Any, ...], env: dict[str, str] | None = None) -> None:
        self.channel, theirs = Pipe()
        code = f"import sys; sys.path[:] = {sys.path!r}; from quire.parallel.launch import main; main({theirs.fileno()}, {os.getpid()})"  # noqa: E501
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **(env or {})},
            )
        with contextlib.suppress(OSError):  # it died at once: its channel will say so
            self.channel.send_bytes(pickle.dumps((target, arguments)))

    def exit_code(self, wait_s: float) -> int | None:
        """The exit code (-n: killed by signal n), or None if it still runs after `wait_s` seconds."""
        try:
            return self.process.wait(wait_s)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """Ends the process now; harmless if it has ended."""
        self.process.kill()
        self.process.wait()


def describe_exit(code: int | None) -> str:
    """An exit code in words."""
    if code is None:
        return "closed its channel"
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name} (exit code {code})"
    except ValueError:
        return f"was killed by signal {-code} (exit code {code})"


# --- in the child ----------------------------------------------------------------------------------------------------


class Channel:
    """The child's end. Messages are read ahead by a thread, so that a sender never waits for the child's work, and so
    that the end of the parent is noticed while the child is busy."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="quire-channel", daemon=True).start()

    def receive(self) -> bytes:
        """The next message."""
        return self._inbox.get()

    def send(self, data: bytes) -> None:
        """From one thread at a time."""
        self._connection.send_bytes(data)

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """Ends the process if the body raises, in whichever thread, and tells the parent why."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):
                self.send(ERROR + traceback.format_exc().encode())
            sys.stderr.flush()
            os._exit(FAILED)  # other threads, or a collective's, must not hold up the end

    def _read(self) -> None:
        try:
            while True:
                self._inbox.put(self._connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(1)  # nobody is left to work for; the main thread may be inside a collective that never ends


def main(fd: int, parent: int) -> None:
    """Runs what the parent asks for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    os.set_inheritable(fd, False)
    _die_with(parent)
    connection = Connection(fd)
    try:
        target, arguments = pickle.loads(connection.recv_bytes())
    except EOFError:
        return
    channel = Channel(connection)
    with channel.failing():
        load(target)(channel, *arguments)


def load(target: str) -> Callable[..., Any]:
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the signal was asked for
            os._exit(1)
