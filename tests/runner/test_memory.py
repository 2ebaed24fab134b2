"""How many pages fit: what is given is taken, what is not is measured, and a shortage says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from quire import LLM
from quire.config.schema import (
    CacheConfig,
    Config,
    DeviceConfig,
    LoadConfig,
    ModelConfig,
    ObservabilityConfig,
    ParallelConfig,
    SchedulerConfig,
)
from quire.core.scheduler import Scheduler
from quire.loading.mapped import mapped_bytes
from quire.runner import memory
from quire.runner.kv_store import page_bytes
from quire.types.errors import ClientError
from quire.types.kv import KVGroup

from .plans import tiny_arch

CPU = torch.device("cpu")
FULL = (KVGroup("full", (0, 1)),)
SLIDING = (KVGroup("sliding", (0, 1), 8),)
MIX = (KVGroup("full", (0,)), KVGroup("sliding", (1,), 8))
PAGE = 2 * 2 * 4 * 4 * 4  # layers, keys and values, tokens, head size, bytes


def config(length: int = 64, chunk: int = 16, seqs: int = 3, world: int = 1, **cache: Any) -> Config:
    model = ModelConfig(
        model="m", path=Path("m"), tokenizer="m", tokenizer_mode="auto", tokenizer_revision=None,
        skip_tokenizer_init=False, trust_remote_code=False, dtype="float32", seed=0, max_model_len=length,
        arch=tiny_arch(2),
    )  # fmt: skip
    return Config(
        model=model,
        cache=CacheConfig(**{"block_size": 4, **cache}),
        scheduler=SchedulerConfig(max_num_seqs=seqs, max_num_batched_tokens=chunk),
        parallel=ParallelConfig(tensor_parallel_size=world),
        load=LoadConfig(),
        device=DeviceConfig(),
        observability=ObservabilityConfig(),
    )


def count(groups: tuple[KVGroup, ...] = FULL, device: memory.Device | None = None, **options: Any) -> int:
    return memory.num_blocks(config(**options), groups, torch.float32, device)


def test_a_page_is_as_large_as_the_arithmetic_here_says() -> None:
    assert page_bytes(tiny_arch(2), FULL, 4, torch.float32) == PAGE


def test_a_given_number_is_taken_as_it_is() -> None:
    assert count(num_gpu_blocks_override=5) == 5, "the scheduler will say if that is too few"
    assert count(num_gpu_blocks_override=77, kv_cache_memory_bytes=1) == 77


def test_given_bytes_are_whole_pages() -> None:
    assert count(kv_cache_memory_bytes=20 * PAGE) == 20
    assert count(kv_cache_memory_bytes=21 * PAGE - 1) == 20


def test_a_cpu_takes_half_of_what_is_free_but_no_more_than_all_rows_can_fill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 40 * PAGE)
    assert count() == 20
    assert count(length=32, world=2) == 10, "ranks share the memory"
    monkeypatch.setattr(memory, "available_memory", lambda: 1 << 40)
    assert count() == 3 * 16, "three sequences of 64 tokens"


def test_mapped_weights_are_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system counts pages of files as memory that can be had."""
    monkeypatch.setattr(memory, "available_memory", lambda: 64 * PAGE)
    assert memory.num_blocks(config(), FULL, torch.float32, mapped=24 * PAGE) == 20
    with pytest.raises(ClientError, match=r"gets 0\.00 GiB"):
        memory.num_blocks(config(), FULL, torch.float32, mapped=65 * PAGE)
    assert memory.num_blocks(config(kv_cache_memory_bytes=20 * PAGE), FULL, torch.float32, mapped=1 << 40) == 20


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_the_worker_subtracts_what_stays_mapped(quantization: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    plain = memory.num_blocks

    def watched(*args: Any) -> int:
        taken.append(args[4])
        return plain(*args)

    monkeypatch.setattr(memory, "num_blocks", watched)
    with LLM("demo", skip_tokenizer_init=True, quantization=quantization) as llm:
        client: Any = llm.llm_engine.client
        model = client._executor.worker._runner._model
        held = {id(p): p.nbytes for p in model.parameters()}
    assert taken == [mapped_bytes(model)]
    assert 0 < taken[0] <= sum(held.values())
    assert taken[0] > 1 << 20 or quantization == "int8"


def test_memory_that_is_not_there_is_refused_in_one_line() -> None:
    with pytest.raises(ClientError, match=r"cannot be allocated \(\d+ bytes cannot be had\): lower"):
        LLM("demo", kv_cache_memory_bytes="200T", skip_tokenizer_init=True)


def test_a_sliding_group_needs_its_window_and_a_chunk_only() -> None:
    """7 pages: ceil((8 + 16) / 4), and one more since a window begins anywhere in a page. The rest would be idle."""
    assert memory.num_blocks(config(kv_cache_memory_bytes=7 * PAGE), SLIDING, torch.float32) == 7
    with pytest.raises(ClientError):
        memory.num_blocks(config(kv_cache_memory_bytes=7 * PAGE - 1), SLIDING, torch.float32)
    half = PAGE // 2  # a page runs through one layer of each group
    assert memory.num_blocks(config(kv_cache_memory_bytes=(16 + 7) * half), MIX, torch.float32) == 23
    with pytest.raises(ClientError):
        memory.num_blocks(config(kv_cache_memory_bytes=(16 + 7) * half - 1), MIX, torch.float32)


def test_a_large_chunk_needs_no_more_than_the_whole_sequence() -> None:
    assert count(SLIDING, chunk=10_000, kv_cache_memory_bytes=16 * PAGE) == 16


def test_what_suffices_is_what_the_scheduler_asks_for() -> None:
    for groups in (FULL, SLIDING, MIX):
        page = page_bytes(tiny_arch(2), groups, 4, torch.float32)
        for blocks in range(30):
            try:
                memory.num_blocks(config(kv_cache_memory_bytes=blocks * page), groups, torch.float32)
            except ClientError:
                with pytest.raises(ClientError):
                    Scheduler(groups, blocks, 4, 3, 16, 64)
            else:
                Scheduler(groups, blocks, 4, 3, 16, 64)


def test_a_shortage_says_what_is_there_what_is_needed_and_what_to_change() -> None:
    with pytest.raises(ClientError) as caught:
        count(length=1 << 24, kv_cache_memory_bytes=memory.GIB // 4)
    text = str(caught.value)
    assert "0.25 GiB" in text and "kv_cache_memory_bytes=268435456" in text
    assert f"max_model_len={1 << 24}" in text and "1.00 GiB" in text
    assert "lower max_model_len" in text and "\n" not in text


def test_a_gpu_gives_what_the_share_leaves_beside_weights_and_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CONTEXT", 10 * PAGE)
    assert (
        count(device=memory.Device(1000 * PAGE, 900 * PAGE, 200 * PAGE, 90 * PAGE), gpu_memory_utilization=0.8) == 500
    )


def test_what_others_hold_on_a_gpu_counts_only_where_it_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CONTEXT", 0)
    mostly_free = memory.Device(1000 * PAGE, 700 * PAGE, 200 * PAGE, 100 * PAGE)
    crowded = memory.Device(1000 * PAGE, 300 * PAGE, 200 * PAGE, 100 * PAGE)
    assert count(device=mostly_free, gpu_memory_utilization=0.8) == 500
    assert count(device=crowded, gpu_memory_utilization=0.8) == 200


@pytest.mark.parametrize(
    ("device", "advice"),
    [
        (memory.Device(1000 * PAGE, 900 * PAGE, 200 * PAGE, 90 * PAGE), r"set gpu_memory_utilization to 0\.3\d\d, or"),
        (memory.Device(1000 * PAGE, 95 * PAGE, 200 * PAGE, 90 * PAGE), "lower max_num_batched_tokens or max_model_len"),
        (memory.Device(1000 * PAGE, 3 * PAGE, 200 * PAGE, 2 * PAGE), "lower max_model_len, or give"),
    ],
)
def test_a_shortage_on_a_gpu_says_the_smallest_fix(
    device: memory.Device, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "CONTEXT", 0)
    with pytest.raises(ClientError, match=advice) as caught:
        count(device=device, gpu_memory_utilization=0.3)
    assert "weights" in str(caught.value) and "are free" in str(caught.value)
    if "set gpu" in advice:
        share = float(str(caught.value).split("gpu_memory_utilization to ")[1].split(",")[0])
        assert count(device=device, gpu_memory_utilization=share) >= 16, "what it says is enough"


def test_the_host_gets_whole_pages_of_its_swap_space() -> None:
    def host(space: float) -> int:
        return memory.num_host_blocks(config(swap_space=space), FULL, torch.float32)

    assert host(0.0) == 0
    assert host(10.5 * PAGE / memory.GIB) == 10


def test_free_memory_is_read_from_the_system() -> None:
    assert 0 < memory.available_memory() < 1 << 60
