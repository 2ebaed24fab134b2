"""The seam between the engine and the workers: plans go in, results come back in the order of the plans."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Protocol

from quire.types.kv import KVGroup
from quire.types.plan import Plan, StepResult


class Result(Protocol):
    """A result on its way: `concurrent.futures.Future` is one."""

    def result(self) -> StepResult:
        """Wait for it; raises what went wrong in the step."""
        ...

    def done(self) -> bool:
        """Whether `result` would not wait."""
        ...


class Executor(Protocol):
    """Workers that run plans, all of them each plan. Sizes are in pages of KV cache."""

    num_blocks: int
    num_host_blocks: int
    kv_groups: tuple[KVGroup, ...]

    def submit(self, plan: Plan) -> Result:
        """Start a step; never raises for what goes wrong in it."""
        ...

    def prepare(self, grammar: str, eos_token_ids: tuple[int, ...]) -> Future[None]:
        """Compile the grammar of a row to come, beside the steps: a step with the row would wait for it."""
        ...

    def idle(self) -> bool:
        """Where there is nothing else to do: something small that makes later steps faster. False: nothing is left."""
        ...

    def shutdown(self) -> None: ...
