"""A core in a process of its own: the same answers as in this one, and what happens when that process is lost."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from quire import LLM, EngineArgs, SamplingParams
from quire.config.resolve import resolve
from quire.engine import wire
from quire.engine.async_engine import AsyncLLM
from quire.engine.llm_engine import LLMEngine
from quire.engine.process import ProcessClient
from quire.engine.serve import _Loop
from quire.types.errors import ClientError, EngineError
from quire.types.params import RequestOutputKind, StructuredOutputsParams
from quire.types.request import Request

SMALL: dict[str, Any] = dict(
    model="demo", max_model_len=256, max_num_seqs=8, kv_cache_memory_bytes="16M", dtype="float32", threads=1
)
PROMPTS = ["The capital of France is", "Count from 3 to 9:", "The opposite of hot is", "Once upon a time", "As JSON: "]
ITEMS = {"type": "array", "items": {"type": "integer"}, "minItems": 20}
SCHEMA = {"type": "object", "properties": {"a": ITEMS}, "required": ["a"]}


def params(**more: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 40, "ignore_eos": True, "seed": 7, "temperature": 0.8, **more})


CASES = [
    params(output_kind=RequestOutputKind.DELTA, n=2, logprobs=2),
    params(output_kind=RequestOutputKind.FINAL_ONLY, n=3),
    params(output_kind=RequestOutputKind.DELTA, prompt_logprobs=1, presence_penalty=0.5),
    params(output_kind=RequestOutputKind.FINAL_ONLY, stop=["zzz"]),
    params(output_kind=RequestOutputKind.DELTA, n=2, structured_outputs=StructuredOutputsParams(json=SCHEMA)),
]


@pytest.fixture
def start() -> Iterator[Callable[..., AsyncLLM]]:
    made: list[AsyncLLM] = []

    def make(**args: Any) -> AsyncLLM:
        config = resolve(EngineArgs(**{**SMALL, "log_level": "critical", **args}), usage="server")
        made.append(AsyncLLM(make=partial(LLMEngine, config, ProcessClient)))
        return made[-1]

    yield make
    children = [client(llm)._child.process.pid for llm in made]
    for llm in made:
        llm.shutdown()
    assert not [pid for pid in children if psutil.pid_exists(pid)]


def client(llm: AsyncLLM) -> ProcessClient:
    found = llm.engine.client
    assert isinstance(found, ProcessClient)
    return found


async def ask(llm: AsyncLLM, case: int, progress: list[int]) -> list[tuple[str, list[int], int, str | None]]:
    """(text, tokens, number of logprobs, why it ended) of each sequence."""
    given = CASES[case]
    got: list[list[Any]] = [["", [], 0, None] for _ in range(given.n)]
    lines = 0
    async for output in llm.generate(PROMPTS[case], given):
        progress[case] += 1
        lines += sum(line is not None for line in output.prompt_logprobs or ())
        for o in output.outputs:
            one = got[o.index]
            one[0], one[1], one[2] = one[0] + o.text, one[1] + o.token_ids, one[2] + len(o.logprobs or ())
            one[3] = o.finish_reason
    assert lines == (len(output.prompt_token_ids) - 1 if given.prompt_logprobs else 0)
    return [tuple(one) for one in got]  # type: ignore[return-value]


@pytest.fixture(scope="module")
def expected() -> list[Any]:
    """What a core in this process answers."""
    found: list[Any] = []
    with LLM(**SMALL, log_level="critical") as llm:
        for prompt, given in zip(PROMPTS, CASES, strict=True):
            plain = given.clone()
            plain.output_kind = RequestOutputKind.FINAL_ONLY
            (output,) = llm.generate(prompt, plain, use_tqdm=False)
            found.append([(o.text, o.token_ids, len(o.logprobs or ()), o.finish_reason) for o in output.outputs])
    return found


async def all_cases(llm: AsyncLLM, meanwhile: Callable[[list[int]], Any] | None = None) -> list[Any]:
    progress = [0] * len(CASES)
    tasks = [asyncio.create_task(ask(llm, case, progress)) for case in range(len(CASES))]
    if meanwhile is not None:
        await meanwhile(progress)
    return await asyncio.gather(*tasks)


async def idle(llm: AsyncLLM) -> None:
    """Blocks are free again."""
    until = time.monotonic() + 5
    while (stats := await llm.stats()).running or stats.waiting or stats.blocks_used:
        assert time.monotonic() < until, stats
        await asyncio.sleep(0.02)


def test_the_same_answers_as_in_process(start: Callable[..., AsyncLLM], expected: list[Any]) -> None:
    llm = start()

    async def main() -> None:
        assert await all_cases(llm) == expected
        assert await llm.reset_prefix_cache()
        await idle(llm)
        left = llm.generate(PROMPTS[0], params(max_tokens=200, output_kind=RequestOutputKind.DELTA))
        await anext(left)
        await left.aclose()
        await idle(llm)
        with pytest.raises(ClientError, match="logits_processors"):
            await anext(llm.generate("x", SamplingParams(logits_processors=[lambda ids, logits: logits])))
        assert not os.path.exists(client(llm)._folder)

    asyncio.run(main())


def test_a_killed_core_is_replaced_and_its_requests_go_on(start: Callable[..., AsyncLLM], expected: list[Any]) -> None:
    llm = start()

    async def kill(progress: list[int]) -> None:
        while min(progress[0], progress[2], progress[4]) < 5:
            await asyncio.sleep(0.001)
        os.kill(client(llm)._child.process.pid, signal.SIGKILL)

    async def main() -> None:
        assert await all_cases(llm, kill) == expected
        assert client(llm).restarts == 1
        await idle(llm)
        assert await all_cases(llm) == expected

    asyncio.run(main())


class Fatal:
    """An engine-wide logits processor that kills its process when a request says so."""

    def __init__(self, vocab_size: int, device: Any) -> None:
        self.rows: set[int] = set()

    @classmethod
    def validate(cls, given: SamplingParams) -> None:
        pass

    def add(self, row: int, given: SamplingParams) -> bool:
        if (given.extra_args or {}).get("fatal"):
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    def fork(self, source: int, destination: int) -> None:
        pass

    def retire(self, row: int) -> None:
        pass

    def apply(self, logits_GV: Any, rows: Any, history: Any) -> Any:
        return logits_GV


class Unmakeable(Fatal):
    def __init__(self, vocab_size: int, device: Any) -> None:
        raise ZeroDivisionError


def test_a_request_that_kills_the_core_is_not_replayed_for_ever(start: Callable[..., AsyncLLM]) -> None:
    llm = start(logits_processors=[f"{Path(__file__).stem}:Fatal"])

    async def main() -> None:
        with pytest.raises(EngineError, match="SIGKILL"):
            async for _ in llm.generate("x", params(extra_args={"fatal": True})):
                pass
        assert client(llm).restarts == 2
        assert [o async for o in llm.generate(PROMPTS[0], params(n=2))][-1].finished

    asyncio.run(main())


def test_the_neighbours_of_such_a_request_never_know(start: Callable[..., AsyncLLM]) -> None:
    llm = start(logits_processors=[f"{Path(__file__).stem}:Fatal"])

    async def one(index: int, **more: Any) -> list[int]:
        kind = list(RequestOutputKind)[index % 3]
        given = params(seed=index, max_tokens=60, output_kind=kind, **more)
        tokens: list[int] = []
        async for output in llm.generate(PROMPTS[index % 4], given):
            new = list(output.outputs[0].token_ids)
            tokens = [*tokens, *new] if kind is RequestOutputKind.DELTA else new
        return tokens

    async def main() -> None:
        expected = [await one(i) for i in range(6)]
        running = [asyncio.create_task(one(i)) for i in range(6)]
        await asyncio.sleep(0.05)
        with pytest.raises(EngineError, match="SIGKILL"):
            await one(7, extra_args={"fatal": True})
        late = asyncio.create_task(one(1))
        assert await asyncio.gather(*running, late) == [*expected, expected[1]]
        assert 2 <= client(llm).restarts <= 3

    asyncio.run(main())


def test_a_stopped_core_does_not_hold_up_the_end(start: Callable[..., AsyncLLM]) -> None:
    llm = start()
    os.kill(client(llm)._child.process.pid, signal.SIGSTOP)
    begin = time.monotonic()
    llm.shutdown()
    assert not llm._thread.is_alive() and time.monotonic() - begin < 10


def test_a_core_that_hangs_while_it_is_started_again_is_replaced() -> None:
    config = resolve(EngineArgs(**{**SMALL, "log_level": "critical"}), usage="server")
    client = ProcessClient(config, stall_s=1.0)
    try:
        os.kill(client._child.process.pid, signal.SIGKILL)
        until = time.monotonic() + 100
        while client.restarts == 0:
            client.step()
        hung = client._child.process.pid
        os.kill(hung, signal.SIGSTOP)
        while client._child.process.pid == hung:
            assert time.monotonic() < until
            client.step()
        assert client.restarts == 2 and not psutil.pid_exists(hung)
        client._patience = 100.0  # on a busy machine
        while not client.ready:
            assert time.monotonic() < until
            client.step()
        assert client.call("reset_prefix_cache")
    finally:
        client.shutdown()


def test_what_the_core_refuses(start: Callable[..., AsyncLLM]) -> None:
    with pytest.raises(ClientError, match="cannot be imported"):  # it does not come so far
        start(logits_processors=["no_such_module:Class"])
    with pytest.raises(ClientError, match="cannot be made: ZeroDivisionError"):
        start(logits_processors=[f"{Path(__file__).stem}:Unmakeable"])


@pytest.mark.parametrize("samples", [1, 2])
def test_nothing_is_left_of_what_a_stop_string_ended(samples: int) -> None:
    with LLM(**SMALL, log_level="critical") as llm:
        core: Any = llm.llm_engine.client
        sent: list[Any] = []
        loop = _Loop(core, SimpleNamespace(send_multipart=sent.append))  # type: ignore[arg-type]
        loop._handle(b"front", wire.Add(Request("a", [5, 6], params(n=samples, stop=["zzz"]), 0, stream=True)))
        for _ in range(3):
            loop._give_out(core.step())
        for index in range(samples):
            assert sent and loop._owner == {"a": b"front"}
            loop._handle(b"front", wire.End("a", index, 1))
        assert loop._owner == {} and not core.alive("a")


def test_an_idle_core_has_seen_all_requests_it_was_given(start: Callable[..., AsyncLLM]) -> None:
    llm = start()

    async def main() -> None:
        for i in range(6):
            bound = params(structured_outputs=StructuredOutputsParams(regex=f"a{{3,9}}b{i}"))
            (draft,) = await llm.prepare([PROMPTS[0]], [bound])
            stream = llm.submit(draft, f"left-{i}")
            stream.close()  # while the core compiles its grammar
        await collect(llm)
        await idle(llm)
        stats, unseen = llm.queue()
        assert (stats.received, unseen) == (7, 0)

    async def collect(llm: AsyncLLM) -> None:
        async for _ in llm.generate(PROMPTS[0], params()):
            pass

    asyncio.run(main())


SCRIPT = """
import asyncio, sys
from functools import partial
from quire import EngineArgs, SamplingParams
from quire.config.resolve import resolve
from quire.engine.async_engine import AsyncLLM
from quire.engine.llm_engine import LLMEngine
from quire.engine.process import ProcessClient
config = resolve(EngineArgs(model="demo", max_model_len=256, kv_cache_memory_bytes="16M"), usage="server")
llm = AsyncLLM(make=partial(LLMEngine, config, ProcessClient))
print(llm.engine.client._child.process.pid, llm.engine.client._folder, flush=True)
assert "torch" not in sys.modules, "the front needs no torch"
async def main():
    async for _ in llm.generate("x", SamplingParams(max_tokens=200, ignore_eos=True)):
        pass
    print("one", flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


def test_the_core_dies_with_its_front_end() -> None:
    with subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True) as front:
        assert front.stdout is not None
        pid, folder = front.stdout.readline().split()
        assert front.stdout.readline() == "one\n"
        front.kill()
    until = time.monotonic() + 5
    while psutil.pid_exists(int(pid)) and psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until, "the core has outlived its front end"
        time.sleep(0.05)
    assert not os.path.exists(folder)


def test_what_was_asked_of_a_lost_core_is_answered_with_an_error(start: Callable[..., AsyncLLM]) -> None:
    llm = start()

    async def main() -> None:
        core = client(llm)
        ask = partial(core.ask, "block_map")
        assert (await asyncio.wrap_future(await llm.post(ask)))["total"] == (await llm.stats()).blocks_total
        pid = core._child.process.pid
        os.kill(pid, signal.SIGSTOP)
        waiting = asyncio.wrap_future(await llm.post(ask))
        done, _ = await asyncio.wait([waiting], timeout=0.3)
        assert not done
        assert (await llm.stats()).blocks_total, "nobody else waits for the answer"
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(EngineError, match="has ended"):
            await waiting

    asyncio.run(main())
