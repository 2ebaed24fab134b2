"""The fault matrix: what happens to the engine or to clients, at each moment of a server's life. Whatever it is, every
request ends in time with an answer or a typed error, nothing is left behind, and the books balance."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import psutil
import pytest
from servers import Server, gone, until

from quire.cli.remote import Remote
from quire.types.errors import EngineError

BOUND_S = 60.0
BODY: dict[str, Any] = {"model": "demo", "stream": True, "ignore_eos": True, "stream_options": {"include_usage": True}}
SHORT = {**BODY, "prompt": "Once upon a time", "max_tokens": 200}
LONG = {**BODY, "prompt": "a long prompt " * 100, "max_tokens": 20}
DISTINCT = [{**LONG, "prompt": f"{i} is a number, and so is {i + 1}. " * 24} for i in range(40)]

MOMENTS = ["idle", "prefill", "decode", "load", "draining"]
WORK = {"idle": [], "prefill": DISTINCT, "decode": [SHORT] * 4, "load": [SHORT, LONG] * 32, "draining": [SHORT] * 8}


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server("--shutdown-timeout=40")
    yield server
    if server.process.poll() is None:
        server.stop(signal.SIGKILL)
    assert server.process.stderr is not None
    server.process.stderr.close()


async def ask(server: Server, body: dict[str, Any], seen: list[int]) -> int | str:
    """How many tokens came, or the error that ended the request."""
    count = 0
    try:
        async for event in Remote(server.url).stream("/v1/completions", body):
            seen[0] += 1
            count = event["usage"]["completion_tokens"] if event.get("usage") else count
    except EngineError as e:
        return str(e)
    return count


@asynccontextmanager
async def busy(server: Server, moment: str) -> AsyncGenerator[list[asyncio.Task[int | str]]]:
    """The server at that moment; the requests that run."""
    seen = [0]
    tasks = [asyncio.create_task(ask(server, body, seen)) for body in WORK[moment]]
    if moment == "prefill":
        await wait_for(lambda: asyncio.to_thread(lambda: server.metric("vllm:num_requests_waiting") > 0))
    elif tasks:
        await wait_for(lambda: after(seen[0] >= 10))
    if moment == "draining":
        server.process.send_signal(signal.SIGTERM)
        await wait_for(lambda: asyncio.to_thread(lambda: server.get("/ready").status_code == 503))
    yield tasks


async def after(value: bool) -> bool:
    await asyncio.sleep(0)
    return value


async def wait_for(condition: Callable[[], Awaitable[bool]]) -> None:
    end = time.monotonic() + 20
    while not await condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.002)


def closing(server: Server, engine: int, moment: str) -> None:
    """The server goes on as before, or ends as it was told to; nobody is left."""
    if moment == "draining":
        assert server.process.wait(BOUND_S) == 0
    else:
        server.idle()
        assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 3}).status_code == 200
        last = server.engine().pid
        assert server.stop() == 0
        assert gone(last)
    assert gone(engine)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_engine(server: Server, moment: str) -> None:
    """Every request ends as if nothing had happened."""
    engine = server.engine().pid

    async def main() -> None:
        async with busy(server, moment) as tasks:
            os.kill(engine, signal.SIGKILL)
            answers = await asyncio.wait_for(asyncio.gather(*tasks), BOUND_S)
            assert answers == [body["max_tokens"] for body in WORK[moment]]

    asyncio.run(main())
    if moment != "draining":
        until(lambda: server.metric("quire:engine_restarts") == 1 and server.get("/health").status_code == 200, 20)
    assert any("it is started again" in line for line in server.log)
    closing(server, engine, moment)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_stopped_engine_goes_on(server: Server, moment: str) -> None:
    engine = server.engine().pid

    async def main() -> None:
        async with busy(server, moment) as tasks:
            os.kill(engine, signal.SIGSTOP)
            await wait_for(lambda: after(psutil.Process(engine).status() == psutil.STATUS_STOPPED))
            await asyncio.sleep(0.3)
            done = sum(task.done() for task in tasks)
            await asyncio.sleep(0.3)
            assert sum(task.done() for task in tasks) == done, "nothing ends while the engine is stopped"
            os.kill(engine, signal.SIGCONT)
            answers = await asyncio.wait_for(asyncio.gather(*tasks), BOUND_S)
            assert answers == [body["max_tokens"] for body in WORK[moment]]

    asyncio.run(main())
    closing(server, engine, moment)


@pytest.mark.parametrize("moment", ["prefill", "load"])
def test_clients_that_leave(server: Server, moment: str) -> None:
    """Half of them go; the others never know."""
    engine = server.engine().pid

    async def main() -> None:
        async with busy(server, moment) as tasks:
            for task in tasks[::2]:
                task.cancel()
            answers = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), BOUND_S)
            left = [answer for answer in answers if isinstance(answer, asyncio.CancelledError)]
            assert len(left) >= 1
            wanted = [body["max_tokens"] for body in WORK[moment]]
            assert answers[1::2] == wanted[1::2]

    asyncio.run(main())
    if moment != "draining":
        server.idle()
        assert server.metric("vllm:request_success_total", finished_reason="abort") >= 1
    closing(server, engine, moment)


@pytest.mark.parametrize("moment", ["decode", "draining"])
def test_half_a_body(server: Server, moment: str) -> None:
    engine = server.engine().pid
    host, port = server.url.removeprefix("http://").split(":")

    async def main() -> None:
        with socket.create_connection((host, int(port))) as half:
            half.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{")
            async with busy(server, moment) as tasks:
                answers = await asyncio.wait_for(asyncio.gather(*tasks), BOUND_S)
                assert answers == [body["max_tokens"] for body in WORK[moment]]
                if moment == "draining":
                    await asyncio.to_thread(server.process.wait, BOUND_S)

    asyncio.run(main())
    closing(server, engine, moment)


@pytest.mark.parametrize("moment", ["idle", "decode", "load"])
def test_a_killed_front_end(server: Server, moment: str) -> None:
    """Its clients see their connections end; the engine goes with it."""
    engine = server.engine().pid

    async def main() -> None:
        async with busy(server, moment) as tasks:
            server.process.kill()
            answers = await asyncio.wait_for(asyncio.gather(*tasks), BOUND_S)
            assert any(isinstance(answer, str) for answer in answers) or not tasks

    asyncio.run(main())
    until(lambda: gone(engine), 5)
