"""The engine for programs with an event loop: `AsyncLLM`.

Owns: one thread that steps the engine, and one queue for each request, by which outputs reach the event loop that
asked. All work on the engine happens in that thread, in the order in which it was posted; only prompts are checked and
tokenized where they come in, so that a bad one raises for its caller alone. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from quire.config.args import EngineArgs
from quire.config.resolve import resolve
from quire.engine.inputs import Draft, Params, checked_priority, default_params
from quire.engine.llm_engine import LLMEngine
from quire.engine.outputs import Output
from quire.structured.compiler import WAIT_S, compiled
from quire.types.errors import ClientError, EngineError, QuireError
from quire.types.outputs import PoolingOutput, PoolingRequestOutput, RequestOutput, error_of
from quire.types.params import SamplingParams
from quire.types.pooling import PoolingParams
from quire.types.prompts import PromptType
from quire.types.stats import EngineStats
from quire.utils.logging import fields, setup_logging

logger = logging.getLogger(__name__)
T = TypeVar("T")

INPUT_THREADS = 4
INLINE_CHARACTERS = 2_000  # of text to tokenize: a fraction of a millisecond, less than handing it to a thread


class Mailbox:
    """Where the outputs of some requests arrive, by keys that the reader chose."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._items: deque[tuple[int, Output | Exception]] = deque()
        self._waiter: asyncio.Future[None] | None = None

    async def get(self) -> list[tuple[int, Output | Exception]]:
        """All that is there, at least one."""
        while not self._items:
            self._waiter = self.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        found = list(self._items)
        self._items.clear()
        return found

    def put(self, key: int, item: Output | Exception) -> None:
        """In the event loop."""
        self._items.append((key, item))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Stream:
    """The outputs of one request, on their way to `box`. `id` is the core's; a name may be used again, an id never.
    `over`: the last output, or an error, is in the box."""

    def __init__(self, id: str, name: str, box: Mailbox, key: int, abort: Callable[[Stream], None]) -> None:
        self.id, self.name, self.box, self.key = id, name, box, key
        self.over = False
        self._abort = abort

    def put(self, item: Output | Exception) -> None:
        """In the event loop: one more output, or why there are no more."""
        if not self.over:
            self.over = isinstance(item, Exception) or item.finished
            self.box.put(self.key, item)

    def close(self, error: Exception | None = None) -> None:
        """The request is aborted, unless it is over; who reads the box gets `error`."""
        if not self.over:
            if error is not None:
                self.box.put(self.key, error)
            self.over = True
            self._abort(self)


class AsyncLLM:
    """An engine behind async generators.

    Several event loops and many tasks may use it at once. It holds a thread and the model until `shutdown`.
    """

    def __init__(
        self,
        engine_args: EngineArgs | None = None,
        *,
        engine: LLMEngine | None = None,
        make: Callable[[], LLMEngine] | None = None,
    ) -> None:
        """`engine`: one that was made already, instead of arguments for making one; its steps are then taken here.
        `make` makes one, in the thread that will take its steps."""
        if engine is None and make is None:
            args = engine_args or EngineArgs()
            setup_logging(args.log_level, args.log_format)
            make = partial(LLMEngine, resolve(args, usage="server"))
        self._wake = threading.Condition()
        self._inbox: list[Callable[[], None]] = []
        self._streams: dict[str, Stream] = {}
        self._calls: set[Future[Any]] = set()
        self._stopping = False
        self._error: Exception | None = None
        self._busy_since = 0.0
        self._unadded = 0
        self._ids = itertools.count()
        self._pool = ThreadPoolExecutor(INPUT_THREADS, "quire-inputs")
        made: Future[LLMEngine] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(make or (lambda: engine), made), name="quire-engine", daemon=True
        )
        self._thread.start()
        self._engine: LLMEngine = made.result()

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> AsyncLLM:
        return cls(engine_args)

    async def generate(
        self,
        prompt: PromptType,
        sampling_params: Params | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        lora_request: Any = None,
        add_special_tokens: bool = True,
    ) -> AsyncGenerator[RequestOutput]:
        """The outputs of one request as they come, the last with `finished=True`.

        Leaving the loop (or cancelling the task) aborts the request. Raises ClientError for a bad request, EngineError
        where the engine failed or the request's own work did.
        """
        params = sampling_params if sampling_params is not None else self.get_default_sampling_params()
        priority = checked_priority(priority)
        (draft,) = await self.prepare(
            [prompt], [params], lora_request=lora_request, add_special_tokens=add_special_tokens
        )
        box = Mailbox()
        stream = self.submit(draft, request_id, priority, box)
        try:
            last = False
            while not last:
                for _, item in await box.get():
                    if isinstance(item, Exception):
                        raise item
                    assert isinstance(item, RequestOutput), "the parameters were those of sampling"
                    last = item.finished
                    yield item
        finally:
            stream.close()

    async def encode(
        self,
        prompt: PromptType,
        pooling_params: PoolingParams,
        request_id: str | None = None,
        *,
        priority: int = 0,
        lora_request: Any = None,
        add_special_tokens: bool = True,
    ) -> AsyncGenerator[PoolingRequestOutput[PoolingOutput]]:
        """The one output of a prompt that is pooled, its data as a `torch.Tensor`; see `generate`."""
        import torch

        if not isinstance(pooling_params, PoolingParams):
            text = f"pooling_params must be PoolingParams, got {type(pooling_params).__name__}"
            raise ClientError(text, "pooling_params", pooling_params)
        (draft,) = await self.prepare(
            [prompt], [pooling_params], lora_request=lora_request, add_special_tokens=add_special_tokens
        )
        box = Mailbox()
        stream = self.submit(draft, request_id, checked_priority(priority), box)
        try:
            ((_, item),) = await box.get()
            if isinstance(item, Exception):
                raise item
            assert isinstance(item, PoolingRequestOutput)
            item.outputs = PoolingOutput(torch.tensor(item.outputs.data))
            yield item
        finally:
            stream.close()

    async def prepare(
        self,
        prompts: Sequence[PromptType],
        params: Sequence[Params],
        *,
        lora_request: Any = None,
        add_special_tokens: bool = True,
    ) -> list[Draft]:
        """Check and tokenize prompts, without holding up the event loop, and wait for their grammars: here, not in one
        of the threads that other prompts need. Raises ClientError, BusyError, EngineError."""
        size = sum(_length(prompt) for prompt in prompts)
        if any(isinstance(p, SamplingParams) and (p.structured_outputs or p.bad_words) for p in params):
            size = INLINE_CHARACTERS + 1  # the text of a grammar to write
        drafts = partial(
            self._engine.inputs.drafts,
            prompts,
            params,
            lora_request=lora_request,
            add_special_tokens=add_special_tokens,
            wait=False,
        )
        found = await self.call(drafts, size)
        for grammar in {draft.grammar for draft in found if draft.grammar is not None}:
            waiting = asyncio.wrap_future(grammar)
            try:
                await asyncio.wait([waiting], timeout=WAIT_S)
            finally:
                if not waiting.cancel():
                    waiting.exception()  # seen; raised below, with a traceback of its own
            compiled(grammar, 0)
        return found

    async def call(self, function: Callable[[], T], size: int) -> T:
        """The result of work on `size` characters of text: done at once if that takes a moment, else in a thread."""
        if size <= INLINE_CHARACTERS:
            return function()
        return await asyncio.get_running_loop().run_in_executor(self._pool, function)

    def submit(
        self, draft: Draft, request_id: str | None, priority: int = 0, box: Mailbox | None = None, key: int = 0
    ) -> Stream:
        """Start a prepared prompt; its outputs go to `box`, under `key`. Close the stream when nobody reads it any
        more. Raises EngineError."""
        return self._submit(draft, request_id, priority, box or Mailbox(), key)

    async def post(self, function: Callable[[], T]) -> T:
        """The result of `function`, called in the engine's thread between two steps. Raises what it raises."""
        return await self._call(function)

    def queue(self) -> tuple[EngineStats, int]:
        """The core's last statistics, and how many requests that were submitted they do not know of yet."""
        with self._wake:
            stats, unseen = self._engine.client.queue()
            return stats, unseen + self._unadded

    def stalled(self) -> float:
        """Seconds for which there has been work and nothing was computed."""
        with self._wake:
            if not self._streams:
                return 0.0
            return time.monotonic() - max(self._busy_since, self._engine.client.progress)

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """End requests by name. Who waits for them gets a last output, with the finish reason "abort"."""
        names = [request_id] if isinstance(request_id, str) else list(request_id)

        def work() -> None:
            for name in names:
                if (stream := self._streams.get(name)) is not None:
                    self._abort(stream)

        await self._call(work)

    async def stats(self) -> EngineStats:
        return await self._call(lambda: self._engine.stat_logger.stats)

    async def reset_prefix_cache(self) -> bool:
        return await self._call(self._engine.client.reset_prefix_cache)

    async def get_tokenizer(self) -> Any:
        return await asyncio.to_thread(self._engine.get_tokenizer)

    async def check_health(self) -> None:
        """Raises EngineError if the engine cannot answer any more."""
        with self._wake:
            if self._error is not None:
                raise _copy(self._error)

    def get_default_sampling_params(self) -> SamplingParams:
        return default_params(self._engine.config)

    @property
    def engine(self) -> LLMEngine:
        """The engine itself, for reading its configuration and tokenizer; its steps belong to the thread."""
        return self._engine

    @property
    def is_running(self) -> bool:
        return self._error is None

    def shutdown(self, timeout: float | None = 30.0) -> None:
        """End all requests (their callers get EngineError), stop the thread and release the model. May be repeated."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._engine.client.wake()
        self._pool.shutdown(wait=False)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    def _submit(self, draft: Draft, name: str | None, priority: int, box: Mailbox, key: int) -> Stream:
        number = next(self._ids)
        name = f"request-{number}" if name is None else name
        stream = Stream(f"{name}#{number}", name, box, key, self._left)
        with self._wake:
            if self._error is not None:
                raise _copy(self._error)
            if name in self._streams:
                raise ClientError(f"request id {name!r} is already in use", "request_id", name)
            if not self._streams:
                self._busy_since = time.monotonic()
            self._streams[name] = stream
            self._unadded += 1
            self._inbox.append(lambda: self._add(stream, draft, priority))
            self._wake.notify()
        self._engine.client.wake()
        return stream

    def _left(self, stream: Stream) -> None:
        self._post(lambda: self._abort(stream))

    def _post(self, work: Callable[[], None]) -> None:
        """Have `work` done in the engine's thread; dropped if that has ended."""
        with self._wake:
            if self._error is not None:
                return
            self._inbox.append(work)
            self._wake.notify()
        self._engine.client.wake()

    async def _call(self, function: Callable[[], T]) -> T:
        """The result of `function`, called in the engine's thread."""
        future: Future[T] = Future()

        def work() -> None:
            try:
                future.set_result(function())
            except Exception as e:
                future.set_exception(e)
            with self._wake:
                self._calls.discard(future)

        with self._wake:
            if self._error is not None:
                raise _copy(self._error)
            self._calls.add(future)
            self._inbox.append(work)
            self._wake.notify()
        self._engine.client.wake()
        return await asyncio.shield(asyncio.wrap_future(future))

    # From here on: in the engine's thread.

    def _run(self, make: Callable[[], LLMEngine], made: Future[LLMEngine]) -> None:
        try:
            self._engine = make()
        except BaseException as e:
            made.set_exception(e)
            return
        made.set_result(self._engine)
        error: Exception = EngineError("the engine was shut down")
        try:
            while self._work():
                if self._engine.has_work:
                    self._deliver(self._engine.step())
        except Exception as e:
            logger.exception("the engine failed")
            error = EngineError(f"the engine failed: {type(e).__name__}: {e}")
            error.__cause__ = e
        self._close(error)
        try:
            self._engine.shutdown()
        except Exception:
            logger.exception("the engine did not shut down cleanly")

    def _work(self) -> bool:
        """Do what was posted, waiting for it if there is nothing else; False when it is time to stop."""
        idle = not self._engine.has_work
        with self._wake:
            while idle and not self._inbox and not self._stopping:
                self._wake.wait()
            inbox, self._inbox = self._inbox, []
            stopping = self._stopping
        if not stopping:
            for work in inbox:
                work()
        return not stopping

    def _add(self, stream: Stream, draft: Draft, priority: int) -> None:
        try:
            with self._wake:  # whoever counts the queue sees a request there or here, and once
                self._unadded -= 1
                self._engine.add(draft, stream.id, priority, stream.name)
        except Exception as e:  # the core refused it: say, a pool too small for its prompt
            error = e
            if not isinstance(e, QuireError):
                about = fields(request_id=stream.name)
                logger.exception("request %s cannot be given to the engine", stream.name, extra=about)
                error = EngineError(f"the request cannot be given to the engine: {type(e).__name__}: {e}")
            with self._wake:
                self._streams.pop(stream.name, None)
            self._hand_over(stream.box.loop, [(stream, error)])

    def _abort(self, stream: Stream) -> None:
        if self._streams.get(stream.name) is stream:  # else it has ended meanwhile, and the name may be another's
            self._deliver(self._engine.abort_request(stream.id))

    def _deliver(self, outputs: list[Output]) -> None:
        """Hand outputs over: one call for each event loop, however many requests it waits for."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Output | Exception]]] = {}
        for output in outputs:
            with self._wake:
                stream = self._streams.pop(output.request_id) if output.finished else self._streams[output.request_id]
            failed = error_of(output)
            if failed is not None:
                item: Output | Exception = EngineError(f"request {output.request_id!r}: {failed}")
                if not output.finished:
                    self._engine.abort_request(stream.id)
                    with self._wake:
                        del self._streams[stream.name]
            else:
                item = output
            by_loop.setdefault(stream.box.loop, []).append((stream, item))
        for loop, items in by_loop.items():
            self._hand_over(loop, items)

    def _hand_over(self, loop: asyncio.AbstractEventLoop, items: list[tuple[Stream, Output | Exception]]) -> None:
        def put() -> None:
            for stream, item in items:
                stream.put(item)

        try:
            loop.call_soon_threadsafe(put)
        except RuntimeError:  # the loop was closed: nobody waits any more
            ids = [stream.id for stream, _ in items]
            with self._wake:
                for stream, _ in items:
                    self._streams.pop(stream.name, None)
            self._engine.abort_request(ids)

    def _close(self, error: Exception) -> None:
        """Nothing is answered any more: everyone who waits is told."""
        with self._wake:
            self._error = error
            streams, calls = list(self._streams.values()), list(self._calls)
            self._streams.clear()
            self._calls.clear()
        for future in calls:
            if not future.done():
                future.set_exception(_copy(error))
        for stream in streams:
            try:
                stream.box.loop.call_soon_threadsafe(stream.put, _copy(error))
            except RuntimeError:  # its event loop was closed
                logger.debug("request %s had no event loop left", stream.name)


def _length(prompt: Any) -> int:
    """Characters of a prompt, or tokens."""
    if isinstance(prompt, dict):
        prompt = prompt.get("prompt", prompt.get("prompt_token_ids"))
    return len(prompt) if isinstance(prompt, str | list) else 0


def _copy(error: Exception) -> Exception:
    """The same error for another caller: a raised exception collects the traceback of one."""
    new = EngineError(str(error))
    new.__cause__ = error.__cause__
    return new
