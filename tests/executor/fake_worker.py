"""A worker without a model, for the tests of executors: it does as its configuration says."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from quire.types.errors import ClientError
from quire.types.kv import KVGroup
from quire.types.plan import Plan, StepResult, ints


@dataclass
class FakeModel:
    arch: Any = field(default_factory=lambda: SimpleNamespace(architecture="LlamaForCausalLM"))
    logits_processors: tuple[type, ...] = ()
    registered: dict[str, str] = field(default_factory=dict)


@dataclass
class FakeConfig:
    """What executors read of a configuration, and what `FakeWorker` does."""

    folder: str
    fault: Any = None
    model: FakeModel = field(default_factory=FakeModel)
    observability: Any = field(default_factory=lambda: SimpleNamespace(log_level="warning", log_format="text"))


class FakeWorker:
    """`config.fault` is (rank, when, how): `when` is a plan's number, less than 0 for its result,
    or "start"."""

    def __init__(self, config, *, rank, world):
        self.config, self.rank, self.world = config, rank, world
        self.num_blocks, self.num_host_blocks = 100 - 10 * rank, 7 + rank
        self.kv_groups = (KVGroup("full", (0, 1)), KVGroup("sliding", (2,), 8))
        (Path(config.folder) / f"pid{rank}").write_text(str(os.getpid()))
        self.fault("start")

    def submit(self, plan: Plan):
        self.fault(plan.number)
        with open(Path(self.config.folder) / f"seen{self.rank}", "a") as seen:
            seen.write(f"{plan.number}:{int(plan.tokens.sum())} ")
        tokens = ints([[int(plan.tokens.sum()) % 1000 * 10 + self.rank]])
        return Answer(self, StepResult(plan.number, tokens, np.ones(1, dtype=np.int32)))

    def prepare(self, grammar, eos):
        """A grammar is ready once a file of its name and this rank is there; what it holds is the error."""
        self.fault(grammar)
        future = Future()

        def look():
            path = Path(self.config.folder) / f"{grammar}{self.rank}"
            while not path.exists():
                time.sleep(0.01)
            text = path.read_text()
            future.set_exception(ValueError(text)) if text else future.set_result(None)

        threading.Thread(target=look, daemon=True).start()
        return future

    def fault(self, when):
        rank, at, how = self.config.fault or (None, None, None)
        if (rank, at) != (self.rank, when):
            return
        if how == "refuse":
            raise ClientError("no such checkpoint", "model")
        if how == "raise":
            raise RuntimeError("boom in the fake worker")
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "exit":
            sys.exit(3)
        if how == "hang":
            time.sleep(600)


class Answer:
    def __init__(self, worker, value):
        self.worker, self.value = worker, value

    def done(self) -> bool:
        return True

    def result(self) -> StepResult:
        self.worker.fault(-self.value.number)  # what only the wait for a device brings to light
        return self.value
