"""Runs plans on a model: rows, batch, forward, sample. Owns: the order of a step on the device.

Knows no scheduling; a plan says everything. What it hands back may still be on its way from the device (`Pending`), so
that the host can plan on meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quire.models.base import CausalLM
from quire.ops.sampling import Kind, Out
from quire.runner import batch as batches
from quire.runner.batch import Batch
from quire.runner.kv_store import KVStore
from quire.runner.replay import Replay, Replayed
from quire.runner.sampler import Sampled, Sampler
from quire.runner.table import RequestTable
from quire.runner.upload import make_upload
from quire.types.plan import Ints, Plan, PromptLogprobs, StepResult, ints

# Prompt logprobs need logits of every position: so many at a time, to bound their memory.
LOGITS_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Pending:
    """A step on its way. `result` waits for the device. `end`: of a step on a GPU that samples nothing."""

    number: int
    sampled: Sampled | None
    prompt_logprobs: tuple[PromptLogprobs, ...]
    end: torch.cuda.Event | None = None

    def done(self) -> bool:
        if self.sampled is None:
            return self.end is None or self.end.query()
        return self.sampled.done()

    def result(self) -> StepResult:
        if self.sampled is None:
            if self.end is not None:
                self.end.synchronize()
            return StepResult(self.number, ints((), (0, 1)), ints(), prompt_logprobs=self.prompt_logprobs)
        done = self.sampled.finish()
        return StepResult(self.number, done.tokens, done.accepted, done.logprobs, self.prompt_logprobs, done.failed)


class ModelRunner:
    """`depth`: how many plans may be in flight. `draw_step`: the op of that name, where draws are to be made by it."""

    def __init__(
        self,
        model: CausalLM,
        store: KVStore,
        table: RequestTable,
        sampler: Sampler,
        replay: Replay,
        device: torch.device,
        depth: int,
        draw_step: Callable[..., None] | None = None,
    ) -> None:
        self._model = model
        self._store = store
        self._table = table
        self._sampler = sampler
        self._upload = make_upload(device, depth)
        self._replay = replay
        self._draw_step = draw_step
        self._event = torch.cuda.Event if device.type == "cuda" else None
        # A GPU reads logits as they come; a CPU's linear layers give float32 at no cost.
        self._logits = None if device.type == "cuda" else torch.float32

    @torch.inference_mode()
    def submit(self, plan: Plan) -> Pending:
        """Start a step; returns before the device is done."""
        table, upload = self._table, self._upload
        replayed = self._replay.takes(plan) and not self._wants_prompt_logprobs(plan)
        carried = replayed and self._replay.carries
        if carried:
            table.enter(plan)
        else:
            table.stage(plan, upload)
            if not replayed:
                batches.stage(plan, upload)
            upload.send()
            table.apply(plan, upload)
        self._store.move(plan)
        if not len(plan.rows):
            return self._pending(plan, None)
        if replayed:
            return self._pending(plan, self._sample_replayed(plan, self._replay.run(plan)))
        batch = batches.build(plan, upload, table, self._store.layers)
        hidden_TD = self._model(batch.tokens_T, batch.step.positions_T, batch.step)
        table.length_R[batch.rows_R] = batch.lengths_R
        prompts = tuple(self._prompt_logprobs(plan, hidden_TD))
        return self._pending(plan, self._sample(plan, batch, hidden_TD), prompts)

    def _pending(
        self, plan: Plan, sampled: Sampled | None, prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    ) -> Pending:
        """The engine paces chunks by what steps take: also those of which no token comes have an end."""
        end = None
        if sampled is None and self._event is not None:
            end = self._event()
            end.record()
        return Pending(plan.number, sampled, prompt_logprobs, end)

    def _sample(self, plan: Plan, batch: Batch, hidden_TD: Tensor) -> Sampled | None:
        if not len(plan.sample_rows):
            return None
        logits_SV = self._model.compute_logits(hidden_TD[batch.last_S], self._logits)
        return self._draw(plan, logits_SV, batch.sample_rows_S, batch.lengths_R[batch.sample_index_S])

    def _sample_replayed(self, plan: Plan, done: Replayed) -> Sampled | None:
        if not len(plan.sample_rows):
            return None
        return self._draw(plan, done.logits_SV, done.rows_S, done.lengths_S, done.greedy, done.draw)

    def _draw(
        self,
        plan: Plan,
        logits_SV: Tensor,
        rows_S: Tensor,
        lengths_S: Tensor,
        greedy: tuple[Tensor, Tensor] | None = None,
        replay: Callable[[Kind], Out] | None = None,
    ) -> Sampled:
        """`greedy`, `replay`: see `Replayed`."""
        table, rows, state = self._table, plan.sample_rows, self._table.sampling
        if self._draw_step is not None:
            return self._draw_there(rows, logits_SV, rows_S, lengths_S, replay)
        if greedy is not None and not state.needs[rows].any():
            sampled = self._sampler.greedy(*greedy)
        else:
            sampled = self._sampler(logits_SV, rows, lengths_S.long(), state, rows_S)
        state.append(rows, sampled.tokens_S)
        state.grammars.advance(rows, sampled.tokens)
        table.draw(rows, rows_S, sampled.tokens_S, lengths_S)
        return sampled

    def _draw_there(
        self, rows: Ints, logits_SV: Tensor, rows_S: Tensor, lengths_S: Tensor, replay: Callable[[Kind], Out] | None
    ) -> Sampled:
        """By the parameters on the device, which keeps the tokens. A recorded draw is one from `logits_SV` alone."""
        state = self._table.sampling

        def draw(x_SV: Tensor, kind: Kind) -> Out:
            if replay is not None and x_SV is logits_SV and not self._sampler.processed:
                return replay(kind)
            return self._draw_now(x_SV, rows_S, lengths_S, kind)

        if state.drawn_only(rows):
            state.update()
            sampled = self._sampler.drawn(draw(logits_SV, state.kind(rows)))
        else:
            sampled = self._sampler(logits_SV, rows, lengths_S.long(), state, rows_S, draw)
        state.append(rows, sampled.tokens_S)
        state.grammars.advance(rows, sampled.tokens)
        return sampled

    def _draw_now(self, logits_SV: Tensor, rows_S: Tensor, lengths_S: Tensor, kind: Kind) -> Out:
        assert self._draw_step is not None
        count, state, table = len(rows_S), self._table.sampling, self._table
        packed_S2 = torch.empty((count, 2), dtype=torch.int32, device=logits_SV.device)
        out = Out.new(count, logits_SV.device, low=kind > Kind.NOISE and self._sampler.processed)
        out = out._replace(packed_S2=packed_S2, last_X=table.last_R, length_X=table.length_R)
        self._draw_step(logits_SV, rows_S, lengths_S, state.reals_RC, state.wholes_RC, out, kind)
        return out

    def _wants_prompt_logprobs(self, plan: Plan) -> bool:
        if not len(plan.tokens):
            return False
        known = (self._table.sampling.params[row] for row in plan.rows.tolist())
        new = (row.params for row in plan.new_rows)
        return any(params is not None and params.prompt_logprobs is not None for params in (*known, *new))

    def _prompt_logprobs(self, plan: Plan, hidden_TD: Tensor) -> list[PromptLogprobs]:
        """Of rows that ask for them: each position of a chunk gives the logprobs of the prompt token after it."""
        out: list[PromptLogprobs] = []
        begins = np.cumsum(plan.counts) - plan.counts
        for i in np.flatnonzero(np.diff(plan.token_offsets)).tolist():  # rows that compute known tokens
            row, start, at = int(plan.rows[i]), int(plan.starts[i]), int(begins[i])
            params = self._table.sampling.params[row]
            if params is None or params.prompt_logprobs is None:
                continue
            end = min(start + int(plan.counts[i]), int(self._table.prompt_length[row]) - 1)
            for first in range(start, end, LOGITS_AT_ONCE):
                last = min(end, first + LOGITS_AT_ONCE)
                logits_LV = self._model.compute_logits(hidden_TD[at + first - start : at + last - start])
                out.append(self._sampler.prompt_logprobs(logits_LV, row, first + 1, self._table.sampling))
        return out
