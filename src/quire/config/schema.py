"""The resolved configuration: what every component is handed, each its part, frozen.

Owns: the shape of `Config`. Every value is concrete: `resolve` (in `config/resolve.py`) makes it from the arguments
that the user gave (`config/args.py`, where the flags, the help texts and the checks are). Nothing here is "auto", and
nothing is measured: the number of KV blocks, say, is what the executor returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quire.config.arch import ModelArch
from quire.config.pooling import PoolingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The model and what its answers depend on.

    `path`: the checkpoint's folder. `tokenizer`: the folder or Hub id of the tokenizer. `dtype`: "float32",
    "bfloat16" or "float16". `generation_config`: the checkpoint's sampling defaults under `SamplingParams`' names.
    `registered`: implementations, as "module:Class" by architecture, that another process's program registered.
    """

    model: str
    path: Path
    tokenizer: str
    tokenizer_mode: str
    tokenizer_revision: str | None
    skip_tokenizer_init: bool
    trust_remote_code: bool
    dtype: str
    seed: int
    max_model_len: int
    arch: ModelArch
    hf_token: str | bool | None = field(default=None, repr=False)
    chat_template: str | None = None
    generation_config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    max_logprobs: int = 20
    logprobs_mode: str = "raw_logprobs"
    logits_processors: tuple[Any, ...] = ()
    enforce_eager: bool = False
    model_impl: str = "auto"
    quantization: str | None = None
    served_model_names: tuple[str, ...] = ()
    registered: Mapping[str, str] = field(default_factory=dict[str, str])
    max_model_len_reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """The KV cache. Sizes: `block_size` in tokens, `swap_space` in GiB of host memory per device,
    `kv_cache_memory_bytes` in bytes; `kv_cache_dtype` is concrete."""

    block_size: int = 16
    enable_prefix_caching: bool = True
    gpu_memory_utilization: float = 0.92
    num_gpu_blocks_override: int | None = None
    kv_cache_memory_bytes: int | None = None
    swap_space: float = 0.0
    kv_cache_dtype: str = "float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """What a step may hold, how long it may take in milliseconds (0: any time) and how many are in flight (`depth`),
    with `lead` sampled tokens of a sequence unknown to the host when it is planned again (0 or 1)."""

    max_num_seqs: int
    max_num_batched_tokens: int
    enable_chunked_prefill: bool = True
    scheduling_policy: str = "fcfs"
    depth: int = 1
    lead: int = 0
    target_step_ms: float = 0.0
    async_scheduling: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """How many devices share the work; `distributed_executor_backend` is "uni" (in this process) or "mp"."""

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    distributed_executor_backend: str = "uni"

    @property
    def world_size(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredConfig:
    """Structured outputs and the parsing of answers. `reasoning_parser`: a name of `quire.parsers.reasoning`, "" for
    none. `enable_in_reasoning`: constraints hold from the first token. `grammar_timeout`: seconds."""

    reasoning_parser: str = ""
    enable_in_reasoning: bool = False
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    grammar_timeout: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadConfig:
    """`load_format`: "auto" (safetensors, else .bin), "safetensors", "pt" or "dummy" (random weights)."""

    load_format: str = "auto"
    download_dir: str | None = None
    revision: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceConfig:
    """`device`: "cpu" or "cuda". `threads`: of the CPU's operations, per worker."""

    device: str = "cpu"
    threads: int = 1
    ops: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservabilityConfig:
    """`log_interval`: seconds between two lines of statistics."""

    disable_log_stats: bool = False
    log_level: str = "info"
    log_format: str = "text"
    log_interval: float = 10.0
    nvtx: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All of it. Passed down, never written: `dataclasses.replace` makes a changed copy. `pooling`: None for a model
    that generates."""

    model: ModelConfig
    cache: CacheConfig
    scheduler: SchedulerConfig
    parallel: ParallelConfig
    load: LoadConfig
    device: DeviceConfig
    observability: ObservabilityConfig
    structured: StructuredConfig = field(default_factory=StructuredConfig)
    pooling: PoolingConfig | None = None
