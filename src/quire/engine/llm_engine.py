"""The engine as one object for one thread: prompts in, outputs out, a step at a time.

Owns: the wiring of inputs, core client, outputs and statistics. `LLM` drives it in the caller's thread, `AsyncLLM` in
one of its own. Knows no progress bars and no event loops.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from quire.config.schema import Config
from quire.engine.detokenizer import Detokenizer
from quire.engine.inputs import Draft, InputProcessor, Params
from quire.engine.outputs import Output, OutputProcessor
from quire.engine.stat_logger import StatLogger
from quire.engine.tokenizer import NONE, Tokenizer, load_tokenizer
from quire.types.errors import EngineError
from quire.types.params import RequestOutputKind, SamplingParams
from quire.types.prompts import PromptType
from quire.types.request import Delta, Request
from quire.types.stats import EngineStats
from quire.utils.imports import uncollected


class Client(Protocol):
    """The way to a core, in this process or another."""

    def add(self, request: Request) -> None: ...
    def abort(self, request_ids: list[str]) -> None: ...
    def end(self, request_id: str, index: int, at: int) -> None: ...
    def step(self) -> list[Delta]: ...
    def wake(self) -> None: ...
    @property
    def progress(self) -> float: ...
    @property
    def has_work(self) -> bool: ...
    def stats(self) -> EngineStats: ...
    def queue(self) -> tuple[EngineStats, int]: ...
    def reset_prefix_cache(self) -> bool: ...
    def shutdown(self) -> None: ...


class LLMEngine:
    """See the module. `client` and `clock` are given by tests; by default a core is made in this process."""

    def __init__(
        self,
        config: Config,
        client: Callable[[Config], Client] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.tokenizer: Tokenizer | None = load_tokenizer(config)  # before the model: it fails sooner
        self.inputs = InputProcessor(config, self.tokenizer)
        self.outputs = OutputProcessor(None if self.tokenizer is None else Detokenizer(self.tokenizer), clock)
        self.client: Client = (client or _in_process)(config)
        shown = config.observability
        interval = None if shown.disable_log_stats else shown.log_interval
        self._closed = False
        self.stat_logger = StatLogger(self.client.stats, interval, clock)

    def add_request(self, request_id: str, prompt: PromptType, params: Params, priority: int = 0) -> None:
        """Check one prompt and give it to the core."""
        (draft,) = self.inputs.drafts([prompt], [params])
        self.add(draft, request_id, priority)

    def add(self, draft: Draft, request_id: str, priority: int = 0, name: str | None = None) -> None:
        """Give a checked prompt to the core; `name` is the id that its outputs carry, if not `request_id`."""
        if self._closed:
            raise EngineError("the engine was shut down: make a new one")
        params = draft.params
        streams = isinstance(params, SamplingParams) and params.output_kind is not RequestOutputKind.FINAL_ONLY
        request = self.inputs.request(draft, request_id, priority, stream=streams)
        self.outputs.add(request, draft.text, name)
        try:
            self.client.add(request)
        except BaseException:
            self.outputs.abort([request_id])
            raise

    def abort_request(self, request_ids: str | Iterable[str]) -> list[Output]:
        """End requests; answers the last output of each that was still alive."""
        ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        self.client.abort(ids)
        return self.outputs.abort(ids)

    def step(self) -> list[Output]:
        """One step of the core; the outputs that are due after it."""
        outputs, ends = self.outputs.process(self.client.step())
        for end in ends:
            self.client.end(end.request_id, end.index, end.at)
        self.stat_logger.tick()
        return outputs

    def drain(self) -> None:
        """Let the core finish what is in flight, when nobody waits for it any more."""
        while self.client.has_work:
            self.step()

    def has_unfinished_requests(self) -> bool:
        return self.outputs.unfinished > 0

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do; work may remain after the last output, of tokens computed in vain."""
        if self.client.has_work:
            return True
        if self.outputs.unfinished:
            raise EngineError(f"the core has no work left, but {self.outputs.unfinished} requests have not ended")
        return False

    def get_tokenizer(self) -> Any:
        """The Transformers tokenizer of the model."""
        if self.tokenizer is None:
            raise ValueError(f"a tokenizer is asked for, {NONE}")
        return self.tokenizer.transformers()

    def shutdown(self) -> None:
        """Release the model; requests that have not ended are forgotten. May be repeated."""
        if self._closed:
            return
        self._closed = True
        self.client.shutdown()


def _in_process(config: Config) -> Client:
    with uncollected("torch"):
        from quire.engine.client import InProcessClient

    return InProcessClient(config)
