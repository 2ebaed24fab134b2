"""The page at /: its files, its data, who may have them, and, where there is a Chromium, what one sees.

`QUIRE_TEST_SCREENSHOTS` names a folder to keep pictures of it in.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
from browser import FOUND, MISSING, Browser
from servers import Server, until
from starlette.testclient import TestClient

from quire.config.args import EngineArgs, ServerArgs
from quire.config.resolve import resolve
from quire.server import live, page
from quire.server.app import build
from quire.server.errors import ApiError
from quire.server.served import Served

LONG = {"max_tokens": 380, "ignore_eos": True, "stream": True}
BEGINNING = "A quire is a gathering of sheets, folded once and laid one inside the other. " * 4


def cells(found: dict[str, Any]) -> list[tuple[int, ...]]:
    runs = [found["runs"][i : i + 5] for i in range(0, len(found["runs"]), 5)]
    return [tuple(run[1:]) for run in runs for _ in range(run[0])]


# -- files -----------------------------------------------------------------------------------------------------------


def test_the_page_is_whole_and_needs_nothing_from_elsewhere(server: Server) -> None:
    answer = server.get("/")
    assert answer.status_code == 200 and answer.headers["content-type"] == "text/html; charset=utf-8"
    html = answer.text
    wanted = re.findall(r'(?:src|href)="([^"#]+)"', html)
    for name in wanted:
        if name.endswith(".js"):
            wanted += [f"ui/{one}" for one in re.findall(r'from "\./([^"]+)"', server.get(f"/{name}").text)]
    assert {f"/{name}" for name in wanted} | {"/"} == set(page.FILES)
    for path, (data, kind) in page.FILES.items():
        found = server.get(path)
        assert found.status_code == 200 and found.content == data and found.headers["content-type"] == kind
        assert server.get(path, headers={"if-none-match": found.headers["etag"]}).status_code == 304
        elsewhere = set(re.findall(rb"https?://[^\s\"']+", data)) - {b"http://www.w3.org/2000/svg"}
        assert not elsewhere and b"innerHTML" not in data and b"eval(" not in data
        policy = found.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
        assert found.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"<script(?![^>]*src=)|<style|\sstyle=|\son\w+=", html)
    assert server.get("/ui/nothing.js").json()["error"]["code"] == "not_found"
    assert server.get("/ui/..%2f..%2fapp.py").status_code == 404


def test_data_needs_the_key_and_the_page_says_nothing() -> None:
    server = Server("--api-key=secret-1", "--served-model-name=hidden-name")
    try:
        for path in page.FILES:
            answer = server.get(path)
            assert answer.status_code == 200 and "secret-1" not in answer.text and "hidden-name" not in answer.text
        for path in ("/engine/stats", "/engine/blocks", "/ui/nothing", "/ui/", "/v1/models"):
            assert server.get(path).status_code == 401, path
            assert server.get(path, headers={"authorization": "Bearer wrong"}).status_code == 401, path
        for path in ("/engine/stats", "/engine/blocks"):
            assert server.get(path, headers={"authorization": "Bearer secret-1"}).status_code == 200
        if FOUND is not None:
            see_the_key_asked_for(server)
    finally:
        assert server.stop() == 0
    assert not any("/engine/" in line and " 200 " in line for line in server.log), "the log is for requests"


def test_it_is_there_before_the_model() -> None:
    """Of a server whose engine has not started yet (its start is a matter of moments: asked within the process)."""
    config = resolve(EngineArgs(model="demo", max_model_len=64), usage="server")
    client = TestClient(build(Served(config, ServerArgs())))
    assert client.get("/").status_code == 200
    found = client.get("/engine/stats").json()
    assert found["status"] == "starting" and found["engine"] is None and found["max_model_len"] == 64
    assert client.get("/engine/blocks").status_code == 503


def test_disable_ui() -> None:
    server = Server("--disable-ui")
    try:
        for path in (*page.FILES, "/engine/stats", "/engine/blocks"):
            assert server.get(path).status_code == 404, path
        assert not {"/", "/engine/blocks"} & set(server.get("/openapi.json").json()["paths"])
    finally:
        assert server.stop() == 0


# -- data ------------------------------------------------------------------------------------------------------------


def checked(server: Server, path: str) -> dict[str, Any]:
    """An answer that fits its schema to the letter."""
    document = server.get("/openapi.json").json()
    found = server.get(path).json()
    name = path.partition("?")[0]
    schema = document["paths"][name]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    strict = json.loads(json.dumps(document["components"]))
    for one in strict["schemas"].values():
        if "properties" in one:
            one["additionalProperties"] = False
    jsonschema.validate(found, {**schema, "components": strict})
    return found


def test_statistics(server: Server) -> None:
    before = checked(server, "/engine/stats")
    body = {"prompt": "The capital of France is", "max_tokens": 7, "ignore_eos": True, "stream": True}
    server.post("/v1/completions", body)
    server.idle()
    after = checked(server, "/engine/stats")
    assert after["status"] == "ok" and after["time"] > before["time"] and after["model"] == "demo"
    assert after["engine"]["generation_tokens"] == before["engine"]["generation_tokens"] + 7
    for name, series in (("ttft", "time_to_first_token"), ("e2e", "e2e_request_latency")):
        found = after["latencies"][name]
        assert len(found["counts"]) == len(found["bounds"]) + 1 and found["bounds"] == sorted(found["bounds"])
        assert sum(found["counts"]) == sum(before["latencies"][name]["counts"]) + 1
        assert sum(found["counts"]) == server.metric(f"vllm:{series}_seconds_count")
        assert found["sum"] == pytest.approx(server.metric(f"vllm:{series}_seconds_sum"))


def test_the_map_shows_who_holds_what(server: Server) -> None:
    idle = checked(server, "/engine/blocks")
    assert len(cells(idle)) == idle["total"] == idle["count"] and not idle["requests"]
    assert all(held == 0 and owner == -1 for held, _, owner, _ in cells(idle))
    with ThreadPoolExecutor(1) as pool:
        prompts = [BEGINNING + word for word in ("One", "Two", "Three")]
        running = pool.submit(server.post, "/v1/completions", {**LONG, "prompt": prompts})
        found: dict[str, Any] = {}

        def all_there() -> bool:
            found.update(server.get("/engine/blocks").json())
            return len(found["requests"]) == 3 and all(one["output_tokens"] > 5 for one in found["requests"])

        until(all_there, 20)
        assert running.result().status_code == 200
    held = [cell for cell in cells(found) if cell[0]]
    numbers = [one["number"] for one in found["requests"]]
    assert {owner for _, _, owner, _ in held} == set(numbers)
    shared = [cell for cell in held if cell[3] == 3]
    assert shared and all(cell[2] == numbers[0] for cell in shared), "the prompts' beginning is there once"
    for one in found["requests"]:
        assert one["state"] == "running" and one["shared"] == len(shared) and one["blocks"] > len(shared)
        assert one["blocks"] * found["block_size"] >= one["computed"] > one["prompt_tokens"]
    assert sum(one["blocks"] for one in found["requests"]) == len(held) + 2 * len(shared)
    server.idle()
    assert any(cached for _, cached, _, _ in cells(checked(server, "/engine/blocks")))


def test_parts_of_the_pool(server: Server) -> None:
    total = server.get("/engine/blocks").json()["total"]
    part = checked(server, "/engine/blocks?first=10&count=20")
    assert (part["first"], part["count"], len(cells(part))) == (10, 20, 20)
    end = checked(server, f"/engine/blocks?first={total - 3}&count=20")
    assert (end["first"], end["count"]) == (total - 3, 3)
    for query in ("first=-1", "count=x", "first=1e99", f"count={1 << 40}"):
        answer = server.get(f"/engine/blocks?{query}")
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_value", query


class Asked:
    """An engine whose maps take `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.count = seconds, 0
        self.engine = self.client = self

    async def post(self, function: Any) -> Any:
        return function()

    def ask(self, method: str, first: int, count: int) -> Future[Any]:
        self.count += 1
        future: Future[Any] = Future()
        if self.seconds < 1:
            future.set_result({"first": first, "count": count, "seconds": self.seconds})
        return future


def test_however_many_look_the_engine_is_asked_seldom() -> None:
    engine = Asked(0.002)

    async def main() -> None:
        maps = live.BlockMaps(engine)  # type: ignore[arg-type]
        loop = asyncio.get_running_loop()
        begin = loop.time()
        answers = await asyncio.gather(*(maps.get(0, 0) for _ in range(30)))
        assert len(set(answers)) == 1 and engine.count == 1
        await asyncio.gather(*(maps.get(i % 3, 9) for i in range(30)))
        assert engine.count == 4 and loop.time() - begin > 2.9 * engine.seconds / live.SHARE
        with pytest.raises(ApiError, match="too many"):
            await asyncio.gather(*(maps.get(i, 1) for i in range(live.CROWD + 1)))

    asyncio.run(main())


def test_an_engine_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "PATIENCE_S", 0.05)
    served: Any = SimpleNamespace(engine=Asked(1), client=Asked(1))

    async def main() -> None:
        with pytest.raises(ApiError, match="does not answer"):
            await live.BlockMaps(served).get(0, 0)

    asyncio.run(main())


# -- in a browser ----------------------------------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(FOUND is None, reason=MISSING)
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}]  # fmt: skip
ENDED = "document.querySelector('.message:last-of-type .meta')?.textContent && !document.querySelector('.running')"
MAP = "document.querySelector('#map').dataset"


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    folder = Path(os.environ.get("QUIRE_TEST_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def browser() -> Iterator[Browser]:
    browser = Browser()
    yield browser
    browser.close()


@needs_browser
def test_a_chat_streams_and_can_be_stopped(server: Server, browser: Browser) -> None:
    browser.open(f"{server.url}/")
    browser.until("document.querySelector('#status').textContent === 'running'")
    assert browser.text("#model").startswith("demo")
    browser.run(  # how often the answer's text grows
        "window.grown = new Set(); new MutationObserver(() => grown.add("
        "document.querySelector('.assistant .text')?.textContent.length)).observe("
        "document.querySelector('#log'), {subtree: true, childList: true, characterData: true})"
    )
    browser.run("document.querySelector('#sampling').parentElement.open = true")
    browser.fill("input[name=temperature]", "0")
    browser.fill("#prompt", "What is the capital of France?")
    browser.press("Enter", 13, "\r")
    browser.until(ENDED)
    direct = server.post(
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0},
    ).json()["choices"][0]["message"]["content"]
    assert browser.run("document.querySelector('.assistant .text').textContent") == direct and "Paris" in direct
    assert browser.run("grown.size") > 3, "it came in pieces"
    assert re.search(r"\d+ tokens · first after \d+ ms", browser.text(".assistant .meta"))

    browser.click("#fresh")
    browser.fill("#prompt", "Tell me a long story, <b>bold</b><img src=x onerror=alert(1)>")
    browser.run("document.querySelector('input[name=max_tokens]').value = 400")
    aborted = server.metric("vllm:request_success_total", finished_reason="abort")
    browser.click("#send")
    browser.until("document.querySelector('.assistant .text')?.textContent")
    browser.click("#stop")
    browser.until(ENDED)
    if "stopped" in browser.text(".assistant .meta"):
        until(lambda: server.metric("vllm:request_success_total", finished_reason="abort") == aborted + 1, 10)
    assert browser.run("document.querySelectorAll('.message b, .message img').length") == 0, "text is never markup"
    browser.until("document.querySelector('#send').checkVisibility()")
    assert not browser.said
    assert {url.partition("?")[0].removeprefix(server.url) for url in browser.fetched} <= {
        *page.FILES, "/engine/stats", "/engine/blocks", "/v1/chat/completions",
    }  # fmt: skip


@needs_browser
def test_tool_calls_are_shown_and_answered(server: Server, browser: Browser) -> None:
    browser.open(f"{server.url}/")
    browser.run("document.querySelector('#tools-panel').open = true")
    browser.fill("#tools", "not json")
    browser.run("document.querySelector('#tool-choice').value = 'required'")
    browser.fill("#prompt", "What is the weather in Paris?")
    browser.press("Enter", 13, "\r")
    browser.until("!document.querySelector('#trouble').hidden")
    assert "not JSON" in browser.text("#trouble")
    browser.click("#fresh")
    browser.fill("#tools", json.dumps(TOOLS))
    browser.fill("#prompt", "What is the weather in Paris?")
    browser.press("Enter", 13, "\r")
    browser.until("document.querySelector('.call form')")
    assert browser.text(".call .name") == "get_weather"
    assert "city" in json.loads(browser.text(".call pre"))
    browser.run("document.querySelector('#tool-choice').value = 'none'")
    browser.fill(".call input", "Sunny, 24 degrees")
    browser.click(".call button")
    browser.until("document.querySelectorAll('.assistant').length === 2")
    browser.until(ENDED)
    assert browser.text(".message.tool .text") == "Sunny, 24 degrees"
    assert browser.run("document.querySelector('#trouble').hidden") and not browser.said


@needs_browser
def test_the_map_fills_while_requests_run(server: Server, browser: Browser, shots: Path) -> None:
    browser.dark(False)
    browser.open(f"{server.url}/")
    total = server.get("/engine/blocks").json()["total"]
    browser.until(f"document.querySelector('#map-sub').textContent.startsWith('{total} blocks')")
    browser.fill("#prompt", "Name the capital of Italy, and count to nine.")
    browser.press("Enter", 13, "\r")
    browser.until(ENDED)
    browser.until(f"Number({MAP}.held) === 0 && Number({MAP}.cached) > 0")
    browser.fill("#load-n", "60")
    browser.fill("#load-tokens", "240")
    browser.click("#load-go")
    browser.until(f"Number({MAP}.held) > 40 && Number({MAP}.shared) >= 5")
    browser.until("document.querySelectorAll('#holders tr').length > 5")
    browser.until("document.querySelector('.state-preempted')")  # 85 blocks do not hold them all
    browser.until("Number(document.querySelector('#t-running').textContent) > 0")
    browser.screenshot(shots / "page-light.png")
    browser.run("document.querySelector('#map').focus()")
    browser.press("ArrowRight", 39)
    assert re.match(r"Block \d+: ", browser.text("#map-said"))
    browser.dark(True)
    browser.until("document.documentElement.dataset.theme === 'dark'")
    browser.screenshot(shots / "page-dark.png")
    browser.resize(400, 900)
    browser.until("document.documentElement.scrollWidth <= 400")
    browser.screenshot(shots / "page-narrow.png")
    browser.resize(1440, 1000)
    browser.until("document.querySelector('#load-said').textContent.startsWith('60 of 60')")
    browser.until(f"Number({MAP}.held) === 0")
    browser.until("document.querySelector('#chart-ttft canvas').ariaLabel.match(/mean [\\d.]+ m?s/)")
    assert not browser.said
    assert all((shots / f"page-{name}.png").stat().st_size > 20_000 for name in ("light", "dark", "narrow"))


@needs_browser
def test_everything_has_a_name_and_the_keyboard_reaches_it(server: Server, browser: Browser) -> None:
    browser.open(f"{server.url}/")
    browser.until("document.querySelector('#status').textContent === 'running'")
    browser.run("document.querySelectorAll('details').forEach((one) => one.open = true)")
    nodes = browser.send("Accessibility.getFullAXTree")["nodes"]
    roles = set("button textbox spinbutton combobox checkbox image application log table region".split())
    found = [node for node in nodes if not node["ignored"] and node["role"]["value"] in roles]
    assert len(found) > 25
    unnamed = [n["role"]["value"] for n in found if not n.get("name", {}).get("value") and not is_decor(n)]
    assert not unnamed
    reached: set[str] = set()
    for _ in range(45):
        browser.press("Tab", 9)
        reached.add(browser.run("document.activeElement.id"))
    assert {"prompt", "send", "map", "map-view", "load-go", "key", "theme", "fresh", "system", "tools"} <= reached


def is_decor(node: dict[str, Any]) -> bool:
    return node["role"]["value"] == "image" and not node.get("name", {}).get("value")


def see_the_key_asked_for(server: Server) -> None:
    browser = Browser()
    try:
        browser.open(f"{server.url}/")
        browser.until("document.querySelector('#key-dialog').open")
        browser.fill("#key-field", "wrong")
        browser.press("Enter", 13, "\r")
        browser.until("!document.querySelector('#key-trouble').hidden")
        browser.fill("#key-field", "secret-1")
        browser.press("Enter", 13, "\r")
        browser.until("document.querySelector('#status').textContent === 'running'")
        assert browser.text("#model").startswith("hidden-name")
        assert all("401" in line for line in browser.said), browser.said
    finally:
        browser.close()
