"""One worker in this process: no threads, no copies. Owns nothing but the worker."""

from __future__ import annotations

from concurrent.futures import Future

from quire.config.schema import Config
from quire.executor.base import Executor, Result
from quire.runner.worker import Worker
from quire.types.plan import Plan, StepResult


class _Failed:
    def __init__(self, error: Exception) -> None:
        self._error = error

    def result(self) -> StepResult:
        raise self._error

    def done(self) -> bool:
        return True


class LocalExecutor:
    def __init__(self, config: Config) -> None:
        self.worker: Worker | None = Worker(config)
        self.num_blocks = self.worker.num_blocks
        self.num_host_blocks = self.worker.num_host_blocks
        self.kv_groups = self.worker.kv_groups

    def submit(self, plan: Plan) -> Result:
        assert self.worker is not None, "the executor is shut down"
        try:
            return self.worker.submit(plan)
        except Exception as error:
            return _Failed(error)

    def prepare(self, grammar: str, eos_token_ids: tuple[int, ...]) -> Future[None]:
        assert self.worker is not None, "the executor is shut down"
        return self.worker.prepare(grammar, eos_token_ids)

    def idle(self) -> bool:
        return self.worker is not None and self.worker.idle()

    def shutdown(self) -> None:
        self.worker = None  # the model's memory goes with it


def make_executor(config: Config) -> Executor:
    """The executor that the configuration asks for."""
    if config.parallel.distributed_executor_backend == "mp" or config.parallel.world_size > 1:
        from quire.executor.multiproc import MultiprocExecutor

        return MultiprocExecutor(config)
    return LocalExecutor(config)
