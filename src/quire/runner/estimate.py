"""What a model will take, before it is loaded: weights by the checkpoint's headers, KV cache by the architecture.

Owns: that arithmetic, and its words for the log. It is an estimate: what is measured after loading (`memory.py`) rules.
Knows no torch, so that `quire inspect` answers at once.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass

from quire.config.files import Stored, checkpoint_files, headers
from quire.config.schema import Config
from quire.layers.groups import kv_groups
from quire.types.errors import ClientError
from quire.types.kv import KVGroup, pages_needed
from quire.utils.devices import Machine, available_memory, probe

log = logging.getLogger(__name__)

GIB = 1 << 30
CONTEXT = GIB  # what CUDA, its libraries' workspaces and the graphs' own memory take, about
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
_PARTS = (  # the first that fits a tensor's name
    ("head", r"(^|\.)(lm_head|embed_out|score|classifier)\."),
    ("embeddings", r"embed|(^|\.)(wte|wpe)\."),
    ("norms", r"norm|(^|\.)ln_?\w*\."),
    ("attention", r"attn|attention"),
    ("mlp", r"mlp|ffn|feed_forward|expert|gate_proj|up_proj|down_proj|(^|\.)(fc1|fc2|dense_\w+|up|down)\."),
)


def part_of(name: str) -> str:
    """Which part of a model a tensor belongs to, by its name."""
    return next((part for part, pattern in _PARTS if re.search(pattern, name)), "other")


@dataclass(frozen=True)
class Memory:
    """Bytes, about. `weights`: None where nothing tells before they are loaded. `token`: KV cache of one token of a
    sequence that no window bounds; `sequence`: of one of max_model_len tokens (both 0 for encoders, which keep none);
    `total`: of the device; `cache`: what is left for the KV cache."""

    weights: int | None
    token: int
    sequence: int
    total: int
    cache: int

    @property
    def sequences(self) -> int | None:
        """How many sequences of max_model_len tokens fit at once; None where nothing is kept of them."""
        return max(0, self.cache) // self.sequence if self.sequence else None


def stored_tensors(config: Config) -> list[Stored] | None:
    """The checkpoint's tensors by their headers; None where they have none (.bin files, random weights)."""
    if config.load.load_format == "dummy":
        return None
    files = checkpoint_files(config.model.path, config.load.load_format)
    return headers(files) if all(file.suffix == ".safetensors" for file in files) else None


def parameters(config: Config, tensors: Iterable[Stored]) -> dict[str, int]:
    """Parameters by part. A head that is tied to the embedding is none of its own."""
    tied = config.model.arch.tie_word_embeddings
    found: dict[str, int] = {}
    for tensor in tensors:
        part = part_of(tensor.name)
        if not (tied and part == "head"):
            found[part] = found.get(part, 0) + tensor.count
    return found


def weight_bytes(config: Config, tensors: Iterable[Stored]) -> int:
    """Bytes of the parameters once they are loaded, rounded where `quantization` says so."""
    model = config.model
    bits = {None: 0, "int8": 8, "int4": 4}[(model.quantization or "").removesuffix("_weight_only") or None]
    tied = model.arch.tie_word_embeddings
    total = 0
    for tensor in tensors:
        part = part_of(tensor.name)
        if tied and part == "head":
            continue
        if not bits or len(tensor.shape) < 2 or (part == "embeddings" and not tied):
            total += tensor.count * SIZES[model.dtype]
            continue
        wide = 8 if part in ("head", "embeddings") else bits
        scales = tensor.count // 32 if wide == 4 else tensor.count // tensor.shape[-1]
        total += tensor.count * wide // 8 + 4 * scales
    return total


def cached_groups(config: Config) -> tuple[KVGroup, ...]:
    """The layers whose keys and values are kept: none of an encoder's."""
    if config.pooling is not None and not config.pooling.causal:
        return ()
    return kv_groups(config.model.arch, config.model.max_model_len)


def page_bytes(config: Config, groups: tuple[KVGroup, ...]) -> int:
    """Of one page of the KV cache over the layers of a group, as `kv_store` lays it out."""
    arch, dtype = config.model.arch, config.cache.kv_cache_dtype
    row = (arch.head_dim + 3) // 4 * 4 + 4 if dtype == "int8" else arch.head_dim
    layers = max((len(group.layers) for group in groups), default=0)
    return layers * 2 * config.cache.block_size * arch.num_kv_heads * row * SIZES[dtype]


def memory(config: Config, machine: Machine, weights: int | None) -> Memory:
    """What `weights` bytes leave on the device of `machine` that the configuration is for."""
    model, cache, arch = config.model, config.cache, config.model.arch
    groups = cached_groups(config)
    page = page_bytes(config, groups)
    longest = pages_needed(groups, model.max_model_len, config.scheduler.max_num_batched_tokens, cache.block_size)
    held = weights or 0
    if config.device.device == "cpu":
        total = machine.memory
        # Mapped weights are the file's own pages, which count as free.
        left = max(0, available_memory() - held) // 2
    else:
        total = machine.gpus[0].memory
        rows, tokens = config.scheduler.max_num_seqs, config.scheduler.max_num_batched_tokens
        step = SIZES[model.dtype] * (
            rows * 4 * arch.vocab_size + tokens * 3 * (arch.hidden_size + arch.intermediate_size)
        )
        left = int(total * cache.gpu_memory_utilization) - held - CONTEXT - step
    if cache.kv_cache_memory_bytes is not None:
        left = cache.kv_cache_memory_bytes
    if cache.num_gpu_blocks_override is not None:
        left = cache.num_gpu_blocks_override * page
    return Memory(weights, len(groups) * page // cache.block_size, longest * page, total, left)


def announce(config: Config) -> None:
    """A line in the log, before the weights are read."""
    try:
        tensors = stored_tensors(config)
    except ClientError:  # loading will say so
        return
    machine = probe()
    if config.device.device != "cpu" and not machine.gpus:
        return
    found = memory(config, machine, None if tensors is None else weight_bytes(config, tensors))
    log.log(logging.INFO if found.cache > 0 else logging.WARNING, "%s", describe(found, config))


def describe(found: Memory, config: Config) -> str:
    """The estimate in words."""
    weights = (
        "weights of a size unknown before loading" if found.weights is None else f"{size(found.weights)} of weights"
    )
    where = "memory" if config.device.device == "cpu" else "GPU memory"
    if found.sequences is None:
        left = f"of {size(found.total)} of {where} some {size(max(0, found.cache))} are left"
        return f"about {weights} and no KV cache; {left}"
    fits = "no sequence" if not found.sequences else f"{found.sequences} sequence{'s' if found.sequences > 1 else ''}"
    return (
        f"about {weights}, {size(found.token)} of KV cache a token; of {size(found.total)} of {where} some "
        f"{size(max(0, found.cache))} are left for the cache: {fits} of max_model_len={config.model.max_model_len} "
        f"tokens ({size(found.sequence)}) at a time, shorter ones more"
    )


def size(count: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
