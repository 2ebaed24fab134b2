"""What the endpoints share: the engine, its names, who is being answered, and whether more may come.

Owns: admission (limits, draining) and `Run`, one HTTP request's work in the engine. Knows no routes.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Generic, TypeVar, cast

from quire.config.args import ServerArgs
from quire.config.schema import Config
from quire.engine.async_engine import AsyncLLM, Mailbox, Stream
from quire.engine.inputs import Draft, Params
from quire.engine.outputs import Output
from quire.engine.process import ProcessClient
from quire.engine.tokenizer import Tokenizer
from quire.metrics.prometheus import Metrics
from quire.server.errors import ApiError, ClientGone, unavailable
from quire.types.errors import ClientError
from quire.types.outputs import RequestOutput
from quire.utils.logging import fields

log = logging.getLogger(__name__)


class Served:
    """The state of a server. The engine is None while it starts."""

    def __init__(self, config: Config, args: ServerArgs) -> None:
        self.config, self.args = config, args
        self.names = config.model.served_model_names or (config.model.model,)
        self.defaults = dict(config.model.generation_config)
        self.metrics = Metrics(self.names[0], config)
        self.created = int(time.time())
        self.draining = False
        self.runs: set[Run[Any]] = set()
        self.preparing: set[asyncio.Task[Any]] = (
            set()
        )  # those that answer requests which have no run, and no answer yet
        self._engine: AsyncLLM | None = None

    def start(self, engine: AsyncLLM) -> None:
        """The engine is there: requests may come."""
        engine.engine.outputs.observer = self.metrics
        self._engine = engine

    @property
    def started(self) -> bool:
        return self._engine is not None

    @property
    def engine(self) -> AsyncLLM:
        """Raises `ApiError` while there is none."""
        if self._engine is None:
            raise unavailable("the model is still being loaded", "starting", 2)
        return self._engine

    @property
    def client(self) -> ProcessClient:
        client = self.engine.engine.client
        assert isinstance(client, ProcessClient)
        return client

    @property
    def tokenizer(self) -> Tokenizer:
        found = self.engine.engine.tokenizer
        if found is None:
            raise ApiError(
                400, "the server runs without a tokenizer: send token ids to /v1/completions", "no_tokenizer"
            )
        return found

    def check_model(self, name: str | None) -> str:
        """The name to answer with. Raises `ApiError` for a model that is not served here."""
        if name and name not in self.names:
            text = f"the model {name!r} does not exist; this server has {', '.join(self.names)}"
            raise ApiError(404, text, "model_not_found", "model")
        return name or self.names[0]

    def check_text(self, name: str | None) -> str:
        """As `check_model`; raises for a model that generates no text too."""
        name = self.check_model(name)
        if (pooling := self.config.pooling) is not None:
            text = f"the model {name!r} generates no text: it has {', '.join(pooling.tasks)}"
            raise ApiError(400, text, "unsupported_task", "model")
        return name

    def ill(self) -> str | None:
        """Why no tokens can be expected now; None while all is well."""
        if self._engine is None:
            return "starting"
        if not self._engine.is_running:
            return "the engine failed"
        if not self.client.ready:
            return "the engine is being started again"
        stalled = self._engine.stalled()
        if stalled > self.args.health_stall_timeout:
            return f"requests wait, and nothing was computed for {stalled:.0f} s"
        return None

    def admit(self, drafts: Sequence[Draft]) -> None:
        """Raises `ApiError` where more requests, or longer ones, are waiting than is allowed."""
        args = self.args
        if args.max_num_queued_reqs is None and args.max_num_queued_tokens is None:
            return
        stats, unseen = self.engine.queue()
        free = 0 if stats.waiting else max(0, self.config.scheduler.max_num_seqs - stats.running)
        queued = stats.waiting + max(0, unseen - free)
        if args.max_num_queued_reqs is not None and queued >= args.max_num_queued_reqs and len(drafts) + unseen > free:
            self.metrics.rejected("queued_reqs")
            text = f"{queued} requests are waiting, and no more than {args.max_num_queued_reqs} may"
            raise ApiError(429, text, "queue_full", retry_s=1)
        tokens = stats.waiting_tokens + sum(len(draft.tokens) for draft in drafts)
        if args.max_num_queued_tokens is not None and queued and tokens > args.max_num_queued_tokens:
            self.metrics.rejected("queued_tokens")
            text = f"{tokens} prompt tokens would be waiting, and no more than {args.max_num_queued_tokens} may"
            raise ApiError(429, text, "queue_full", retry_s=1)

    def prepared(self) -> None:
        """The request that this task answers is past its preparation: it has a run, or an answer."""
        if (task := asyncio.current_task()) is not None:
            self.preparing.discard(task)

    def request_id(self, prefix: str, asked: str | None, header: str | None) -> str:
        return f"{prefix}-{asked or header or uuid.uuid4().hex}"

    async def prepare(self, prompts: Sequence[Any], params: Params, special: bool = True) -> list[Draft]:
        """Raises `ClientError`."""
        drafts = await self.engine.prepare(prompts, [params] * len(prompts), add_special_tokens=special)
        limit = self.args.max_prompt_tokens
        for draft in drafts:
            if limit is not None and len(draft.tokens) > limit:
                text = f"the prompt has {len(draft.tokens)} tokens, and this server takes {limit}"
                raise ClientError(text, "prompt", len(draft.tokens))
        return drafts


Answer = TypeVar("Answer", bound=Output)


class Run(Generic[Answer]):
    """One HTTP request's prompts in the engine, and what comes of them: texts, or vectors."""

    def __init__(self, served: Served, id: str, drafts: Sequence[Draft], priority: int) -> None:
        served.admit(drafts)
        if served.draining:
            raise unavailable("the server is shutting down", "shutting_down")
        self._served, self.id, self.drafts = served, id, drafts
        self.prompt_tokens = sum(len(draft.tokens) for draft in drafts)
        self.completion_tokens = 0
        self.cached_tokens = 0
        self._box = Mailbox()
        self._streams: list[Stream] = []
        self._left = len(drafts)
        unique = uuid.uuid4().hex[:8]
        try:
            for i, draft in enumerate(drafts):
                name = f"{id}-{unique}-{i}"
                self._streams.append(served.engine.submit(draft, name, priority, self._box, i))
        except BaseException:
            self.close()
            raise
        served.runs.add(self)
        served.prepared()
        if served.args.enable_log_requests:
            self._note(drafts)
        for _ in drafts:
            served.metrics.received()

    def _note(self, drafts: Sequence[Draft]) -> None:
        asked = [(len(draft.tokens), draft.params) for draft in drafts]
        about = fields(request_id=self.id, prompt_tokens=[tokens for tokens, _ in asked], params=str(asked[0][1]))
        log.info("request %s: %s prompt tokens, %s", self.id, self.prompt_tokens, asked[0][1], extra=about)

    async def outputs(self) -> AsyncGenerator[list[tuple[int, Answer]]]:
        """(prompt, output) as they come, as many at a time as there are. Raises what ended a request early."""
        while self._left:
            found: list[tuple[int, Answer]] = []
            failed: Exception | None = None
            for key, item in await self._box.get():
                if isinstance(item, Exception):
                    failed = item
                    break
                self._count(item)
                found.append((key, cast(Answer, item)))
            if found:
                yield found
            if failed is not None:
                raise failed

    async def whole(self, receive: Any) -> list[Answer]:
        """The last output of each prompt. Raises `ClientGone` where nobody waits for it."""
        watcher = asyncio.ensure_future(self.watch(receive))
        last: list[Answer | None] = [None] * len(self.drafts)
        try:
            async for batch in self.outputs():
                for key, output in batch:
                    last[key] = output
        finally:
            watcher.cancel()
            self.close()
        return [output for output in last if output is not None]

    async def watch(self, receive: Any) -> None:
        """Ends the run when the client is gone."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.close(ClientGone())

    def close(self, error: ApiError | None = None) -> None:
        """Abort what has not ended; who reads gets `error`. May be repeated."""
        for stream in self._streams:
            stream.close(error)
        self._served.runs.discard(self)

    def _count(self, output: Output) -> None:
        if output.finished:
            self._left -= 1
            self.cached_tokens += output.num_cached_tokens or 0
        if isinstance(output, RequestOutput):
            self.completion_tokens += sum(len(o.token_ids) for o in output.outputs)

    def usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
