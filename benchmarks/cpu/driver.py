"""The parent's side of the protocol: starts runners, asks them, watches their memory and the rest of the machine.

Owns: a runner's process from its start to its end, and what /proc says of it. The protocol is in peers/worker.py. Knows
neither what is asked nor which engine answers.
"""

from __future__ import annotations

import json
import math
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.cpu.workloads import Request, Timing

ROOT = Path(__file__).resolve().parents[2]
QUIET_CORES = 0.15  # others may use so much of the machine while something is measured


class PeerError(Exception):
    """A runner refused, died or took too long; the message says why."""


class TimeUp(Exception):
    """The run's time is over; what was under way is lost, what was measured is not."""


@dataclass(frozen=True, slots=True)
class Memory:
    """MiB of a process and its children: most that was resident at any time (anonymous and file pages; what they share
    counts once for each), and how the resident pages divide now."""

    peak: float
    anonymous: float
    file: float


class Runner:
    """One engine in a process of its own. Use it as a context manager. `timeout`: seconds for one answer. `deadline`:
    when waiting ends in TimeUp, by time.monotonic()."""

    def __init__(
        self,
        python: Path,
        module: str,
        options: Mapping[str, Any],
        environment: Mapping[str, str],
        timeout: float = 600,
        deadline: float = math.inf,
    ) -> None:
        self.timeout, self.deadline = timeout, deadline
        self.begun = time.perf_counter()
        self.stamps: dict[str, float] = {}
        self.settings: dict[str, Any] = {}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self._rest = b""
        self.process = subprocess.Popen(
            [str(python), "-m", module, json.dumps(options)],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )

    def wait_ready(self) -> None:
        """Wait until the engine is loaded. `settings` are then its own, and `stamps` has seconds since the start of the
        process."""
        self._read("imported")
        self.settings = self._read("ready")["settings"]

    def generate(self, requests: Sequence[Request]) -> list[Timing]:
        """Run the requests together; each must get as many tokens as it asked for."""
        self.send(requests)
        return self.receive(requests)

    def send(self, requests: Sequence[Request]) -> None:
        """The first half of `generate`; may be called before the engine is ready."""
        line = json.dumps({"requests": [[r.prompt, r.output_tokens] for r in requests]}) + "\n"
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line.encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            raise PeerError(self._last_words()) from None

    def receive(self, requests: Sequence[Request]) -> list[Timing]:
        """The second half."""
        timings = [Timing(*t) for t in self._read("done")["timings"]]
        wanted, got = [r.output_tokens for r in requests], [t.count for t in timings]
        if wanted != got:
            raise PeerError(f"asked for {sum(wanted)} tokens, got {sum(got)}")
        return timings

    def memory(self) -> Memory:
        """See Memory. Ask before `close`."""
        totals = dict.fromkeys(("VmHWM", "RssAnon", "RssFile"), 0.0)
        for pid in process_tree(self.process.pid):
            for line in _read(f"/proc/{pid}/status").splitlines():
                name, _, value = line.partition(":")
                if name in totals:
                    totals[name] += int(value.split()[0]) / 1024
        return Memory(totals["VmHWM"], totals["RssAnon"], totals["RssFile"])

    def close(self) -> None:
        """End the process, by force where it does not end by itself."""
        if self.process.stdin:
            with suppress(BrokenPipeError):  # it has ended with something still to be read
                self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()
        self._errors.close()

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _read(self, event: str) -> dict[str, Any]:
        message = json.loads(self._line())
        self.stamps[message["event"]] = time.perf_counter() - self.begun
        if message["event"] == "refused":
            raise PeerError(message["reason"])
        assert message["event"] == event, message
        return message

    def _line(self) -> bytes:
        assert self.process.stdout is not None
        end = min(time.monotonic() + self.timeout, self.deadline)
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                self.process.kill()
                raise TimeUp if end == self.deadline else PeerError(f"no answer in {self.timeout:.0f} s")
            part = os.read(self.process.stdout.fileno(), 1 << 16)
            if not part:
                raise PeerError(self._last_words())
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _last_words(self) -> str:
        self.process.wait()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        return f"ended with status {self.process.returncode}: {lines[-1] if lines else 'no message'}"


class Noise:
    """How many cores everything but one process tree used since this was made (time that the hypervisor gave to others
    counts)."""

    def __init__(self, pid: int | None = None) -> None:
        self._pid = pid
        self._before, self._start = self._ticks(), time.perf_counter()

    def cores(self) -> float:
        """Cores, on average."""
        seconds = time.perf_counter() - self._start
        return max(0.0, (self._ticks() - self._before) / os.sysconf("SC_CLK_TCK") / seconds)

    def _ticks(self) -> int:
        fields = _read("/proc/stat").split("\n", 1)[0].split()[1:9]
        user, nice, system, _idle, _wait, irq, softirq, steal = map(int, fields)
        busy = user + nice + system + irq + softirq + steal
        for pid in () if self._pid is None else process_tree(self._pid):
            own = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
            busy -= sum(map(int, own[11:15]))  # its own, and that of its children that have ended
        return busy


class Patience:
    """Waits for others to leave the machine alone: at most so many seconds in all, then no more."""

    def __init__(self, seconds: float) -> None:
        self.left = seconds

    def wait(self, deadline: float = math.inf) -> None:
        """Return when the machine is quiet, when patience is at its end, or at `deadline` of time.monotonic()."""
        while self.left > 0 and time.monotonic() < deadline:
            noise, start = Noise(), time.monotonic()
            time.sleep(min(0.5, self.left))
            if noise.cores() < QUIET_CORES:
                return
            self.left -= time.monotonic() - start


def process_tree(root: int) -> list[int]:
    """`root` and its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        fields = _read(entry / "stat").rpartition(")")[2].split() if entry.name.isdigit() else []
        if len(fields) > 1:
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    tree = [root]
    for pid in tree:
        tree += children.get(pid, [])
    return tree


def _read(path: str | Path) -> str:
    """A file of /proc; empty where its process has ended."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""
