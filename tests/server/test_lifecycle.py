"""How servers start and end, what they let in, and what happens when their engine is lost."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import psutil
import pytest
from servers import SMALL, Server, gone, until

PROMPT = "Once upon a time"
LONG: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 450, "ignore_eos": True}


@pytest.fixture
def start() -> Iterator[Callable[..., Server]]:
    made: list[Server] = []

    def make(*args: str, **options: Any) -> Server:
        made.append(Server(*args, **options))
        return made[-1]

    yield make
    for server in made:
        if server.process.poll() is None:
            server.stop(signal.SIGKILL)
        assert server.process.stderr is not None
        server.process.stderr.close()


async def stream(server: Server, **more: Any) -> tuple[str, str | None]:
    """The text of a streamed completion, and how it ended."""
    text, end = "", None
    asked: dict[str, Any] = {"model": "demo", "stream": True, **LONG, **more}
    body = {"ignore_eos": asked.pop("ignore_eos")}
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)
    async with client:
        async for chunk in await client.completions.create(extra_body=body, **asked):
            text += chunk.choices[0].text
            end = chunk.choices[0].finish_reason or end
    return text, end


def test_keys(start: Callable[..., Server]) -> None:
    server = start("--api-key=secret", "--api-key=other")
    for path in ("/health", "/ready", "/ping"):
        assert server.get(path).status_code == 200
    for path in ("/v1/models", "/metrics", "/openapi.json", "/version", "/load", "/nothing"):
        answer = server.get(path)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert server.get(path, headers={"authorization": "Bearer wrong"}).status_code == 401
    with pytest.raises(openai.AuthenticationError):
        server.client("wrong").models.list()
    assert server.client("secret").models.list().data and server.client("other").models.list().data
    assert "access-control-allow-origin" not in server.get("/health", headers={"origin": "http://x"}).headers


def test_sigterm_lets_running_requests_end(start: Callable[..., Server]) -> None:
    server = start()
    engine = server.engine()

    async def main() -> None:
        running = [asyncio.create_task(stream(server)) for _ in range(4)]
        await asyncio.to_thread(until, lambda: server.metric("vllm:num_requests_running") == 4, 10)
        server.process.send_signal(signal.SIGTERM)
        os.kill(engine.pid, signal.SIGTERM)  # as service managers do; it means nothing to the engine
        await asyncio.to_thread(until, lambda: server.get("/ready").status_code == 503, 5)
        assert server.get("/health").status_code == 200
        refused = server.post("/v1/completions", LONG)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
        assert refused.headers["retry-after"]
        assert [end for _, end in await asyncio.gather(*running)] == ["length"] * 4

    asyncio.run(main())
    assert server.process.wait(10) == 0 and gone(engine.pid)


def test_what_is_still_in_preparation_is_told_so(start: Callable[..., Server]) -> None:
    server = start()
    slow = {"type": "integer", "multipleOf": 9999973}  # as long as a grammar may take
    bodies = [{**LONG, "structured_outputs": {"json": {**slow, "title": str(i)}}} for i in range(4)]

    async def ask(body: dict[str, Any]) -> httpx.Response:
        async with httpx.AsyncClient(timeout=60) as client:
            return await client.post(f"{server.url}/v1/completions", json=body)

    async def main() -> None:
        running = asyncio.create_task(stream(server))
        await asyncio.to_thread(until, lambda: server.metric("vllm:num_requests_running") == 1, 10)
        asked = [asyncio.create_task(ask(body)) for body in bodies]
        await asyncio.sleep(0.3)
        assert not any(task.done() for task in asked), "this test needs grammars that take long"
        server.process.send_signal(signal.SIGTERM)
        for answer in await asyncio.gather(*asked):
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "shutting_down"
        assert (await running)[1] == "length"

    asyncio.run(main())
    assert server.process.wait(10) == 0


def test_what_does_not_end_in_time_is_ended_with_an_error(start: Callable[..., Server]) -> None:
    server = start("--shutdown-timeout=0.2")
    engine = server.engine()

    async def main() -> None:
        running = asyncio.create_task(stream(server, n=8))
        await asyncio.to_thread(until, lambda: server.metric("vllm:num_requests_running") == 8, 10)
        os.kill(engine.pid, signal.SIGSTOP)  # nothing will end by itself
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shutting down"):
            await running

    asyncio.run(main())
    assert server.process.wait(15) == 0 and gone(engine.pid)


def test_a_killed_engine_is_replaced_under_its_streams(start: Callable[..., Server]) -> None:
    server = start()

    async def main() -> None:
        seeds = [{"seed": i, "temperature": 0.8} for i in range(6)]
        expected = await asyncio.gather(*(stream(server, **seed) for seed in seeds))
        first = server.engine().pid
        running = [asyncio.create_task(stream(server, **seed)) for seed in seeds]
        made = server.metric("vllm:generation_tokens_total")
        await asyncio.to_thread(until, lambda: server.metric("vllm:generation_tokens_total") > made + 200, 10)
        os.kill(first, signal.SIGKILL)
        await asyncio.to_thread(until, lambda: server.get("/health").status_code == 503, 5)
        waiting = asyncio.create_task(stream(server, **seeds[0]))  # asked while there is no engine
        assert await asyncio.gather(*running, waiting) == [*expected, expected[0]]
        assert server.engine().pid != first and gone(first) and server.get("/health").status_code == 200

    asyncio.run(main())
    server.idle()
    assert server.metric("quire:engine_restarts") == 1
    assert server.metric("vllm:request_success_total") == 13
    assert server.stop() == 0


def test_health_means_progress(start: Callable[..., Server]) -> None:
    server = start("--health-stall-timeout=0.5")
    engine = server.engine().pid

    async def main() -> None:
        os.kill(engine, signal.SIGSTOP)
        await asyncio.sleep(0.7)
        assert server.get("/health").status_code == 200, "nothing is asked for, so nothing is late"
        running = asyncio.create_task(stream(server))
        await asyncio.to_thread(until, lambda: server.get("/health").status_code == 503, 5)
        assert "nothing was computed" in server.get("/health").json()["status"]
        os.kill(engine, signal.SIGCONT)
        await asyncio.to_thread(until, lambda: server.get("/health").status_code == 200, 5)
        assert (await running)[1] == "length"

    asyncio.run(main())


def test_an_engine_that_hangs_is_replaced(start: Callable[..., Server]) -> None:
    server = start("--health-stall-timeout=0.5", "--engine-stall-timeout=2")
    seeds = [{"seed": i, "temperature": 0.8} for i in range(4)]
    both = (server.process.pid, server.engine().pid)

    async def begun() -> list[asyncio.Task[tuple[str, str | None]]]:
        made = server.metric("vllm:generation_tokens_total")
        running = [asyncio.create_task(stream(server, **seed)) for seed in seeds]
        await asyncio.to_thread(until, lambda: server.metric("vllm:generation_tokens_total") > made + 100, 10)
        return running

    async def main() -> None:
        expected = await asyncio.gather(*(stream(server, **seed) for seed in seeds))
        running = await begun()
        for pid in both:
            os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(3)
        for pid in both:
            os.kill(pid, signal.SIGCONT)
        assert await asyncio.gather(*running) == expected
        assert server.engine().pid == both[1], "time that the front end did not see counts for nothing"
        running = await begun()
        os.kill(both[1], signal.SIGSTOP)
        await asyncio.to_thread(until, lambda: server.get("/health").status_code == 503, 5)
        await asyncio.to_thread(until, lambda: server.metric("quire:engine_restarts") == 1, 10)
        assert await asyncio.gather(*running) == expected
        assert server.engine().pid != both[1] and gone(both[1]) and server.get("/health").status_code == 200

    asyncio.run(main())
    assert any("nothing was computed for 2 s" in line for line in server.log)
    server.idle()
    assert server.stop() == 0


def test_a_queue_has_an_end(start: Callable[..., Server]) -> None:
    server = start("--max-num-seqs=2", "--max-num-queued-reqs=3", "--max-num-queued-tokens=200")
    engine = server.engine().pid

    async def ask(prompt: str) -> httpx.Response:
        async with httpx.AsyncClient(timeout=60) as client:
            return await client.post(f"{server.url}/v1/completions", json={**LONG, "prompt": prompt})

    async def main() -> None:
        os.kill(engine, signal.SIGSTOP)  # so that nothing leaves the queue while requests come
        tasks = [asyncio.create_task(ask("x")) for _ in range(12)]
        await asyncio.to_thread(until, lambda: sum(task.done() for task in tasks) == 7, 20)
        assert server.post("/v1/completions", {**LONG, "prompt": "x"}).status_code == 429
        os.kill(engine, signal.SIGCONT)
        answers = await asyncio.gather(*tasks)
        assert sorted(answer.status_code for answer in answers) == [200] * 5 + [429] * 7
        for answer in answers:
            if answer.status_code == 429:
                assert answer.json()["error"]["type"] == "rate_limit_error" and answer.headers["retry-after"] == "1"
        os.kill(engine, signal.SIGSTOP)
        running = [asyncio.create_task(ask("x")) for _ in range(3)]
        await asyncio.to_thread(until, lambda: server.get("/load").json() == {"server_load": 3}, 20)
        assert (await ask("word " * 300)).status_code == 429
        os.kill(engine, signal.SIGCONT)
        assert [answer.status_code for answer in await asyncio.gather(*running)] == [200] * 3

    asyncio.run(main())
    for path in ("/tokenize", "/v1/completions"):
        answer = server.post(path, {"prompt": "x" * (256 * 512 + 1)})
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"
    server.idle()
    assert server.metric("vllm:admission_rejections_total", reason="queued_reqs") == 8
    assert server.metric("vllm:admission_rejections_total", reason="queued_tokens") == 1


def test_starting_is_told_and_a_port_in_use_too(start: Callable[..., Server]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = start(f"--port={port}", wait=False)
        assert refused.process.wait(30) == 2
    refused._reader.join()
    assert "choose another" in "".join(refused.log)
    server = start(f"--port={port}", wait=False)
    server._url = f"http://127.0.0.1:{port}"
    seen: set[int] = set()
    until(lambda: _status(server, seen) == 200, 60)
    assert seen == {200, 503}
    assert server.stop() == 0


def test_who_stops_a_server_does_not_wait_for_its_model(start: Callable[..., Server]) -> None:
    server = start(wait=False)
    until(lambda: any(p.num_threads() > 1 for p in psutil.Process(server.process.pid).children()), 60)
    engine = server.engine().pid
    os.kill(engine, signal.SIGSTOP)  # it will take for ever to start
    assert server.stop(timeout=10) == 0 and gone(engine)


def test_a_socket_left_behind_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    command = [sys.executable, "-m", "quire", "serve", "demo", f"--uds={path}", *SMALL]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any("serving demo" in line for line in process.stderr)
        taken = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert taken.returncode == 2 and "cannot listen" in taken.stderr
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as client:
            assert client.get("http://localhost/health").status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0 and not path.exists()


def test_a_certificate_that_is_not_there(start: Callable[..., Server], tmp_path: Path) -> None:
    server = start(f"--ssl-keyfile={tmp_path / 'key'}", f"--ssl-certfile={tmp_path / 'certificate'}", wait=False)
    assert server.process.wait(60) == 2
    server._reader.join()
    assert "ssl_certfile" in "".join(server.log)


def test_silence_and_halves_are_not_waited_for(start: Callable[..., Server]) -> None:
    server = start("--request-timeout=0.5")
    host, port = server.url.removeprefix("http://").split(":")
    for sent in (b"", b"GET /hea", b"POST /v1/completions HTTP/1.1\r\ncontent-length: 9\r\n\r\n{"):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(sent)
            assert connection.recv(100).startswith(b"HTTP/1.1 408"), sent
    with socket.create_connection((host, int(port)), timeout=0.2) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\ncontent-length: 99\r\n\r\n{")
        answer, begin = b"", time.monotonic()
        while not answer and time.monotonic() - begin < 5:
            try:
                answer = connection.recv(100)
            except TimeoutError:
                connection.sendall(b" ")  # a drop at a time buys no more time
        assert answer.startswith(b"HTTP/1.1 408")


def _status(server: Server, seen: set[int]) -> int:
    try:
        status = server.get("/health").status_code
    except httpx.TransportError:
        return 0
    seen.add(status)
    return status


def test_a_configuration_file(start: Callable[..., Server], tmp_path: Path) -> None:
    (tmp_path / "serve.yaml").write_text("served-model-name: from-the-file\nmax_model_len: 100\nseed: 3\n")
    server = start(f"--config={tmp_path / 'serve.yaml'}", "--max-model-len=128", module="quire.entrypoints.api_server")
    (card,) = server.client().models.list().data
    assert card.id == "from-the-file" and card.max_model_len == 128  # type: ignore[attr-defined]
    (tmp_path / "bad.yaml").write_text("max_modle_len: 100\n")
    command = [sys.executable, "-m", "quire", "serve", "demo", f"--config={tmp_path / 'bad.yaml'}"]
    bad = subprocess.run(command, capture_output=True, text=True)
    assert bad.returncode == 2 and "did you mean max_model_len?" in bad.stderr


def test_a_killed_front_end_leaves_nothing(start: Callable[..., Server]) -> None:
    server = start()
    engine = server.engine().pid
    running = subprocess.Popen(
        [sys.executable, "-c", f"import httpx2; httpx2.post('{server.url}/v1/completions', json={LONG!r}, timeout=60)"],
        stderr=subprocess.DEVNULL,
    )
    until(lambda: server.metric("vllm:num_requests_running") == 1, 20)
    server.process.kill()
    until(lambda: gone(engine), 5)
    assert running.wait(10) != 0
    port = server.url.rpartition(":")[2]
    again = start(f"--port={port}")
    assert again.post("/v1/completions", {"prompt": "x", "max_tokens": 1}).status_code == 200


def test_a_log_of_json(start: Callable[..., Server]) -> None:
    server = start("--log-format=json", "--enable-log-requests", "--log-interval=0.2")
    headers = {"x-request-id": "of-mine"}
    assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 400, "ignore_eos": True}, headers=headers)
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"nonsense\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 400")
    assert server.stop() == 0
    lines = [json.loads(line) for line in server.log]
    assert all({"time", "level", "logger", "process", "message"} <= line.keys() for line in lines)
    (asked, answered) = [line for line in lines if "of-mine" in line.get("request_id", "")]
    assert asked["prompt_tokens"] and "max_tokens=400" in asked["params"]
    assert (answered["status"], answered["path"], answered["method"]) == (200, "/v1/completions", "POST")
    assert any(line["logger"] == "uvicorn.error" for line in lines)
    assert any(line.get("generation_tokens", 0) > 0 for line in lines), "a line each interval"
    (served,) = [line for line in lines if "start" in line]
    assert {"process", "model", "engine", "total"} <= served["start"].keys()


def test_a_profile(start: Callable[..., Server], tmp_path: Path) -> None:
    server = start(f"--profiler-dir={tmp_path}")
    assert server.post("/start_profile").status_code == 200
    again = server.post("/start_profile")
    assert again.status_code == 400 and "running already" in again.json()["error"]["message"]
    server.post("/v1/completions", {"prompt": "x", "max_tokens": 3})
    path = Path(server.post("/stop_profile").json()["path"])
    assert path.parent == tmp_path and "traceEvents" in path.read_text()
    again = server.post("/stop_profile")
    assert again.status_code == 400 and "not running" in again.json()["error"]["message"]


FAULTS = Path(__file__).parent / "faults.py"


def test_faults_of_one_request_end_that_request(start: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    """One request's step raises, its logits processor raises, or it kills the engine; its neighbours never know."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FAULTS.parent), *sys.path]))
    server = start("--logits-processors=faults:Faults")

    async def bad(fault: str) -> str:
        async with httpx.AsyncClient(timeout=60) as client:
            body = {**LONG, "max_tokens": 40, "vllm_xargs": {"fault": fault}}
            answer = await client.post(f"{server.url}/v1/completions", json=body)
        assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
        return answer.json()["error"]["message"]

    async def main() -> None:
        refused = server.post("/v1/completions", {"prompt": "x", "vllm_xargs": {"fault": "refused"}, "stream": True})
        assert refused.status_code == 400 and "not to be had" in refused.json()["error"]["message"]
        seeds = [{"seed": i, "temperature": 0.8} for i in range(5)]
        expected = await asyncio.gather(*(stream(server, **seed) for seed in seeds))
        for fault, text in (("step", "the step's fault"), ("row", "the row's fault"), ("memory", "MemoryError")):
            running = [asyncio.create_task(stream(server, **seed)) for seed in seeds]
            await asyncio.to_thread(until, lambda: server.metric("vllm:num_requests_running") == 5, 10)
            assert text in await bad(fault)
            assert await asyncio.gather(*running) == expected, fault
        server.idle()
        assert server.metric("quire:engine_restarts") == 0
        assert "SIGKILL" in await bad("kill")
        assert server.metric("quire:engine_restarts") == 2

    begin = time.monotonic()
    asyncio.run(main())
    server.idle()
    assert server.metric("vllm:request_success_total", finished_reason="error") == 4
    assert time.monotonic() - begin < 60
    assert server.stop() == 0
