"""How many KV pages fit. Owns: the arithmetic from bytes to pages, what a step takes on a GPU, and the words for a
shortage."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from torch import nn

from quire.config.schema import Config
from quire.layers.step import AttentionMeta, GroupMeta, Step
from quire.loading.passes import DTYPES
from quire.models.base import CausalLM
from quire.runner.estimate import CONTEXT, GIB
from quire.runner.graphs import decode_sizes
from quire.runner.kv_store import KVStore, page_bytes
from quire.types.errors import ClientError
from quire.types.kv import KVGroup, pages_needed
from quire.utils.devices import available_memory

log = logging.getLogger(__name__)


def num_host_blocks(config: Config, groups: tuple[KVGroup, ...], dtype: torch.dtype) -> int:
    """Host pages in `swap_space` GiB."""
    page = page_bytes(config.model.arch, groups, config.cache.block_size, dtype)
    return int(config.cache.swap_space * GIB) // page


@dataclass(frozen=True)
class Device:
    """A GPU's memory, in bytes. `weights`: of this engine. `step`: what its largest step takes beside. `free`: now,
    the weights being there; what others hold is theirs."""

    total: int
    free: int
    weights: int
    step: int

    def budget(self, share: float) -> int:
        """For the KV cache: what is left of this engine's share, or of the memory."""
        return min(int(self.total * share) - self.weights - CONTEXT, self.free) - self.step


def num_blocks(
    config: Config, groups: tuple[KVGroup, ...], dtype: torch.dtype, device: Device | None = None, mapped: int = 0
) -> int:
    """Device pages, after the model was loaded, `mapped` bytes of it from files: the system counts those as free.
    `device`: a GPU; None: the CPU.

    A given number or size is taken as it is. Else, on a GPU, what `gpu_memory_utilization` of its memory leaves beside
    this engine's own weights and largest step, as far as it is free; on a CPU at most half of the memory that is free
    beside the mapped weights, and never more than all rows at their longest could fill (pages that are not used cost
    nothing there).
    """
    cache, arch = config.cache, config.model.arch
    page = page_bytes(arch, groups, cache.block_size, dtype)
    if cache.num_gpu_blocks_override is not None:
        return cache.num_gpu_blocks_override
    longest = pages_needed(
        groups, config.model.max_model_len, config.scheduler.max_num_batched_tokens, cache.block_size
    )
    if cache.kv_cache_memory_bytes is not None:
        budget, source = cache.kv_cache_memory_bytes, f"kv_cache_memory_bytes={cache.kv_cache_memory_bytes}"
    elif device is not None:
        budget = device.budget(cache.gpu_memory_utilization)
        source = (
            f"gpu_memory_utilization={cache.gpu_memory_utilization} of {device.total / GIB:.1f} GiB, without "
            f"{device.weights / GIB:.2f} GiB of weights and {(device.step + CONTEXT) / GIB:.2f} GiB for steps and CUDA "
            f"itself; {device.free / GIB:.1f} GiB are free"
        )
    else:
        share = max(0, available_memory() - mapped) // (2 * config.parallel.world_size)
        budget = min(share, longest * config.scheduler.max_num_seqs * page)
        source = "at most: half of the free memory, or what max_num_seqs sequences can fill; taken as it is used"
    count = budget // page
    log.info("KV cache: %d blocks of %d tokens, %.2f GiB (%s)", count, cache.block_size, count * page / GIB, source)
    if count < longest:
        raise ClientError(
            f"the KV cache gets {max(0, budget) / GIB:.2f} GiB ({source}), but one sequence of max_model_len="
            f"{config.model.max_model_len} tokens needs {longest * page / GIB:.2f} GiB: "
            + _smallest_fix(config, device, longest * page - budget)
        )
    return count


def _smallest_fix(config: Config, device: Device | None, missing: int) -> str:
    """What to change so that `missing` bytes more are there."""
    if device is not None and config.cache.kv_cache_memory_bytes is None:
        share = config.cache.gpu_memory_utilization + missing / device.total
        if device.free - device.step >= missing and share <= 1:
            return f"set gpu_memory_utilization to {math.ceil(share * 1000) / 1000}, or lower max_model_len"
        if device.step >= missing:
            return "lower max_num_batched_tokens or max_model_len"
    return "lower max_model_len, or give the cache more memory"


def device_memory(
    model: nn.Module, config: Config, groups: tuple[KVGroup, ...], dtype: torch.dtype, device: torch.device, before: int
) -> Device:
    """Measured on a GPU that holds the model; `before`: bytes that torch had allocated there before it was loaded. Runs
    the largest step once; whether its kernels are launched makes no difference."""
    weights = torch.cuda.memory_allocated(device) - before
    torch.cuda.reset_peak_memory_stats(device)
    tokens, rows = config.scheduler.max_num_batched_tokens, config.scheduler.max_num_seqs
    arch = config.model.arch
    with torch.inference_mode():
        store = KVStore(arch, groups, 1, 0, config.cache.block_size, dtype, device)
        nowhere = torch.full((tokens,), -1, device=device)
        tables = torch.zeros((1, 1), dtype=torch.int32, device=device)
        meta = AttentionMeta(
            cu_q=torch.tensor([0, tokens], dtype=torch.int32, device=device),
            lengths_R=torch.zeros(1, dtype=torch.int32, device=device),
            q_lens=[tokens],
            max_q=tokens,
            max_len=config.cache.block_size,
            num_decodes=0,
            groups=tuple(GroupMeta(tables, nowhere) for _ in groups),
        )
        zeros = torch.zeros(tokens, dtype=torch.int64, device=device)
        hidden_TD = model(zeros, zeros, Step(zeros, meta, store.layers))
        if isinstance(model, CausalLM):
            logits_RV = model.compute_logits(hidden_TD[:rows], None)
            logits_RV.float()  # what a sampler changes is a copy
            del logits_RV
        else:
            hidden_TD.float()  # what is pooled
        del hidden_TD, store
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before - weights
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    # Logits of graphs live apart: those of each size of decode step, and one buffer for all others.
    graphs = (sum(decode_sizes(min(tokens, rows))) + rows) * arch.vocab_size * DTYPES[config.model.dtype].itemsize
    counts = rows * arch.vocab_size * torch.int32.itemsize  # of tokens, where every row has penalties
    return Device(total, free, weights, peak + (graphs + counts if isinstance(model, CausalLM) else 0))
