"""From the hidden states of prompts to the vectors that requests asked for.

Owns: what is kept of a prompt that is computed in several steps (a sum, a maximum, the vectors of its tokens so far),
by device row, and the arithmetic at its end. Knows nothing of plans' making or of the core: a row that enters begins
anew. Shape legend: T tokens of the step, L tokens of a row in it, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from quire.config.pooling import PoolingConfig
from quire.models.pooling import activation
from quire.types.plan import Ints, NewRow, Plan
from quire.types.pooling import CLASSIFY, EMBED, TOKEN_CLASSIFY, TOKEN_EMBED, PoolingParams

Vectors = NDArray[np.float32]


@dataclass
class _Row:
    """A row's request and what is kept of it: `kept_D` of its positions, or `pieces` (L, D) of its tokens."""

    params: PoolingParams
    length: int
    kept_D: Tensor | None = None
    pieces: list[Tensor] = field(default_factory=list[Tensor])


@dataclass
class PooledStep:
    """The vectors of a step on their way to the host. `finish` waits for the device."""

    tensors: list[Tensor]
    event: torch.cuda.Event | None = None

    def done(self) -> bool:
        return self.event is None or self.event.query()

    def finish(self) -> tuple[Vectors, ...]:
        if self.event is not None:
            self.event.synchronize()
        return tuple(tensor.numpy() for tensor in self.tensors)


class PoolingState:
    """The rows' requests: what a `RequestTable` keeps for a model that pools, in the place of sampling's parameters."""

    def __init__(self) -> None:
        self.rows: dict[int, _Row] = {}

    def add(self, new_row: NewRow) -> None:
        assert new_row.pooling is not None, "a model that pools was asked to sample"
        self.rows[new_row.row] = _Row(new_row.pooling, new_row.prompt_length)

    def retire(self, rows: Ints) -> None:
        for row in rows.tolist():
            self.rows.pop(row, None)

    def fork(self, forks: Ints) -> None:
        raise AssertionError("a prompt that is pooled does not fork")


class Heads(Protocol):
    """What stands behind the hidden states of a model. Where `PoolingConfig.causal` is off, `classify` takes those of a
    whole text."""

    def project(self, x_SD: Tensor) -> Tensor: ...
    def classify(self, x_SD: Tensor) -> Tensor: ...


class Pooler:
    def __init__(self, model: Heads, config: PoolingConfig, device: torch.device) -> None:
        self._model, self._config, self._device = model, config, device

    def new_state(self, max_rows: int, max_len: int) -> PoolingState:
        return PoolingState()

    def __call__(self, plan: Plan, hidden_TD: Tensor, state: PoolingState) -> PooledStep:
        """Take in a step's hidden states; answers the vectors of the prompts that it completes."""
        last = set(plan.pool_index.tolist())
        begins = (np.cumsum(plan.counts) - plan.counts).tolist()
        rows = [state.rows[row] for row in plan.rows.tolist()]
        for i, (row, begin) in enumerate(zip(rows, begins, strict=True)):
            self._keep(row, int(plan.starts[i]), i in last, hidden_TD[begin : begin + int(plan.counts[i])])
        return self._to_host(self._vectors([rows[i] for i in plan.pool_index.tolist()]))

    def _keep(self, row: _Row, start: int, last: bool, hidden_LD: Tensor) -> None:
        task = row.params.task
        if task in (TOKEN_EMBED, TOKEN_CLASSIFY):
            row.pieces.append(self._each_token(hidden_LD, row.params))
            return
        if task == CLASSIFY and not self._config.causal:
            assert last and start == 0, "the model's own head sees whole texts"
            row.pieces.append(self._scores(self._model.classify(hidden_LD), row.params))
            return
        match self._config.pooling:
            case "last":
                if last:
                    row.kept_D = hidden_LD[-1]
            case "cls":
                if start == 0:
                    row.kept_D = hidden_LD[0].clone()
            case "mean":
                part_D = hidden_LD.sum(0, dtype=torch.float32)
                row.kept_D = part_D if row.kept_D is None else row.kept_D + part_D
                if last:
                    row.kept_D = row.kept_D / row.length
            case _:
                part_D = hidden_LD.amax(0)
                row.kept_D = part_D if row.kept_D is None else torch.maximum(row.kept_D, part_D)

    def _each_token(self, hidden_LD: Tensor, params: PoolingParams) -> Tensor:
        if params.task == TOKEN_EMBED:
            return self._embedding(self._model.project(hidden_LD), params)
        return self._scores(self._model.classify(hidden_LD), params)

    def _vectors(self, rows: Sequence[_Row]) -> list[Tensor]:
        """Those of one task and one way are computed together."""
        out: list[Tensor] = [torch.cat(row.pieces) if row.pieces else torch.empty(0) for row in rows]
        groups: dict[tuple[str | None, int | None, bool | None], list[int]] = {}
        for i, row in enumerate(rows):
            if not row.pieces:
                params = row.params
                groups.setdefault((params.task, params.dimensions, params.use_activation), []).append(i)
        for members in groups.values():
            kept = [row.kept_D for i in members if (row := rows[i]).kept_D is not None]
            assert len(kept) == len(members), "a prompt is complete, and its first positions were not computed here"
            x_SD, params = torch.stack(kept), rows[members[0]].params
            if params.task == EMBED:
                found = self._embedding(self._model.project(x_SD), params)
            else:
                found = self._scores(self._model.classify(x_SD), params)
            for i, vector in zip(members, found.unbind(), strict=True):
                out[i] = vector
        return out

    def _embedding(self, x_SD: Tensor, params: PoolingParams) -> Tensor:
        x_SD = x_SD[:, : params.dimensions]
        wanted = self._config.normalize if params.use_activation is None else params.use_activation
        return F.normalize(x_SD, dim=-1) if wanted else x_SD

    def _scores(self, logits_SC: Tensor, params: PoolingParams) -> Tensor:
        config = self._config
        if config.mean != 0.0 or config.sigma != 1.0:
            logits_SC = (logits_SC - config.mean) / config.sigma
        return logits_SC if params.use_activation is False else activation(config.activation, logits_SC)

    def _to_host(self, vectors: list[Tensor]) -> PooledStep:
        if self._device.type == "cpu":
            return PooledStep([vector.float() for vector in vectors])
        host = [vector.float().to("cpu", non_blocking=True) for vector in vectors]
        event = torch.cuda.Event()
        event.record()
        return PooledStep(host, event)
