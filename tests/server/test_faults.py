"""The fault matrix: what befalls the front end, the engine or clients, at each moment of a server's life. Whatever it
is, every request ends in time with an answer or a typed error, nothing is left behind, and the books balance.

Continuous integration takes a core of the matrix; `make soak` all of it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from broken import KINDS
from hypothesis import settings
from servers import Server, gone, until

from quire.cli.remote import Remote
from quire.types.errors import EngineError

BOUND_S = 60.0
BODY: dict[str, Any] = {"model": "demo", "stream": True, "ignore_eos": True, "stream_options": {"include_usage": True}}
SHORT = {**BODY, "prompt": "Once upon a time", "max_tokens": 200}
LONG = {**BODY, "prompt": "a long prompt " * 100, "max_tokens": 20}
DISTINCT = [{**LONG, "prompt": f"{i} is a number, and so is {i + 1}. " * 24} for i in range(24)]
LAST = {**SHORT, "max_tokens": 450}  # runs longest: it is there when the moment comes

WORK = {
    "idle": [],
    "prefill": [LAST, *DISTINCT],
    "decode": [LAST, *[SHORT] * 3],
    "load": [LAST, SHORT, *[SHORT, LONG] * 31],
    "draining": [LAST, *[SHORT] * 7],
}


@dataclass
class Scene:
    """A server at one moment. `answers`: how many tokens each request got, or the error that ended it."""

    server: Server
    trigger: Path
    engine: int
    moment: str
    bodies: list[dict[str, Any]]
    tasks: list[asyncio.Task[int | str]] = field(default_factory=list)
    halves: list[socket.socket] = field(default_factory=list)
    seen: int = 0  # events, of all requests

    async def ask(self, body: dict[str, Any]) -> int | str:
        count = 0
        try:
            async for event in Remote(self.server.url).stream("/v1/completions", body):
                self.seen += 1
                count = event["usage"]["completion_tokens"] if event.get("usage") else count
        except EngineError as e:
            return str(e)
        return count

    async def answers(self) -> list[Any]:
        return await asyncio.wait_for(asyncio.gather(*self.tasks, return_exceptions=True), BOUND_S)

    @property
    def wanted(self) -> list[int]:
        return [body["max_tokens"] for body in self.bodies]

    @property
    def front(self) -> int:
        return self.server.process.pid

    def metric(self, name: str) -> Awaitable[float]:
        return asyncio.to_thread(self.server.metric, name)


@asynccontextmanager
async def at(scene: Scene, halves: bool) -> AsyncGenerator[None]:
    """Bring the moment about; `halves`: with half a body and half a head in the server's hands."""
    server = scene.server
    host, port = server.url.removeprefix("http://").split(":")
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{"
    for sent in (head, head[:30]) if halves else ():
        scene.halves.append(socket.create_connection((host, int(port))))
        scene.halves[-1].sendall(sent)
    scene.tasks += [asyncio.create_task(scene.ask(body)) for body in scene.bodies]
    if scene.moment == "prefill":
        await soon(lambda: scene.metric("vllm:num_requests_waiting"))
    elif scene.tasks:
        await soon(lambda: value(scene.seen >= 10))
    if scene.moment == "draining":
        server.process.send_signal(signal.SIGTERM)
        await soon(lambda: asyncio.to_thread(lambda: server.get("/ready").status_code == 503))
    yield
    for task in scene.tasks:
        task.cancel()


async def value(result: bool) -> bool:
    await asyncio.sleep(0)
    return result


async def soon(condition: Callable[[], Awaitable[Any]]) -> None:
    end = time.monotonic() + 30
    while not await condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.002)


# -- the faults: each is brought about, shown to be one, and awaited -------------------------------------------------


async def engine_killed(scene: Scene) -> None:
    """Every request ends as if nothing had happened."""
    os.kill(scene.engine, signal.SIGKILL)
    assert await scene.answers() == scene.wanted
    until(lambda: any("it is started again" in line for line in scene.server.log), 20)
    if scene.moment != "draining":
        await soon(lambda: asyncio.to_thread(lambda: scene.server.get("/health").status_code == 200))
        assert await scene.metric("quire:engine_restarts") == 1


async def engine_stopped(scene: Scene) -> None:
    await stopped(scene, scene.engine)


async def front_stopped(scene: Scene) -> None:
    await stopped(scene, scene.front)


async def stopped(scene: Scene, pid: int) -> None:
    """Nobody gets anything for a while, and everybody all of it."""
    os.kill(pid, signal.SIGSTOP)
    await soon(lambda: value(psutil.Process(pid).status() == psutil.STATUS_STOPPED))
    await asyncio.sleep(0.3)
    seen = scene.seen
    await asyncio.sleep(0.5)
    assert scene.seen == seen
    os.kill(pid, signal.SIGCONT)
    assert await scene.answers() == scene.wanted


async def front_killed(scene: Scene) -> None:
    """Clients see their connections end; the engine goes with it."""
    os.kill(scene.front, signal.SIGKILL)
    answers = await scene.answers()
    assert all(isinstance(answer, int | str) for answer in answers)
    assert not answers or any(isinstance(answer, str) and "broke" in answer for answer in answers)


async def clients_left(scene: Scene) -> None:
    """Half of them go; the others never know."""
    for task in scene.tasks[::2]:
        task.cancel()
    answers = await scene.answers()
    assert answers[1::2] == scene.wanted[1::2]
    if scene.tasks and scene.moment != "draining":
        assert any(isinstance(answer, asyncio.CancelledError) for answer in answers)
        scene.server.idle()
        assert await asyncio.to_thread(
            lambda: scene.server.metric("vllm:request_success_total", finished_reason="abort") >= 1
        )


async def body_halved(scene: Scene) -> None:
    """What is half sent (see `at`) holds up nobody, not even the end."""
    if scene.moment != "draining":
        assert await scene.answers() == scene.wanted
        for part in scene.halves:
            part.setblocking(False)
            with pytest.raises(BlockingIOError):
                part.recv(1)  # it is still open: the fault was there all the time
    assert await scene.answers() == scene.wanted


async def step_failed(scene: Scene, kind: str) -> None:
    """The request whose fault it is ends with an error, or nobody does."""
    body = {**LAST, "vllm_xargs": {"fault": kind}}
    if not scene.tasks:
        scene.bodies.append(body)
        scene.tasks.append(asyncio.create_task(scene.ask(body)))
    scene.trigger.touch()
    first, *others = await scene.answers()
    assert others == scene.wanted[1:]
    if kind in ("forward", "hungry"):
        assert isinstance(first, str) and ("the fault forward" if kind == "forward" else "MemoryError") in first
    else:
        assert first == scene.wanted[0]
    if kind != "memory" or others:
        assert Path(f"{scene.trigger}.log").read_text().startswith(kind)


FAULTS: dict[str, Callable[[Scene], Awaitable[None]]] = {
    "engine killed": engine_killed,
    "engine stopped": engine_stopped,
    "front killed": front_killed,
    "front stopped": front_stopped,
    "clients left": clients_left,
    "body halved": body_halved,
    **{f"step: {kind}": lambda scene, kind=kind: step_failed(scene, kind) for kind in KINDS},
}
CORE = {
    ("engine killed", "idle"), ("engine killed", "load"), ("engine killed", "draining"), ("engine stopped", "decode"),
    ("front killed", "load"), ("front stopped", "prefill"), ("clients left", "load"), ("body halved", "decode"),
    ("step: forward", "load"), ("step: forward", "draining"), ("step: once", "prefill"), ("step: memory", "load"),
    ("step: hungry", "decode"),
}  # fmt: skip
ALL = {(fault, moment) for fault in FAULTS for moment in WORK}


@pytest.mark.parametrize(("fault", "moment"), sorted(ALL if settings.get_current_profile_name() == "soak" else CORE))
def test_faults(fault: str, moment: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trigger = tmp_path / "fault"
    monkeypatch.setenv("QUIRE_FAULT", str(trigger))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    server = Server("--shutdown-timeout=40", module="broken")
    try:
        bodies = [dict(body) for body in WORK[moment]]
        if fault.startswith("step: ") and bodies:
            bodies[0]["vllm_xargs"] = {"fault": fault.removeprefix("step: ")}
        scene = Scene(server, trigger, server.engine().pid, moment, bodies)

        async def main() -> None:
            async with at(scene, fault == "body halved"):
                await FAULTS[fault](scene)

        asyncio.run(main())
        end(scene, fault == "front killed")
        for half in scene.halves:
            half.close()
    finally:
        if server.process.poll() is None:
            server.stop(signal.SIGKILL)
        assert server.process.stderr is not None
        server.process.stderr.close()


def end(scene: Scene, killed: bool) -> None:
    """The server goes on as before, or ends as it was told to; nobody is left, and the next start works."""
    server = scene.server
    if killed:
        until(lambda: gone(scene.engine), 5)
        again = Server(f"--port={server.url.rpartition(':')[2]}", module="broken")
        assert again.post("/v1/completions", {"prompt": "x", "max_tokens": 3}).status_code == 200
        assert again.stop() == 0
    elif scene.moment == "draining":
        assert server.process.wait(BOUND_S) == 0
        until(lambda: gone(scene.engine), 5)
    else:
        server.idle()
        assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 3}).status_code == 200
        last = server.engine().pid
        assert server.stop() == 0 and gone(last)
        assert gone(scene.engine)
