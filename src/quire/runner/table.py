"""The device-side row of each live sequence: its last token, its length, its block tables, its sampling parameters.

Owns: those rows. A plan's changes are applied in the plan's order; which sequence a row stands for is the core's
affair. One row beyond the last is for padding: its pages are -1, so that nothing it computes is written. Shape
legend: R rows, P pages of a row, G KV groups.
"""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from quire.runner.sampling_state import to_device
from quire.runner.upload import Upload
from quire.types.plan import Ints, NewRow, Plan


class RowState(Protocol):
    """What the rows' requests ask for: of sampling (`SamplingState`) or of pooling."""

    def add(self, new_row: NewRow) -> None: ...
    def retire(self, rows: Ints) -> None: ...
    def fork(self, forks: Ints) -> None: ...


State = TypeVar("State", bound=RowState, covariant=True)


class Makes(Protocol[State]):
    def new_state(self, max_rows: int, max_len: int) -> State: ...


class RequestTable(Generic[State]):
    """`sampler`: who samples the rows, or pools them."""

    def __init__(
        self, max_rows: int, max_len: int, block_size: int, num_groups: int, sampler: Makes[State], device: torch.device
    ) -> None:
        pages = -(-max_len // block_size)
        self.padding_row = max_rows
        self.block_size = block_size
        self.last_R = torch.zeros(max_rows + 1, dtype=torch.int64, device=device)
        self.length_R = torch.zeros(max_rows + 1, dtype=torch.int64, device=device)
        self.offset_R = torch.zeros(max_rows + 1, dtype=torch.int64, device=device)  # position - token index
        self.pages_RP: list[Tensor] = [
            torch.full((max_rows + 1, pages), -1, dtype=torch.int32, device=device) for _ in range(num_groups)
        ]
        self.prompt_length = np.zeros(max_rows, np.int64)
        self.sampling: State = sampler.new_state(max_rows, max_len)

    def stage(self, plan: Plan, upload: Upload) -> None:
        """Put the plan's changes of the rows into the step's one copy to the device."""
        upload.add("forks", plan.forks.T)
        upload.add("new", [(row.row, row.position_offset) for row in plan.new_rows], (-1, 2))
        for g, delta in enumerate(plan.tables):
            upload.add(f"table{g}", (delta.rows, delta.index, delta.blocks))

    def apply(self, plan: Plan, upload: Upload) -> None:
        """After the copy was sent: change the rows."""
        self.enter(plan)
        if plan.new_rows:
            new = upload["new"]
            self.offset_R[new[:, 0]] = new[:, 1]
        if len(plan.forks):
            self._copy(upload["forks"][0], upload["forks"][1])
        for g, delta in enumerate(plan.tables):
            if len(delta.rows):
                rows, index, blocks = upload[f"table{g}"]
                self.pages_RP[g][rows, index] = blocks.to(torch.int32)

    def enter(self, plan: Plan) -> None:
        """The host's part of it: rows that go and rows that come."""
        if len(plan.retired):
            self.sampling.retire(plan.retired)
        for row in plan.new_rows:
            self.sampling.add(row)
            self.prompt_length[row.row] = row.prompt_length
        if len(plan.forks):
            self.sampling.fork(plan.forks)
            self.prompt_length[plan.forks[:, 1]] = self.prompt_length[plan.forks[:, 0]]

    def fork(self, forks: Ints) -> None:
        """Copy rows on the device, as the pairs stand."""
        self._copy(*(to_device(column.astype(np.int64), self.last_R.device) for column in (forks[:, 0], forks[:, 1])))

    def _copy(self, source: Tensor, target: Tensor) -> None:
        for tensor in (self.last_R, self.length_R, self.offset_R, *self.pages_RP):
            tensor[target] = tensor[source]

    def draw(self, rows: Ints, rows_S: Tensor, tokens_S: Tensor, lengths_S: Tensor) -> None:
        """The tokens that `rows` (`rows_S` on the device) drew at these lengths."""
        if self.last_R.device.type == "cpu":  # NumPy is faster on a few numbers
            self.last_R.numpy()[rows] = tokens_S.numpy()
            self.length_R.numpy()[rows] = lengths_S.numpy()
        else:
            self.last_R[rows_S] = tokens_S
            self.length_R[rows_S] = lengths_S.long()
