"""The seam for steps that were recorded once and are replayed: `Replay`, and what one gives.

On a CPU these are programs of native calls (`replay.py`), on a GPU graphs (`graphs.py`).
Shape legend: S sampled rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from quire.ops.sampling import Kind, Out
from quire.types.plan import Plan


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a replayed step gives; the next overwrites it. `rows_S` (int64), `lengths_S` (integers), both on the device:
    the sampled rows and their tokens so far. `greedy`: the likeliest token of each and its logit, where they were found
    in passing. `draw`: replays a draw from the logits, where that is recorded too."""

    logits_SV: Tensor
    rows_S: Tensor
    lengths_S: Tensor
    greedy: tuple[Tensor, Tensor] | None = None
    draw: Callable[[Kind], Out] | None = None


class Replay(Protocol):
    """`carries`: `run` brings the plan's changes of the device's rows along."""

    carries: bool

    def takes(self, plan: Plan) -> bool:
        """Whether `run` can serve the plan; else it runs eagerly."""
        ...

    def run(self, plan: Plan) -> Replayed:
        """The forward of a plan whose changes were applied to the table, unless this `carries` them."""
        ...

    def prepare_next(self) -> bool:
        """Prepares for one more size of steps; False if there is none left."""
        ...


class NoReplay:
    """Every step runs eagerly."""

    carries = False

    def takes(self, plan: Plan) -> bool:
        return False

    def run(self, plan: Plan) -> Replayed:
        raise AssertionError("no step is recorded")

    def prepare_next(self) -> bool:
        return False
