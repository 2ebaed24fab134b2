"""A server in a process of its own, and what it uses."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from urllib.request import urlopen

import psutil


@dataclass(frozen=True)
class Use:
    """Of one process."""

    cpu_s: float
    memory_mib: float
    files: int
    threads: int


class ServerProcess:
    """`quire serve MODEL ...` on a free port of this machine. `ready_s`: from its start to its first 200 at /health."""

    def __init__(self, model: str, *args: str) -> None:
        begin = time.monotonic()
        command = [sys.executable, "-m", "quire", "serve", model, "--host=127.0.0.1", "--port=0", *args]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.log: list[str] = []
        self.url = ""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"serving .* on (http://\S+?);", line):
                self.url = found.group(1)
                break
        else:
            raise RuntimeError("".join(self.log))
        with urlopen(f"{self.url}/health") as answer:
            assert answer.status == 200
        self.ready_s = time.monotonic() - begin
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.log.extend(self.process.stderr)

    @property
    def front(self) -> psutil.Process:
        return psutil.Process(self.process.pid)

    @property
    def engine(self) -> psutil.Process:
        return self.front.children()[0]

    def metrics(self) -> dict[str, float]:
        """The sum of each series over its labels."""
        out: dict[str, float] = {}
        with urlopen(f"{self.url}/metrics") as answer:
            for line in answer.read().decode().splitlines():
                if found := re.fullmatch(r"([\w:]+)(?:\{.*\})? (\S+)", line):
                    out[found.group(1)] = out.get(found.group(1), 0.0) + float(found.group(2))
        return out

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(60)


def use(process: psutil.Process) -> Use:
    times = process.cpu_times()
    memory = process.memory_info().rss / (1 << 20)
    return Use(times.user + times.system, memory, process.num_fds(), process.num_threads())
