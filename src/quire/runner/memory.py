"""How many KV pages fit. Owns: the arithmetic from bytes to pages, and the words for a shortage. Measures nothing
itself but free memory."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from quire.config.schema import Config
from quire.runner.kv_store import page_bytes
from quire.types.errors import ClientError
from quire.types.kv import KVGroup, pages_needed

log = logging.getLogger(__name__)

GIB = 1 << 30


def num_host_blocks(config: Config, groups: tuple[KVGroup, ...], dtype: torch.dtype) -> int:
    """Host pages in `swap_space` GiB."""
    page = page_bytes(config.model.arch, groups, config.cache.block_size, dtype)
    return int(config.cache.swap_space * GIB) // page


def num_blocks(
    config: Config, groups: tuple[KVGroup, ...], dtype: torch.dtype, device: torch.device, mapped: int = 0
) -> int:
    """Device pages, after the model was loaded, `mapped` bytes of it from files: the system counts those as free.

    A given number or size is taken as it is. Else, on a GPU, what `gpu_memory_utilization` of its memory leaves beside
    everything in use; on a CPU at most half of the memory that is free beside the mapped weights, and never more than
    all rows at their longest could fill (pages that are not used cost nothing there).
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
    elif device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        budget = int(total * cache.gpu_memory_utilization) - (total - free)
        source = (
            f"gpu_memory_utilization={cache.gpu_memory_utilization} of {total / GIB:.1f} GiB, {free / GIB:.1f} free"
        )
    else:
        share = max(0, _free_host_memory() - mapped) // (2 * config.parallel.world_size)
        budget = min(share, longest * config.scheduler.max_num_seqs * page)
        source = "at most: half of the free memory, or what max_num_seqs sequences can fill; taken as it is used"
    count = budget // page
    log.info("KV cache: %d blocks of %d tokens, %.2f GiB (%s)", count, cache.block_size, count * page / GIB, source)
    if count < longest:
        raise ClientError(
            f"the KV cache gets {max(0, budget) / GIB:.2f} GiB ({source}), but one sequence of max_model_len="
            f"{config.model.max_model_len} tokens needs {longest * page / GIB:.2f} GiB: lower max_model_len, or give "
            "the cache more memory"
        )
    return count


def _free_host_memory() -> int:
    """Bytes that can be had without swapping; 8 GiB where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 8 * GIB
