"""From arguments to configuration: every "auto" becomes concrete here, once, with its reason in the log.

Owns: the rules (number types, lengths, budgets, depth, devices) and the checks that need the machine or the checkpoint.
Knows nothing of torch, nor of which architectures have an implementation (`models.choice` is asked).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from quire.config import hub
from quire.config.arch import ModelArch, architecture_of, token_ids
from quire.config.args import EngineArgs
from quire.config.pooling import pooling_kind, pooling_of, sentence_settings
from quire.config.schema import (
    CacheConfig,
    Config,
    DeviceConfig,
    LoadConfig,
    ModelConfig,
    ObservabilityConfig,
    ParallelConfig,
    SchedulerConfig,
    StructuredConfig,
)
from quire.plugins.models import ModelRegistry
from quire.types.errors import ClientError
from quire.utils.devices import Machine, probe
from quire.utils.logging import get_logger, level_name

log = get_logger(__name__)

GIB = 1 << 30
_DTYPES = {"float": "float32", "half": "float16"}


def resolve(args: EngineArgs, *, machine: Machine | None = None, usage: str = "llm") -> Config:
    """The configuration that `args` mean on `machine` (this one by default).

    `usage`: "llm" (offline: throughput first) or "server" (latency first) chooses the default budgets. Errors:
    `ClientError`, one line that names the argument and says what to change.
    """
    machine = machine or probe()
    device = _device(args, machine)
    source = hub.find_checkpoint(
        args.model,
        args.revision,
        args.download_dir,
        token=args.hf_token,
        weights=args.load_format != "dummy",
    )
    if source.is_file() and args.load_format != "dummy":
        raise ClientError(
            f"model={args.model!r} is a configuration without weights: give its folder, or load_format='dummy'",
            parameter="model",
            value=args.model,
        )
    raw = ModelRegistry.read_config(_overridden(hub.read_config(source), args.hf_overrides))
    if raw.get("quantization_config"):
        raise ClientError(
            f"the checkpoint {args.model!r} is quantized ({_quantization(raw)}), which is not yet in quire: "
            "give one in float32, bfloat16 or float16",
            parameter="model",
            value=args.model,
        )
    path = source.parent if source.is_file() else source
    generation = hub.read_generation_config(path)
    kind = pooling_kind(args, architecture_of(raw), path)
    arch, impl = _architecture(args, raw, path, kind is not None)
    # Chat models often name their end-of-turn token only in generation_config.json, base models only in config.json.
    eos = dict.fromkeys(arch.eos_token_ids + token_ids(generation.get("eos_token_id")))
    pooling = pooling_of(kind, args, raw, arch.architecture, path, impl == "encoder")
    stated = sentence_settings(path).get("max_seq_length") if pooling is not None else None
    max_model_len, arch = _lengths(args, replace(arch, eos_token_ids=tuple(eos)), stated)
    parallel = _parallel(args, device, machine)
    dtype = _dtype(args.dtype, raw, device, machine)
    if device == "cuda" and args.kv_cache_dtype == "int8":
        text = "kv_cache_dtype='int8' has no kernels on a GPU: leave it out, or use device='cpu'"
        raise ClientError(text, "kv_cache_dtype", "int8")
    cache = _cache(args, dtype, machine)
    scheduler = _scheduler(args, device, machine, max_model_len, parallel.world_size, usage)
    if pooling is not None and not pooling.causal:
        # Every token attends to every other: a prompt is computed in one step, and nothing of it is kept.
        most = max(max_model_len, scheduler.max_num_batched_tokens)
        scheduler = replace(scheduler, enable_chunked_prefill=False, max_num_batched_tokens=most)
        cache = replace(cache, enable_prefix_caching=False, swap_space=0.0)
    return Config(
        model=replace(_model(args, path, arch, dtype, max_model_len, generation), model_impl=impl),
        cache=cache,
        scheduler=scheduler,
        parallel=parallel,
        load=LoadConfig(load_format=args.load_format, download_dir=args.download_dir, revision=args.revision),
        device=DeviceConfig(
            device=device, threads=_threads(args, machine, parallel.world_size), ops=_ops(args, device, dtype)
        ),
        observability=ObservabilityConfig(
            disable_log_stats=args.disable_log_stats,
            log_level=level_name(args.log_level),
            log_format=args.log_format,
            log_interval=args.log_interval,
            nvtx=args.nvtx,
        ),
        structured=_structured(args),
        pooling=pooling,
    )


# Models lie above the configuration: which of them have an implementation is asked for by name, when it is asked.
CHOICE = "quire.models.choice"


def _architecture(args: EngineArgs, raw: dict[str, Any], path: Path, pools: bool) -> tuple[ModelArch, str]:
    """The architecture and whose code runs it: "quire", "transformers", or "encoder" for those that look ahead."""
    arch, impl = import_module(CHOICE).choose(raw, path, args.model_impl, args.trust_remote_code, pools)
    log.debug("model_impl=%s for %s", impl, arch.architecture)
    return arch, impl


def _structured(args: EngineArgs) -> StructuredConfig:
    given: dict[str, Any] = dict(args.structured_outputs_config or {})
    backend = given.pop("backend", "auto")
    if backend not in ("auto", "guidance"):
        text = f"structured_outputs_config: the backend {backend!r} is not in quire; it has guidance: leave it out"
        raise ClientError(text, "structured_outputs_config", backend)
    given = {k: v for k, v in given.items() if v is not None}
    own = given.pop("reasoning_parser", "") or args.reasoning_parser
    if args.reasoning_parser not in ("", own):
        text = f"reasoning_parser={args.reasoning_parser!r} contradicts structured_outputs_config's {own!r}"
        raise ClientError(text, "reasoning_parser", args.reasoning_parser)
    flags = ("enable_in_reasoning", "disable_any_whitespace", "disable_additional_properties")
    for key, value in given.items():
        if key not in flags or not isinstance(value, bool):
            text = f"structured_outputs_config: {key}={value!r} is not known; flags are {', '.join(flags)}"
            raise ClientError(text, "structured_outputs_config", value)
    return StructuredConfig(reasoning_parser=own, grammar_timeout=args.grammar_timeout, **given)


def _quantization(raw: Mapping[str, Any]) -> str:
    given: Any = raw["quantization_config"]
    return str(cast(Mapping[str, Any], given).get("quant_method")) if isinstance(given, Mapping) else str(given)


def _device(args: EngineArgs, machine: Machine) -> str:
    if args.device == "auto":
        device = "cuda" if machine.gpus else "cpu"
        log.debug("device=%s: %s", device, machine.gpus[0].name if machine.gpus else machine.no_gpu_reason)
        return device
    if args.device == "cuda" and not machine.gpus:
        raise ClientError(f"device='cuda' cannot be had: {machine.no_gpu_reason}; use device='cpu'", "device", "cuda")
    return args.device


# What gives a row the same bits in any batch, where the fastest implementation does not.
INVARIANT = {"linear": "invariant", "gated_linear": "invariant", "attention": "invariant"}


def _ops(args: EngineArgs, device: str, dtype: str) -> dict[str, str]:
    if not args.deterministic:
        return dict(args.ops)
    if device != "cuda":
        raise ClientError(
            "deterministic=True is for GPUs; leave it out on a CPU", parameter="deterministic", value=True
        )
    if args.quantization is not None:
        raise ClientError(
            f"deterministic=True has no kernels for quantization={args.quantization!r}: leave one of them out",
            parameter="deterministic",
            value=True,
        )
    if dtype == "float32":
        raise ClientError(
            "deterministic=True has no kernels for float32: say dtype='bfloat16' or 'float16'",
            parameter="deterministic",
            value=True,
        )
    return {**INVARIANT, **args.ops}


def _overridden(raw: dict[str, Any], overrides: Any) -> dict[str, Any]:
    if callable(overrides):
        changed: Any = overrides(raw)
        if not isinstance(changed, dict):
            raise ClientError("hf_overrides: the function must return the config as a dict", "hf_overrides")
        return cast(dict[str, Any], changed)
    return _merged(raw, overrides or {})


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`; objects inside are merged, so that one entry of rope_scaling can be changed."""
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            out[key] = _merged(cast(dict[str, Any], old), cast(dict[str, Any], value))
        else:
            out[key] = value
    return out


def _lengths(args: EngineArgs, arch: ModelArch, stated: int | None = None) -> tuple[int, ModelArch]:
    """max_model_len, and the windows that matter below it. `stated`: by sentence-transformers' file, if it is there."""
    longest = arch.max_supported_length if stated is None else min(stated, arch.max_supported_length)
    windows = [w for w in arch.sliding_windows if w is not None]
    if args.disable_sliding_window and windows:
        longest = min(longest, *windows)
        arch = replace(arch, sliding_windows=(None,) * arch.num_layers)
        log.info("max_model_len is at most %d: disable_sliding_window caps it at the window", longest)
    wanted = args.max_model_len
    if wanted in (None, -1, "auto"):
        length = longest
    else:
        assert isinstance(wanted, int), wanted  # EngineArgs turned "8k" into a number
        if wanted < 2:
            text = f"max_model_len={wanted} must be at least 2 (a token in, a token out), or -1 for auto"
            raise ClientError(text, "max_model_len", wanted)
        if wanted > longest:
            fix = "scale its rotary embedding with hf_overrides={'rope_scaling': {...}}, or " if arch.rope else ""
            raise ClientError(
                f"max_model_len={wanted} is more than the {longest} tokens that the checkpoint allows: "
                f"{fix}ask for at most {longest}",
                parameter="max_model_len",
                value=wanted,
            )
        length = wanted
    if any(w >= length for w in windows) and any(arch.sliding_windows):
        # A window that no sequence can fill is no window: one KV group less, and better prefix hits.
        kept = tuple(None if w is None or w >= length else w for w in arch.sliding_windows)
        arch = replace(arch, sliding_windows=kept)
        log.debug("sliding windows are off where max_model_len=%d does not exceed them", length)
    return length, arch


def _length_reason(args: EngineArgs, arch: ModelArch, length: int) -> str:
    """Where max_model_len comes from."""
    rope, longest = arch.rope, arch.max_supported_length
    allowed = f"{longest}, the max_position_embeddings of config.json"
    if rope is not None and longest != arch.max_position:
        base = arch.max_position if rope.kind != "yarn" else rope.original_max_position
        allowed = f"{longest}, {base} positions of config.json times {rope.factor:g} by rope scaling {rope.kind!r}"
    if args.max_model_len not in (None, -1, "auto"):
        return f"as asked for; the checkpoint allows {allowed}"
    if length < longest:
        return f"the sliding window, since disable_sliding_window is set; the checkpoint allows {allowed}"
    return f"what the checkpoint allows: {allowed}"


def stored_dtype(raw: Mapping[str, Any]) -> str:
    """The number type that config.json names, float32 where it names none."""
    stored = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    return _DTYPES.get(stored, stored)


def _asked_dtype(dtype: str, stored: str, device: str, machine: Machine) -> str:
    """What was asked for, with advice where it is seldom wanted."""
    if device == "cuda" and dtype == "bfloat16" and (gpu := machine.gpus[0]).capability < (8, 0):
        has = ".".join(map(str, gpu.capability))
        text = (
            f"dtype='bfloat16' needs a GPU of compute capability 8.0; {gpu.name} has {has}: use 'float16' or 'float32'"
        )
        raise ClientError(text, "dtype", dtype)
    if dtype == "float16" and device == "cpu":
        log.warning("dtype=float16: a CPU converts every number of it; bfloat16 is faster, float32 exact")
    elif dtype == "float16" and stored == "bfloat16":
        log.warning("dtype=float16: the checkpoint's bfloat16 reaches further, and may overflow; prefer bfloat16")
    return dtype


def _dtype(asked: str, raw: Mapping[str, Any], device: str, machine: Machine) -> str:
    stored = stored_dtype(raw)
    if asked != "auto":
        return _asked_dtype(_DTYPES.get(asked, asked), stored, device, machine)
    if device == "cpu":
        if stored == "float16":
            log.info(
                "dtype=bfloat16: CPUs do not compute in the checkpoint's float16 (float32 is exact, twice the size)"
            )
            return "bfloat16"
        if stored in ("float32", "bfloat16"):
            return stored
        log.info("dtype=float32: the checkpoint's %s is not one that a CPU computes in", stored)
        return "float32"
    modern = machine.gpus[0].capability >= (8, 0)
    if stored == "float16" or (stored == "bfloat16" and modern):
        return stored
    chosen = "bfloat16" if modern else "float16"
    log.info(
        "dtype=%s: what this GPU computes fast in; the checkpoint is %s (dtype=%r keeps it)", chosen, stored, stored
    )
    return chosen


def _parallel(args: EngineArgs, device: str, machine: Machine) -> ParallelConfig:
    size = args.tensor_parallel_size
    have = len(machine.gpus) if device == "cuda" else machine.cores
    if size > have:
        if device == "cuda":
            kind = f"{have} GPU{'s' if have != 1 else ''}"
        else:
            kind = f"no GPU ({machine.no_gpu_reason}) and {have} CPU core{'s' if have != 1 else ''}"
        raise ClientError(
            f"tensor_parallel_size={size} needs {size} devices; this machine has {kind}: "
            f"set tensor_parallel_size to at most {have}",
            parameter="tensor_parallel_size",
            value=size,
        )
    backend = args.distributed_executor_backend
    if backend == "uni" and size > 1:
        raise ClientError(
            f"distributed_executor_backend='uni' runs one worker, but tensor_parallel_size={size}: use 'mp'",
            parameter="distributed_executor_backend",
            value=backend,
        )
    return ParallelConfig(
        tensor_parallel_size=size,
        distributed_executor_backend=backend or ("mp" if size > 1 else "uni"),
    )


def _threads(args: EngineArgs, machine: Machine, workers: int) -> int:
    if args.threads is not None:
        return args.threads
    stated = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if stated.isdigit() and int(stated) > 0:
        log.debug("threads=%s: OMP_NUM_THREADS", stated)
        return int(stated)
    return max(1, machine.cores // workers)


def _cache(args: EngineArgs, dtype: str, machine: Machine) -> CacheConfig:
    if args.gpu_memory_utilization <= 0:
        raise ClientError(
            f"gpu_memory_utilization={args.gpu_memory_utilization!r} must be above 0 and at most 1",
            parameter="gpu_memory_utilization",
            value=args.gpu_memory_utilization,
        )
    swap = args.swap_space * args.tensor_parallel_size
    if machine.memory and swap * GIB > 0.9 * machine.memory:
        raise ClientError(
            f"swap_space={args.swap_space:g} GiB for each of {args.tensor_parallel_size} device(s) does not fit in "
            f"this machine's {machine.memory / GIB:.1f} GiB of memory: set it to at most "
            f"{int(0.9 * machine.memory / GIB / args.tensor_parallel_size)}",
            parameter="swap_space",
            value=args.swap_space,
        )
    memory = args.kv_cache_memory_bytes
    assert memory is None or isinstance(memory, int), memory
    return CacheConfig(
        block_size=args.block_size or 16,
        enable_prefix_caching=args.enable_prefix_caching is not False,
        gpu_memory_utilization=args.gpu_memory_utilization,
        num_gpu_blocks_override=args.num_gpu_blocks_override,
        kv_cache_memory_bytes=memory,
        swap_space=args.swap_space,
        kv_cache_dtype=dtype if args.kv_cache_dtype == "auto" else args.kv_cache_dtype,
    )


def default_budgets(device: str, machine: Machine, usage: str, world_size: int) -> tuple[int, int]:
    """(tokens, sequences) in a step: vLLM's defaults, because users notice where they differ. On a CPU fewer tokens: a
    step of 512 computes as fast as one of 4096, in an eighth of the memory, and keeps nobody waiting as long."""
    offline = usage == "llm"
    if device == "cpu":
        return 512 * world_size, (256 if offline else 128) * world_size
    gpu = machine.gpus[0]
    if gpu.memory >= 160 * GIB:
        return 16384, 1024
    if gpu.memory >= 70 * GIB and "a100" not in gpu.name.lower():
        return (16384 if offline else 8192), 1024
    return (8192 if offline else 2048), 256


def _scheduler(
    args: EngineArgs, device: str, machine: Machine, max_model_len: int, world_size: int, usage: str
) -> SchedulerConfig:
    chunked = args.enable_chunked_prefill is not False
    tokens, seqs = default_budgets(device, machine, usage, world_size)
    if args.max_num_batched_tokens is None:
        # Without chunks a prompt must fit in one step; and a step must hold a token of every sequence.
        tokens = max(tokens, args.max_num_seqs or 0, 0 if chunked else max_model_len)
        seqs = args.max_num_seqs or min(seqs, tokens)
    else:
        assert isinstance(args.max_num_batched_tokens, int), args.max_num_batched_tokens
        tokens = args.max_num_batched_tokens
        seqs = args.max_num_seqs or min(seqs, tokens)
    log.debug("max_num_batched_tokens=%d, max_num_seqs=%d on %s for %s", tokens, seqs, device, usage)
    if tokens < seqs:
        raise ClientError(
            f"max_num_batched_tokens={tokens} is less than max_num_seqs={seqs}: "
            "a step must hold a token of each sequence",
            parameter="max_num_batched_tokens",
            value=tokens,
        )
    if not chunked and tokens < max_model_len:
        raise ClientError(
            f"enable_chunked_prefill=False needs max_num_batched_tokens (now {tokens}) to be at least "
            f"max_model_len={max_model_len}: raise the one or lower the other",
            parameter="max_num_batched_tokens",
            value=tokens,
        )
    depth, lead, overlapped = _depth(args, device)
    return SchedulerConfig(
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        enable_chunked_prefill=chunked,
        scheduling_policy=args.scheduling_policy,
        depth=depth,
        lead=lead,
        target_step_ms=(20.0 if device == "cuda" and usage == "server" else 0.0)
        if args.target_step_ms is None
        else args.target_step_ms,
        async_scheduling=overlapped,
    )


def _depth(args: EngineArgs, device: str) -> tuple[int, int, bool]:
    """(depth, lead, overlapped). A CPU step leaves the host no core to plan on, so steps do not overlap there unless
    asked; a pipeline holds one plan per stage."""
    stages = args.pipeline_parallel_size
    overlapped = args.async_scheduling if args.async_scheduling is not None else device == "cuda" and stages == 1
    depth, lead = (2, 1) if overlapped else (1, 0)
    if stages > 1:
        depth, lead = stages, 0
    depth = args.depth if args.depth is not None else depth
    lead = args.lead if args.lead is not None else min(lead, depth - 1)
    log.debug("depth=%d, lead=%d on %s", depth, lead, device)
    return depth, lead, overlapped


def _model(
    args: EngineArgs, path: Path, arch: ModelArch, dtype: str, max_model_len: int, generation: Mapping[str, Any]
) -> ModelConfig:
    if args.max_logprobs > arch.vocab_size:
        raise ClientError(
            f"max_logprobs={args.max_logprobs} is more than the vocabulary's {arch.vocab_size} tokens; -1 means all",
            parameter="max_logprobs",
            value=args.max_logprobs,
        )
    names = args.served_model_name or args.model
    reason = _length_reason(args, arch, max_model_len)
    log.info("max_model_len=%d: %s", max_model_len, reason)
    return ModelConfig(
        model=args.model,
        path=path,
        tokenizer=args.tokenizer or str(path),
        tokenizer_mode=args.tokenizer_mode,
        tokenizer_revision=args.tokenizer_revision,
        skip_tokenizer_init=args.skip_tokenizer_init,
        trust_remote_code=args.trust_remote_code,
        dtype=dtype,
        seed=args.seed,
        max_model_len=max_model_len,
        max_model_len_reason=reason,
        arch=arch,
        hf_token=args.hf_token,
        chat_template=args.chat_template,
        generation_config=sampling_defaults(args, generation),
        max_logprobs=args.max_logprobs,
        logprobs_mode=args.logprobs_mode,
        logits_processors=tuple(args.logits_processors or ()),
        enforce_eager=args.enforce_eager,
        quantization=args.quantization,
        served_model_names=(names,) if isinstance(names, str) else tuple(names),
    )


# Those of generation_config.json that are sampling parameters, and their names in SamplingParams.
_SAMPLING_KEYS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def sampling_defaults(args: EngineArgs, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The default sampling parameters: the checkpoint's (or another folder's, or none), then the overrides."""
    match args.generation_config:
        case "auto":
            source = checkpoint
        case "quire" | "vllm":
            source: Mapping[str, Any] = {}
        case folder:
            if not Path(folder).is_dir():
                raise ClientError(
                    f"generation_config={folder!r} is no folder: give one, or 'auto', or 'quire'",
                    "generation_config",
                    folder,
                )
            source = hub.read_generation_config(Path(folder))
    merged = {**source, **(args.override_generation_config or {})}
    return {name: merged[key] for key, name in _SAMPLING_KEYS.items() if merged.get(key) is not None}
