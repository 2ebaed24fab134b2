"""Real servers, as processes of their own, for tests that talk to them over loopback."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx2 as httpx
import openai
import psutil

SMALL = (
    "--max-model-len=512 --max-num-seqs=16 --max-num-batched-tokens=256 --kv-cache-memory-bytes=16M --dtype=float32 "
    "--threads=1"
).split()


class Server:
    """`python -m quire.entrypoints.openai.api_server --model demo ...`, on a port of its own."""

    def __init__(self, *args: str, module: str = "quire.entrypoints.openai.api_server", wait: bool = True) -> None:
        command = [sys.executable, "-m", module, "--model=demo", "--host=127.0.0.1", "--port=0", *SMALL, *args]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ})
        self.log: list[str] = []
        self._url: str | None = None
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if wait:
            self.wait()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"serving .* on (http://\S+?);", line):
                self._url = found.group(1)
                self._ready.set()
        self._ready.set()

    def wait(self) -> None:
        assert self._ready.wait(120) and self._url, "".join(self.log)

    @property
    def url(self) -> str:
        assert self._url is not None
        return self._url

    def client(self, key: str = "none", strict: bool = True) -> openai.OpenAI:
        """A client that believes nothing that does not fit its types, where `strict`."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, _strict_response_validation=strict)

    def aclient(self, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, _strict_response_validation=True, **options
        )

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, **options)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        if body is not None:
            options["json"] = body
        return httpx.post(self.url + path, timeout=60, **options)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a series' values over the labels that are not given."""
        total = 0.0
        for line in self.get("/metrics").text.splitlines():
            found = re.fullmatch(r"([\w:]+)(?:\{(.*)\})? (\S+)", line)
            if found and found.group(1) == name:
                has = dict(re.findall(r'(\w+)="([^"]*)"', found.group(2) or ""))
                if all(has.get(k) == v for k, v in labels.items()):
                    total += float(found.group(3))
        return total

    def engine(self) -> psutil.Process:
        """The engine's process."""
        (child,) = psutil.Process(self.process.pid).children()
        return child

    def idle(self) -> None:
        """No request runs, no block is held, and every request that came has been counted out."""

        def quiet() -> bool:
            busy = self.metric("vllm:num_requests_running") + self.metric("vllm:num_requests_waiting")
            received, ended = self.metric("quire:requests_received_total"), self.metric("vllm:request_success_total")
            return not busy and not self.metric("quire:kv_blocks_used") and received == ended

        until(quiet, 10)

    def stop(self, number: int = signal.SIGTERM, timeout: float = 60) -> int:
        self.process.send_signal(number)
        status = self.process.wait(timeout)
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()
        return status


def until(condition: Callable[[], bool], seconds: float) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
