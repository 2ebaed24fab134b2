"""What one plan does to pages: table entries, copies, swaps. Filled by the KV cache manager while a plan is made.

Knows the order that `quire.types.plan` fixes (swap out, swap in, copy, forward) and keeps each list free of conflicts:
no page is the destination of two moves.
"""

from __future__ import annotations

import numpy as np

from quire.types.plan import Ints, TableDelta, ints

NO_PAIRS = ints((), (0, 2))


class Moves:
    def __init__(self, number: int, num_groups: int) -> None:
        self.number = number
        self.fence = -1
        self.entries: list[tuple[list[int], list[int], list[int]]] = [([], [], []) for _ in range(num_groups)]
        self.copies: dict[int, int] = {}  # destination -> source
        self.swap_out: dict[int, int] = {}  # host page -> device page
        self.swap_in: dict[int, int] = {}  # device page -> host page

    def enter(self, group: int, row: int, index: int, block: int) -> None:
        rows, indices, blocks = self.entries[group]
        rows.append(row)
        indices.append(index)
        blocks.append(block)

    def inherit(self, parent_row: int, child_row: int) -> None:
        """Forks copy tables as they were before this plan: what it gave the parent, the child must be given too."""
        for rows, indices, blocks in self.entries:
            mine = [(j, page) for row, j, page in zip(rows, indices, blocks, strict=True) if row == parent_row]
            rows += [child_row] * len(mine)
            indices += [j for j, _ in mine]
            blocks += [page for _, page in mine]

    def tables(self) -> tuple[TableDelta, ...]:
        return tuple(TableDelta(ints(rows), ints(index), ints(blocks)) for rows, index, blocks in self.entries)

    def pairs(self, kind: dict[int, int]) -> Ints:
        """(source, destination) of a dict destination -> source."""
        if not kind:
            return NO_PAIRS
        return np.array([(source, destination) for destination, source in kind.items()], np.int32)
