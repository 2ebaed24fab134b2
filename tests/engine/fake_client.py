"""A core without a model: each sequence gets tokens from a script, under the rules that a real core keeps.

Deltas arrive `late` steps after they were made, so that what follows an `end` or an `abort` still comes, as it does
from a core that is some steps ahead.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tokenizer_zoo import write_folder

from quire.config.args import EngineArgs
from quire.config.resolve import resolve
from quire.config.schema import Config
from quire.engine.llm_engine import LLMEngine
from quire.types.params import BeamSearchParams
from quire.types.plan import PromptLogprobs, TokenLogprobs
from quire.types.request import Delta, FinishReason, Request
from quire.types.stats import EngineStats

VOCAB = 500
Script = Callable[[Request, int], list[int]]


def counting(request: Request, index: int) -> list[int]:
    """A script: tokens that depend on the prompt, the sequence and their place."""
    start = sum(request.prompt_token_ids) + 7 * index
    return [10 + (start + 13 * i) % 300 for i in range(1000)]


def block(tokens: list[int], k: int) -> TokenLogprobs:
    """Logprobs that can be told apart: -t/100 for token t at rank 3, its neighbours above and below it."""
    ids = np.array([[t, *(t + j for j in range(k))] for t in tokens], np.int32)
    values = -ids.astype(np.float32) / 100
    return TokenLogprobs(ids=ids, values=values, ranks=np.full(len(tokens), 3, np.int32))


class _Live:
    def __init__(self, request: Request, tokens: list[int], index: int) -> None:
        self.request, self.tokens, self.index = request, tokens, index
        self.done = 0
        self.unsent: list[int] = []


class FakeClient:
    def __init__(self, config: Config, script: Script = counting, late: int = 1, chunk: int = 1) -> None:
        self.script, self.late, self.chunk = script, late, chunk
        self.live: list[_Live] = []
        self.pipe: deque[list[Delta]] = deque()
        self.requests: list[Request] = []
        self.ended: list[tuple[str, int, int]] = []
        self.aborted: list[str] = []
        self.closed = False
        self.progress = 0.0
        self.on_step: Callable[[int], None] = lambda n: None
        self.steps = 0
        self.generated = 0

    def add(self, request: Request) -> None:
        self.requests.append(request)
        params = request.params
        count = 1 if isinstance(params, BeamSearchParams) else params.n
        self.live += [_Live(request, self.script(request, i), i) for i in range(count)]

    def abort(self, request_ids: list[str]) -> None:
        self.aborted += request_ids
        self.live = [s for s in self.live if s.request.id not in request_ids]

    def end(self, request_id: str, index: int, at: int) -> None:
        self.ended.append((request_id, index, at))
        self.live = [s for s in self.live if (s.request.id, s.index) != (request_id, index)]

    def step(self) -> list[Delta]:
        self.steps += 1
        self.on_step(self.steps)
        made: list[Delta] = []
        for s in list(self.live):
            made += self._beams(s) if isinstance(s.request.params, BeamSearchParams) else self._advance(s)
        self.pipe.append(made)
        return self.pipe.popleft() if len(self.pipe) > self.late or not self.live else []

    def _advance(self, s: _Live) -> list[Delta]:
        params, first = s.request.params, s.done == 0
        assert not isinstance(params, BeamSearchParams) and params.max_tokens is not None
        finish, stop = None, None
        for _ in range(self.chunk):
            token = s.tokens[s.done]
            s.done += 1
            s.unsent.append(token)
            if s.done > params.min_tokens and token in s.request.eos_token_ids and not params.ignore_eos:
                finish = FinishReason.STOP
            elif s.done > params.min_tokens and token in (params.stop_token_ids or ()):
                finish, stop = FinishReason.STOP, token
            elif s.done >= params.max_tokens:
                finish = FinishReason.LENGTH
            if finish:
                break
        self.generated += 1
        if finish:
            self.live.remove(s)
        if not finish and not s.request.stream:
            return []
        tokens, s.unsent = s.unsent, []
        delta = Delta(s.request.id, s.index, tokens, finish=finish, stop_token=stop)
        delta.cached_tokens = 3 if first or not s.request.stream else None
        if params.logprobs is not None:
            delta.logprobs = [block([t], params.logprobs) for t in tokens]
        if params.prompt_logprobs is not None and (first or not s.request.stream) and s.index == 0:
            prompt, half = s.request.prompt_token_ids, len(s.request.prompt_token_ids) // 2
            delta.prompt_logprobs = [
                PromptLogprobs(0, half, block(prompt[half:], params.prompt_logprobs)),
                PromptLogprobs(0, 1, block(prompt[1:half], params.prompt_logprobs)),
            ]
        return [delta]

    def _beams(self, s: _Live) -> list[Delta]:
        params = s.request.params
        assert isinstance(params, BeamSearchParams)
        self.live.remove(s)
        eos = s.request.eos_token_ids[0]
        ends = [(FinishReason.LENGTH, []), (FinishReason.STOP, [eos])]
        out = []
        for i in range(params.beam_width):
            finish, tail = ends[i % 2]
            tokens = [*s.tokens[i : i + params.max_tokens - len(tail)], *tail]
            out.append(Delta(s.request.id, i, tokens, finish=finish, cumulative_logprob=-1.0 - i))
        return out

    def wake(self) -> None:
        pass

    @property
    def has_work(self) -> bool:
        return bool(self.live or any(self.pipe))

    def queue(self) -> tuple[EngineStats, int]:
        return self.stats(), 0

    def stats(self) -> EngineStats:
        return EngineStats(
            blocks_total=10,
            blocks_used=len(self.live),
            blocks_free=10 - len(self.live),
            running=len(self.live),
            generation_tokens=self.generated,
            block_size=16,
        )

    def reset_prefix_cache(self) -> bool:
        return not self.live

    def shutdown(self) -> None:
        self.closed = True


def make_config(folder: Path, kind: str = "byte_level", **args: object) -> Config:
    """The configuration of a checkpoint without weights, with a tokenizer of this kind."""
    write_folder(folder, kind)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return resolve(EngineArgs(**{"model": str(folder), "device": "cpu", "max_model_len": 256, **args}))  # type: ignore


def make_engine(folder: Path, script: Script = counting, late: int = 1, chunk: int = 1, **args: object) -> LLMEngine:
    return LLMEngine(make_config(folder, **args), lambda c: FakeClient(c, script, late, chunk))


def client_of(engine: LLMEngine) -> FakeClient:
    assert isinstance(engine.client, FakeClient)
    return engine.client
