"""One rank: a model on a device, its KV tensors, and the plans that it runs. Owns: how these are made from a `Config`.

Knows nothing of scheduling or of other ranks' processes.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future
from typing import cast

import torch
from torch import nn

from quire.config.schema import Config
from quire.loading import load_model
from quire.loading.mapped import mapped_bytes
from quire.loading.passes import DTYPES
from quire.metrics.ranges import make_ranges
from quire.models.base import CausalLM, kv_groups
from quire.models.pooling import PoolingModel
from quire.ops.cache import COPY_PAGES
from quire.ops.dispatch import Binder
from quire.ops.native.bound import most_tokens
from quire.ops.native.kernels import ANY
from quire.ops.sampling import DRAW_STEP
from quire.ops.triton.ahead import Compiler, make_ahead
from quire.runner import estimate, memory
from quire.runner.compilers import GrammarCompilers
from quire.runner.graphs import Graphs
from quire.runner.kv_store import KVStore
from quire.runner.logits import load_processors
from quire.runner.model_runner import ModelRunner, Pending
from quire.runner.pooler import Pooler
from quire.runner.pooling_runner import EncoderRunner, Encodes, PendingPooled, PoolingRunner
from quire.runner.replay import make_replay
from quire.runner.replayed import NoReplay, Replay
from quire.runner.sampler import Sampler, SamplingOps
from quire.runner.table import Makes, RequestTable, State
from quire.types.errors import ClientError
from quire.types.kv import KVGroup
from quire.types.plan import Plan, StepResult

log = logging.getLogger(__name__)

KV_DTYPES = DTYPES | {"int8": torch.int8}


class Worker:
    """`num_blocks` and `num_host_blocks` KV pages for the layers of `kv_groups`.

    Raises `ClientError` for checkpoints that cannot be loaded and for memory that does not suffice.
    """

    def __init__(self, config: Config, rank: int = 0, world: int = 1) -> None:
        self._range = make_ranges(config.observability.nvtx, config.device.device)
        self._compilers = GrammarCompilers(config)
        self.device = torch.device(config.device.device)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", rank)
            torch.cuda.set_device(self.device)
        else:
            torch.set_num_threads(config.device.threads)
        ahead = make_ahead(self.device)
        arch, size = config.model.arch, config.cache.block_size
        dtype = DTYPES[config.model.dtype]
        self.ops = Binder(self.device, dtype, config.device.ops)
        gpu = self.device.type == "cuda"
        before = torch.cuda.memory_allocated(self.device) if gpu else 0
        if rank == 0:
            estimate.announce(config)
        model = load_model(config, self.device, self.ops)
        self._replay: Replay = NoReplay()
        self._runner: ModelRunner | PoolingRunner | EncoderRunner
        if config.pooling is not None and not config.pooling.causal:
            encoder = cast(Encodes, model)
            self.kv_groups: tuple[KVGroup, ...] = ()
            self.num_blocks = self.num_host_blocks = 0
            self._runner = EncoderRunner(encoder, Pooler(encoder, config.pooling, self.device), self.device)
            ahead.close()
            return
        self.kv_groups = kv_groups(arch, config.model.max_model_len)
        kv_dtype = KV_DTYPES[config.cache.kv_cache_dtype]
        ahead = ahead.serves(self.ops, kv_dtype)
        with ahead:
            there = memory.device_memory(model, config, self.kv_groups, kv_dtype, self.device, before) if gpu else None
        self.num_blocks = memory.num_blocks(config, self.kv_groups, kv_dtype, there, mapped_bytes(model))
        self.num_host_blocks = memory.num_host_blocks(config, self.kv_groups, kv_dtype)
        try:
            store = KVStore(
                arch, self.kv_groups, self.num_blocks, self.num_host_blocks, size, kv_dtype, self.device,
                self.ops.bind(COPY_PAGES),
            )  # fmt: skip
        except (RuntimeError, MemoryError) as error:
            raise ClientError(
                f"{self.num_blocks} KV blocks on the device and {self.num_host_blocks} on the host cannot be allocated "
                f"({str(error).splitlines()[0]}): lower gpu_memory_utilization, kv_cache_memory_bytes or swap_space"
            ) from error
        if isinstance(model, PoolingModel):
            self._runner = self._pooling(config, model, store)
        else:
            self._runner = self._sampling(config, cast(CausalLM, model), store, ahead)
        ahead.close()
        if not gpu:
            _leave_the_cores_to_native_threads(model, self.ops)

    def _sampling(self, config: Config, model: CausalLM, store: KVStore, ahead: Compiler) -> ModelRunner:
        arch, budget, depth = config.model.arch, config.scheduler.max_num_batched_tokens, config.scheduler.depth
        processors = load_processors(config.model.logits_processors, arch.vocab_size, self.device)
        sampler = Sampler(
            arch.vocab_size,
            self.device,
            config.model.max_logprobs,
            processors,
            config.model.logprobs_mode,
            SamplingOps.bound(self.ops),
            compilers=self._compilers,
        )
        table = self._table(config, sampler)
        eager = config.model.enforce_eager
        replay = make_replay(model, table, store, self.ops, self.device, budget, depth, eager)
        self._replay = replay
        draw_step = self.ops.bind(DRAW_STEP) if self.device.type == "cuda" else None
        runner = ModelRunner(model, store, table, sampler, replay, self.device, depth, draw_step)
        if isinstance(replay, Graphs):
            ahead.foresee(replay.foresee)
            log.info("%d sizes of steps were captured as graphs in %.1f s", *replay.prepare())
        return runner

    def _pooling(self, config: Config, model: PoolingModel, store: KVStore) -> PoolingRunner:
        assert config.pooling is not None
        pooler = Pooler(model, config.pooling, self.device)
        return PoolingRunner(model, store, self._table(config, pooler), pooler, self.device, config.scheduler.depth)

    def _table(self, config: Config, sampler: Makes[State]) -> RequestTable[State]:
        rows, length = config.scheduler.max_num_seqs, config.model.max_model_len
        return RequestTable(rows, length, config.cache.block_size, len(self.kv_groups), sampler, self.device)

    def submit(self, plan: Plan) -> Pending | PendingPooled:
        """Start a step; the result may be waited for later."""
        with self._range("step"):
            return self._runner.submit(plan)

    def execute(self, plan: Plan) -> StepResult:
        """Run a step to its end."""
        return self.submit(plan).result()

    def idle(self) -> bool:
        """Makes one more size of steps ready; False if all are."""
        return self._replay.prepare_next()

    def prepare(self, grammar: str, eos_token_ids: tuple[int, ...]) -> Future[None]:
        """Compile a grammar, which another process has tried, beside the steps; a row with it finds it made."""
        return self._compilers.prepare(grammar, eos_token_ids)


def _leave_the_cores_to_native_threads(model: nn.Module, ops: Binder) -> None:
    """After each parallel operation torch's threads spin for milliseconds, on the very cores that the native threads
    want next: a step of a 135M model took 17 ms instead of 10. Where every linear layer runs in the native library,
    whatever is left to torch is small, and one thread is enough for it."""
    chosen = {choice.chosen for choice in ops.report() if choice.op in ("linear", "quantized_linear", "attention")}
    if chosen == {"native"} and most_tokens(model) == ANY:
        torch.set_num_threads(1)
