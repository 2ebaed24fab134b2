"""The numbers of running sequences, one array entry a device row, so that a steady step is a few vector operations.

Owns: which rows are free, and the counts of those in use. The meaning of the counts (all in tokens):
`computed` has been planned, its KV is written by plans already handed out; `length` = known tokens + `pending` ones
(sampled by plans in flight, unknown to the host); the sequence ends at `limit` tokens; blocks are there, writable and
unshared, up to `capacity`. `epoch` changes whenever a row changes hands: results of older work are dropped by it.
"""

from __future__ import annotations

import numpy as np

from quire.core.sequence import Sequence

I64 = np.int64


class Rows:
    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.computed = np.zeros(num_rows, I64)
        self.length = np.zeros(num_rows, I64)
        self.pending = np.zeros(num_rows, I64)
        self.limit = np.zeros(num_rows, I64)
        self.capacity = np.zeros(num_rows, I64)
        self.lead = np.zeros(num_rows, I64)
        self.epoch = np.zeros(num_rows, I64)
        self.last_plan = np.zeros(num_rows, I64)
        self.on_device = np.zeros(num_rows, np.bool_)  # the token at length - 1 was sampled into the device row
        self.ends = np.full((num_rows, 4), -1, np.int32)  # tokens that end it; those who have more ask to `look_up`
        self.look_up = np.zeros(num_rows, np.bool_)
        self.plain = np.zeros(num_rows, np.bool_)  # its results need no attention beyond the token itself
        self.stream = np.zeros(num_rows, np.bool_)
        self.sequence: list[Sequence | None] = [None] * num_rows
        self._free = list(range(num_rows - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def owner(self, row: int) -> Sequence | None:
        return self.sequence[row]

    def owners(self, rows: list[int]) -> list[Sequence]:
        """The sequences of rows that all have one."""
        owners = [self.sequence[row] for row in rows]
        assert None not in owners
        return owners  # type: ignore[return-value]

    def take(self, seq: Sequence) -> int:
        row = self._free.pop()
        self.sequence[row] = seq
        seq.row = row
        self.epoch[row] += 1
        return row

    def drop(self, row: int) -> None:
        """The row loses its sequence; it may be taken again only after `free`."""
        seq = self.sequence[row]
        assert seq is not None
        seq.row = -1
        self.sequence[row] = None
        self.epoch[row] += 1

    def free(self, row: int) -> None:
        self._free.append(row)

    def known(self, row: int) -> int:
        return int(self.length[row] - self.pending[row])
