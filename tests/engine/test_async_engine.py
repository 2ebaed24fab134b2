"""AsyncLLM: streams, aborts, consumers that leave, bad requests, an engine that dies."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from fake_client import FakeClient, client_of, counting, make_engine
from tokenizer_zoo import trained

from quire.engine.async_engine import INLINE_CHARACTERS, AsyncLLM
from quire.types.errors import BusyError, ClientError, EngineError
from quire.types.outputs import RequestOutput
from quire.types.params import BeamSearchParams, RequestOutputKind, SamplingParams, StructuredOutputsParams
from quire.types.request import Delta, FinishReason, Request

DELTA = RequestOutputKind.DELTA


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., AsyncLLM]]:
    made: list[AsyncLLM] = []

    def make(pace: float = 0.0, **args: Any) -> AsyncLLM:
        """`pace`: seconds of a step, for requests that must not end before something happens to them."""
        engine = make_engine(tmp_path, **args)
        client_of(engine).on_step = lambda step: time.sleep(pace)
        made.append(AsyncLLM(engine=engine))
        return made[-1]

    yield make
    for llm in made:
        llm.shutdown()
        assert not llm._thread.is_alive()
        assert client_of(llm.engine).closed


async def collect(llm: AsyncLLM, prompt: Any, params: SamplingParams | None = None, **kw: Any) -> list[RequestOutput]:
    return [o async for o in llm.generate(prompt, params or SamplingParams(), **kw)]


def expected(request_prompt: list[int], n: int = 16) -> list[int]:
    return counting(Request("x", request_prompt, SamplingParams(), 0), 0)[:n]


def test_many_streams_at_once(start: Callable[..., AsyncLLM]) -> None:
    llm = start()

    async def main() -> None:
        prompts = [[5 + i, 6] for i in range(20)]
        results = await asyncio.gather(*(collect(llm, p, SamplingParams(output_kind=DELTA)) for p in prompts))
        for prompt, outputs in zip(prompts, results, strict=True):
            assert [t for o in outputs for t in o.outputs[0].token_ids] == expected(prompt)
            assert len(outputs) == 16 and outputs[-1].finished and outputs[0].prompt_token_ids == prompt

    asyncio.run(main())


def test_text_in_text_out(start: Callable[..., AsyncLLM]) -> None:
    words = trained().encode(" of France\nis Paris")
    llm = start(script=lambda request, index: [*words, 1] * 9)

    async def main() -> None:
        params = SamplingParams(max_tokens=100, stop="\n", output_kind=DELTA)
        outputs = await collect(llm, "The capital", params, request_id="mine")
        assert "".join(o.outputs[0].text for o in outputs) == " of France"
        assert {o.request_id for o in outputs} == {"mine"} and outputs[0].prompt == "The capital"
        assert outputs[-1].outputs[0].stop_reason == "\n"
        (end,) = client_of(llm.engine).ended
        assert end[2] == len(trained().encode(" of France\n"))
        # the same name again, while the core may still be sending for its first bearer
        again = await collect(llm, "The capital", params, request_id="mine")
        assert [o.outputs[0].text for o in again] == [o.outputs[0].text for o in outputs]
        (final,) = await collect(llm, "The", SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY))
        assert final.finished and not client_of(llm.engine).requests[-1].stream

    asyncio.run(main())


def test_bad_request_raises_for_its_caller_only(start: Callable[..., AsyncLLM]) -> None:
    llm = start(pace=0.002)

    async def main() -> None:
        good = asyncio.create_task(collect(llm, [5], SamplingParams(max_tokens=50), request_id="a"))
        await asyncio.sleep(0)
        for prompt, params, name in (("", None, None), ([5], SamplingParams(logprobs=21), None), ([5], None, "a")):
            with pytest.raises(ClientError):
                await collect(llm, prompt, params, request_id=name)
        assert len((await good)[-1].outputs[0].token_ids) == 50

    asyncio.run(main())


def test_only_its_own_request_waits_for_a_grammar(
    start: Callable[..., AsyncLLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = start()
    grammars: list[Future[Any]] = []

    class Slow:
        def submit(self, params: Any, most: int | None) -> Future[Any]:
            if len(grammars) == 12:
                raise BusyError(f"{most} grammars are waiting")
            grammars.append(Future())
            grammars[-1].set_running_or_notify_cancel()
            return grammars[-1]

        def source(self, params: Any) -> str:
            return "start: /a/"

    monkeypatch.setattr("quire.engine.inputs.compiler", lambda *_: Slow())

    async def main() -> None:
        bound = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a"))
        slow = [asyncio.create_task(collect(llm, [5 + i], bound)) for i in range(12)]
        while len(grammars) < 12:
            await asyncio.sleep(0.001)
        words = "word " * INLINE_CHARACTERS
        with pytest.raises(ClientError, match="tokens"):  # from a thread, where none is busy waiting
            await asyncio.wait_for(collect(llm, words), 10)
        with pytest.raises(BusyError):
            await collect(llm, [5], bound)
        slow[2].cancel()
        await asyncio.wait([slow[2]])
        grammars[0].set_exception(ClientError("no good"))
        for grammar in grammars[1:]:
            grammar.set_result(None)
        found = await asyncio.gather(*slow, return_exceptions=True)
        assert isinstance(found[0], ClientError) and isinstance(found[2], asyncio.CancelledError)
        assert all(isinstance(one, list) and one[-1].finished for i, one in enumerate(found) if i not in (0, 2))

    asyncio.run(main())


def test_core_that_refuses_a_request(start: Callable[..., AsyncLLM], monkeypatch: pytest.MonkeyPatch) -> None:
    llm = start()
    add = FakeClient.add

    def picky(self: FakeClient, request: Request) -> None:
        if len(request.prompt_token_ids) > 2:
            raise ClientError("the KV cache is too small")
        add(self, request)

    monkeypatch.setattr(FakeClient, "add", picky)

    async def main() -> None:
        with pytest.raises(ClientError, match="too small"):
            await collect(llm, [5, 6, 7], request_id="a")
        assert (await collect(llm, [5], request_id="a"))[-1].finished

    asyncio.run(main())


def test_abort_by_name(start: Callable[..., AsyncLLM]) -> None:
    llm = start(pace=0.002)

    async def main() -> None:
        outputs = []
        async for output in llm.generate([5], SamplingParams(max_tokens=None), "a"):
            outputs.append(output)
            if len(outputs) == 3:
                await llm.abort(["a", "unknown"])
        assert outputs[-1].finished and outputs[-1].outputs[0].finish_reason == "abort"
        assert client_of(llm.engine).aborted == ["a#0"]
        assert (await llm.stats()).running == 0

    asyncio.run(main())


def test_leaving_the_loop_aborts(start: Callable[..., AsyncLLM]) -> None:
    llm = start(pace=0.002)
    client = client_of(llm.engine)

    async def main() -> None:
        stream = llm.generate([5], SamplingParams(max_tokens=None), "left")
        async for _ in stream:
            break
        await stream.aclose()
        task = asyncio.create_task(collect(llm, [6], SamplingParams(max_tokens=None), request_id="cancelled"))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await llm.stats()).running == 0  # asked after the aborts, so answered after them
        assert [name.split("#")[0] for name in client.aborted] == ["left", "cancelled"]

    asyncio.run(main())


def test_event_loop_that_is_gone(start: Callable[..., AsyncLLM]) -> None:
    """Requests of a closed loop are dropped, those of another go on."""
    llm = start(pace=0.002)

    async def begin() -> Any:
        stream = llm.generate([5], SamplingParams(max_tokens=None), "gone")
        await anext(stream)
        return stream

    loop = asyncio.new_event_loop()
    stream = loop.run_until_complete(begin())
    loop.close()
    assert asyncio.run(collect(llm, [6], SamplingParams(max_tokens=100)))[-1].finished
    deadline = time.monotonic() + 5
    while not client_of(llm.engine).aborted and time.monotonic() < deadline:
        time.sleep(0.005)
    assert client_of(llm.engine).aborted == ["gone#0"]
    asyncio.run(stream.aclose())


def test_engine_failure_reaches_everyone(start: Callable[..., AsyncLLM], caplog: pytest.LogCaptureFixture) -> None:
    llm = start()

    def fail(step: int) -> None:
        if step == 5:
            raise ZeroDivisionError("bad kernel")

    client_of(llm.engine).on_step = fail

    async def main() -> None:
        tasks = [asyncio.create_task(collect(llm, [5 + i], SamplingParams(max_tokens=None))) for i in range(3)]
        for task in tasks:
            with pytest.raises(EngineError, match="ZeroDivisionError: bad kernel") as e:
                await asyncio.wait_for(task, 5)
            assert isinstance(e.value.__cause__, ZeroDivisionError)
        assert not llm.is_running
        for call in (collect(llm, [5]), llm.check_health(), llm.stats()):
            with pytest.raises(EngineError, match="bad kernel"):
                await call

    asyncio.run(main())
    assert "the engine failed" in caplog.text


def test_request_whose_work_failed(start: Callable[..., AsyncLLM], monkeypatch: pytest.MonkeyPatch) -> None:
    llm = start()
    step = FakeClient.step

    def broken(self: FakeClient) -> list[Delta]:
        bad = [s for s in self.live if s.request.prompt_token_ids == [5]]
        self.live = [s for s in self.live if s not in bad]
        errors = [Delta(s.request.id, s.index, [], finish=FinishReason.ERROR, error="KeyError: 3") for s in bad]
        return [*step(self), *errors]

    monkeypatch.setattr(FakeClient, "step", broken)

    async def main() -> None:
        good = asyncio.create_task(collect(llm, [6]))
        with pytest.raises(EngineError, match="KeyError: 3"):
            await collect(llm, [5])
        assert (await good)[-1].finished and llm.is_running

    asyncio.run(main())


def test_shutdown_ends_who_waits(start: Callable[..., AsyncLLM]) -> None:
    llm = start(pace=0.002)

    async def main() -> None:
        stream = llm.generate([5], SamplingParams(max_tokens=None))
        await anext(stream)
        await asyncio.to_thread(llm.shutdown)
        with pytest.raises(EngineError, match="shut down"):
            async for _ in stream:
                pass

    asyncio.run(main())
    llm.shutdown()


def test_beams_and_helpers(start: Callable[..., AsyncLLM]) -> None:
    llm = start()

    async def main() -> None:
        outputs = [o async for o in llm.generate([5], BeamSearchParams(2, 4))]
        assert len(outputs) == 1 and len(outputs[0].outputs) == 2
        assert await llm.reset_prefix_cache() is True
        await llm.check_health()
        assert (await llm.get_tokenizer()).decode(trained().encode("one two")) == "one two"
        assert threading.current_thread() is not llm._thread

    asyncio.run(main())


def test_bad_types_harm_nobody(start: Callable[..., AsyncLLM]) -> None:
    """They raise where they were given; the engine's thread never sees them."""
    llm = start()

    async def main() -> None:
        for kw in ({"params": "x"}, {"params": {"temperature": 0}}, {"priority": "high"}):
            with pytest.raises(ClientError, match="must be"):
                await collect(llm, [5], **kw)  # type: ignore[arg-type]
        assert (await collect(llm, [5]))[-1].finished

    asyncio.run(main())
