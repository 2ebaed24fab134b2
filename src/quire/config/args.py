"""The arguments that a user gives: `EngineArgs`, under vLLM's names.

Owns: each argument's name, type, default, help text, choices and bounds, once; `LLM(**kwargs)`, the command line's
flags, `--help` and docs/configuration.md derive from it. Knows nothing of the machine or of the model: what is checked
here can be checked without looking at either (`config/resolve.py` does the rest).

An argument either works, or is accepted because leaving it without effect harms nobody (`harmless` says why), or has
`later`: it belongs to something that quire cannot do yet, and any value but the default is refused with that reason.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, cast, get_type_hints

import msgspec

from quire.config.foreign import FOREIGN
from quire.types.errors import ClientError

GROUPS = (
    "Model",
    "Loading",
    "KV cache",
    "Scheduler",
    "Parallel",
    "Device",
    "Structured output",
    "Observability",
    "Server",
    "Not yet in quire",
)


@dataclass(frozen=True, slots=True)
class Spec:
    """What an argument's field carries beside its type and default. `low`, `high`: inclusive bounds of numbers.
    `human`: integers may be written "8k" (8,000) or "1M"; capital K, M, G, T mean powers of 1,024, as in vLLM.
    `secret`: texts that no message shows, and none of which may be blank."""

    help: str
    group: str
    choices: tuple[str, ...] | None = None
    low: float | None = None
    high: float | None = None
    human: bool = False
    flag: bool = True
    harmless: str | None = None
    later: str | None = None
    secret: bool = False


def arg(default: Any, help: str, group: str, **spec: Any) -> Any:
    """A field of an arguments class."""
    metadata = {"spec": Spec(help=help, group=group, **spec)}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(cast(Mapping[str, Any], default)), metadata=metadata)
    return field(default=default, metadata=metadata)


def later(default: Any, what: str) -> Any:
    """An argument of something that quire cannot do yet."""
    return arg(default, f"Refused for now: {what}.", "Not yet in quire", later=what)


@dataclass(frozen=True, kw_only=True)
class _Checked:
    """Names, types, choices and bounds are checked when the arguments are made."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # Before the generated __init__ could raise its TypeError, so that a wrong name gets a helpful answer.
        known = specs(cls)
        for name, value in kwargs.items():
            if name not in known:
                raise unknown_argument(name, known, value)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, (hint, spec, default) in specs(type(self)).items():
            given = getattr(self, name)
            # None means "the default" everywhere, as it does in vLLM's signatures.
            value = default if given is None else _normal(name, given, hint, spec)
            if spec.later is not None and value != default:
                raise ClientError(f"{name}={value!r} is not supported: {spec.later}", name, value)
            object.__setattr__(self, name, value)


@dataclass(frozen=True, kw_only=True)
class EngineArgs(_Checked):
    """Everything that `LLM(...)`, `AsyncLLM` and the command line take to make an engine. Frozen; checked when made.

    Errors: `ClientError` for a name that does not exist (naming the nearest), a value of the wrong type, out of
    bounds or not among the choices, and for what quire cannot do yet.
    """

    # fmt: off
    model: str = arg("demo", "A folder in Hugging Face's checkpoint layout, a Hub id, or `demo`: the bundled model. A config.json serves with load_format=dummy.", "Model")
    tokenizer: str | None = arg(None, "Folder or Hub id of the tokenizer; the model's own by default.", "Model")
    tokenizer_mode: str = arg("auto", "`auto` reads tokenizer.json where there is one, else goes through Transformers; `hf` always goes through Transformers; `slow` takes its Python tokenizers.", "Model", choices=("auto", "hf", "slow"))
    tokenizer_revision: str | None = arg(None, "Branch, tag or commit of a tokenizer on the Hub.", "Model")
    skip_tokenizer_init: bool = arg(False, "Run without a tokenizer: token ids in, token ids out.", "Model")
    trust_remote_code: bool = arg(False, "Allow Python code that comes with a checkpoint (its model, its tokenizer) to run.", "Model")
    revision: str | None = arg(None, "Branch, tag or commit of the model on the Hub.", "Model")
    hf_token: str | bool | None = arg(None, "Token for private or gated models on the Hub; HF_TOKEN and the stored login are used by default.", "Model")
    hf_overrides: dict[str, Any] | Callable[..., Any] = arg({}, "Entries that replace those of config.json (nested objects are merged), or in Python a function from the config dict to a new one.", "Model")
    dtype: str = arg("auto", "Number type of weights and activations. `auto` is the checkpoint's own where the device computes in it well.", "Model", choices=("auto", "float32", "float", "bfloat16", "float16", "half"))
    seed: int = arg(0, "Seed from which requests without a seed of their own draw theirs, in the order of submission.", "Model")
    max_model_len: int | str | None = arg(None, "Longest sequence, prompt and output together, in tokens; -1 or `auto` is what the checkpoint allows. May be written 8k or 1M.", "Model", human=True)
    chat_template: str | None = arg(None, "Chat template (Jinja text, or a file) that replaces the tokenizer's.", "Model")
    generation_config: str = arg("auto", "Where sampling defaults come from: `auto` (the checkpoint's generation_config.json), a folder, or `quire` (none).", "Model")
    override_generation_config: dict[str, Any] = arg({}, "Sampling defaults that replace those of generation_config.", "Model")
    max_logprobs: int = arg(20, "Most logprobs per position that a request may ask for; -1 is the whole vocabulary.", "Model", low=-1)
    logprobs_mode: str = arg("raw_logprobs", "What logprobs hold: of the model's own logits, or after the processors; logprobs or the logits themselves.", "Model", choices=("raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"))
    logits_processors: list[Any] | None = arg(None, "Logits processors of the whole engine: classes, or names `module:Class`.", "Model")
    served_model_name: str | list[str] | None = arg(None, "Name or names under which the model is known to clients.", "Model")
    model_impl: str = arg("auto", "Whose code runs the model: quire's own class (`quire`, or `vllm` as an alias), or the model's own from Transformers; `auto` takes the first where there is one.", "Model", choices=("auto", "quire", "vllm", "transformers"))
    quantization: str | None = arg(None, "Round the weights when they are loaded: `int8` or `int4` (activations rounded to 8 bits as well), or either with `_weight_only`. Checkpoints that are quantized already are not yet read.", "Model", choices=("int8", "int8_weight_only", "int4", "int4_weight_only"))
    runner: str = arg("auto", "What the model is for: `generate` text, or `pooling`: embeddings, classes, scores. `auto` goes by the architecture and by sentence-transformers' files beside it.", "Model", choices=("auto", "generate", "pooling"))
    convert: str = arg("auto", "What a model that pools gives: `embed` makes an embedder of one that generates, `classify` takes its head for classes (or tokens, with classifier_from_token in hf_overrides). `auto` is what the checkpoint is.", "Model", choices=("auto", "none", "embed", "classify"))
    pooler_config: dict[str, Any] | None = arg(None, "How hidden states are pooled, instead of what the checkpoint says: `pooling_type` (LAST, CLS, MEAN, MAX), `use_activation`, `dimensions`, `task`, `logit_mean`, `logit_sigma`.", "Model")
    override_pooler_config: dict[str, Any] | None = arg(None, "An older name of pooler_config.", "Model")
    task: str = arg("auto", "An older way to say runner and convert.", "Model", choices=("auto", "generate", "embed", "embedding", "classify", "score", "reward"))
    enforce_eager: bool = arg(False, "Never use CUDA graphs.", "Model")

    load_format: str = arg("auto", "`auto` takes safetensors, else .bin files; `dummy` fills the model with random numbers, for benchmarks.", "Loading", choices=("auto", "safetensors", "pt", "dummy"))
    download_dir: str | None = arg(None, "Folder of the Hub's cache.", "Loading")

    block_size: int | None = arg(None, "Tokens in a KV cache block; 16 by default.", "KV cache", low=1, high=4096)
    enable_prefix_caching: bool | None = arg(None, "Reuse the cached blocks of a prefix that requests share; on by default.", "KV cache")
    gpu_memory_utilization: float = arg(0.92, "Share of a device's memory that the engine may take, above 0 up to 1.", "KV cache", low=0.0, high=1.0)
    num_gpu_blocks_override: int | None = arg(None, "Number of KV cache blocks, instead of what fits.", "KV cache", low=1)
    kv_cache_memory_bytes: int | str | None = arg(None, "Bytes of the KV cache on each device, instead of what gpu_memory_utilization leaves. May be written 4G.", "KV cache", human=True, low=1)
    swap_space: float = arg(0.0, "GiB of host memory for each device, for the blocks of preempted sequences and of the evicted prefix cache.", "KV cache", low=0.0)
    kv_cache_dtype: str = arg("auto", "Number type of the KV cache; `auto` is the model's; `int8` has a scale for each token and head, and takes half the memory of bfloat16.", "KV cache", choices=("auto", "float32", "bfloat16", "float16", "int8"))
    disable_sliding_window: bool = arg(False, "Ignore the model's sliding window and cap the length at it instead.", "KV cache")

    max_num_seqs: int | None = arg(None, "Most sequences in a step. The default depends on the device and the usage.", "Scheduler", low=1)
    max_num_batched_tokens: int | str | None = arg(None, "Most tokens in a step. The default depends on the device and the usage. May be written 8k.", "Scheduler", human=True, low=1)
    enable_chunked_prefill: bool | None = arg(None, "Let a prompt be computed in pieces that fit beside the decoding sequences; on by default.", "Scheduler")
    scheduling_policy: str = arg("fcfs", "`fcfs`: first come, first served; `priority`: the lower a request's priority value, the earlier.", "Scheduler", choices=("fcfs", "priority"))
    target_step_ms: float | None = arg(None, "Milliseconds that a step may take: prompts come in pieces that keep to it while other requests decode. 0: no target. Default: 20 for a server on a GPU, else 0.", "Scheduler", low=0)
    async_scheduling: bool | None = arg(None, "Plan the next step while the device runs this one; on by default on a GPU.", "Scheduler")
    depth: int | None = arg(None, "Steps in flight, instead of what async_scheduling says.", "Scheduler", low=1, high=64)
    lead: int | None = arg(None, "Sampled tokens of a sequence (0 or 1) that may be unknown to the host when it is planned again.", "Scheduler", low=0, high=1)

    tensor_parallel_size: int = arg(1, "Devices that share each layer.", "Parallel", low=1)
    distributed_executor_backend: str | None = arg(None, "Where the workers run: `uni` in this process, `mp` in processes of their own. By default `uni` for one device.", "Parallel", choices=("uni", "mp"))
    disable_custom_all_reduce: bool = arg(False, "Accepted.", "Parallel", harmless="quire has no custom all-reduce to disable")
    enable_expert_parallel: bool = arg(False, "Accepted.", "Parallel", harmless="it concerns mixture-of-experts models only")
    max_parallel_loading_workers: int | None = arg(None, "Accepted.", "Parallel", harmless="weights are streamed, so that loading needs little memory anyway")

    device: str = arg("auto", "`auto` is the GPU where PyTorch can use one, else the CPU.", "Device", choices=("auto", "cpu", "cuda"))
    threads: int | None = arg(None, "CPU threads of a worker; by default OMP_NUM_THREADS, else the physical cores at hand.", "Device", low=1, high=4096)

    deterministic: bool = arg(False, "On a GPU: the same tokens, bit for bit, whatever else is in the batch, however prompts are cut and whatever the prefix cache holds; costs some speed.", "Device")
    ops: dict[str, Any] = arg({}, "Implementations that must be used, by operation (`*`: all others), as `quire env` lists them; say {\"*\": \"reference\"} for plain PyTorch.", "Device")

    reasoning_parser: str = arg("", "How the reasoning of a model's answers is told from their content: deepseek_r1, qwen3, `tags:<start>,<end>`, or the name of a plugin. Structured outputs then begin when the reasoning has ended.", "Structured output")
    structured_outputs_config: dict[str, Any] | None = arg(None, "Of vLLM's keys: `disable_any_whitespace`, `disable_additional_properties`, `reasoning_parser`, `enable_in_reasoning` (constraints hold from the first token), `backend` (`auto` or `guidance`).", "Structured output")
    grammar_timeout: float = arg(1.0, "Seconds of CPU time that compiling the grammar of a request may take; it is refused beyond.", "Structured output", low=0.01)

    disable_log_stats: bool = arg(False, "No periodic line of statistics.", "Observability")
    log_level: str | None = arg(None, "Level of the log; QUIRE_LOG_LEVEL, else `info`, by default.", "Observability", choices=("debug", "info", "warning", "error", "critical"))
    log_format: str = arg("text", "What a line of the log is: text for people, or a JSON object with time, level, message, request id and numbers by name.", "Observability", choices=("text", "json"))
    nvtx: bool = arg(False, "Mark the parts of each step with NVTX ranges, for Nsight Systems; without effect on a CPU.", "Observability")
    log_interval: float = arg(10.0, "Seconds between two lines of statistics.", "Observability", low=0.0)

    limit_mm_per_prompt: dict[str, Any] = arg({}, "Accepted.", "Not yet in quire", harmless="models are text-only for now: no prompt has images")
    mm_processor_kwargs: dict[str, Any] | None = arg(None, "Accepted.", "Not yet in quire", harmless="models are text-only for now")
    allowed_local_media_path: str = arg("", "Accepted.", "Not yet in quire", harmless="models are text-only for now: no media is read")
    max_loras: int = arg(1, "Accepted.", "Not yet in quire", harmless="it only matters with enable_lora", low=1)
    max_lora_rank: int = arg(16, "Accepted.", "Not yet in quire", harmless="it only matters with enable_lora", low=1)
    pipeline_parallel_size: int = later(1, "pipeline parallelism is not yet in quire: leave it at 1")
    data_parallel_size: int = later(1, "data parallelism is not yet in quire: leave it at 1, and start one engine per device")
    nnodes: int = later(1, "running on several nodes is not yet in quire: leave it at 1")
    cpu_offload_gb: float = later(0.0, "offloading weights to the host is not yet in quire: leave it at 0")
    enable_lora: bool = later(False, "LoRA is not yet in quire: merge the adapter into the checkpoint")
    speculative_config: dict[str, Any] | None = later(None, "speculative decoding is not yet in quire")
    spec_method: str | None = later(None, "speculative decoding is not yet in quire")
    spec_model: str | None = later(None, "speculative decoding is not yet in quire")
    spec_tokens: int | None = later(None, "speculative decoding is not yet in quire")
    enable_prompt_embeds: bool = later(False, "prompt embeddings are not yet in quire: pass text or token ids")
    enable_sleep_mode: bool = later(False, "sleep mode is not yet in quire")
    profiler_config: dict[str, Any] | None = later(None, "quire serve has --profiler-dir, with /start_profile and /stop_profile; around LLM, put torch.profiler.profile()")
    kv_transfer_config: dict[str, Any] | None = later(None, "moving KV caches between engines is not yet in quire")
    # fmt: on


AsyncEngineArgs = EngineArgs  # vLLM's name for those of AsyncLLM


@dataclass(frozen=True, kw_only=True)
class ServerArgs(_Checked):
    """The arguments of the HTTP front beside the engine's: parsed by the same machinery, read by the server."""

    # fmt: off
    host: str | None = arg(None, "Address to listen on; by default all.", "Server")
    port: int = arg(8000, "Port to listen on; 0 takes a free one.", "Server", low=0, high=65535)
    uds: str | None = arg(None, "Unix socket to listen on, instead of host and port.", "Server")
    api_key: list[str] | None = arg(None, "Keys of which a client must present one, as `Authorization: Bearer KEY`; /health, /ready and /ping need none.", "Server", secret=True)
    ssl_keyfile: str | None = arg(None, "Private key for HTTPS.", "Server")
    ssl_certfile: str | None = arg(None, "Certificate for HTTPS.", "Server")
    root_path: str = arg("", "Path under which a proxy serves this server.", "Server")
    allowed_origins: list[str] | None = arg(None, "Web origins that browsers may send requests from; none by default.", "Server")
    allowed_methods: list[str] | None = arg(None, "Methods that those origins may use; all by default.", "Server")
    allowed_headers: list[str] | None = arg(None, "Headers that those origins may use; all by default.", "Server")
    allow_credentials: bool = arg(False, "Let those origins send cookies.", "Server")
    max_request_bytes: int | str = arg(8 << 20, "Longest request body; a longer one is answered with 413. May be written 8M.", "Server", human=True, low=1)
    request_timeout: float = arg(60.0, "Seconds within which a request's body must arrive.", "Server", low=0.1)
    max_prompt_tokens: int | None = arg(None, "Longest prompt in tokens, if shorter than the model allows.", "Server", low=1)
    max_num_queued_reqs: int | None = arg(None, "Most sequences that may wait; then requests are answered with 429.", "Server", low=0)
    max_num_queued_tokens: int | None = arg(None, "Most prompt tokens that may wait; then requests are answered with 429.", "Server", low=0)
    shutdown_timeout: float = arg(30.0, "Seconds for running requests to end after SIGTERM, before they are ended.", "Server", low=0.0)
    health_stall_timeout: float = arg(60.0, "Seconds without progress on waiting work after which /health is 503.", "Server", low=0.1)
    engine_stall_timeout: float = arg(180.0, "Seconds without progress on waiting work after which the engine's process is killed and started again, and its requests go on from their tokens; 0: never.", "Server", low=0.0)
    chat_template_content_format: str = arg("auto", "Whether templates get a message's content as text or as a list of parts.", "Server", choices=("auto", "string", "openai"))
    trust_request_chat_template: bool = arg(False, "Let requests bring a chat template of their own.", "Server")
    default_chat_template_kwargs: dict[str, Any] = arg({}, "Arguments of the chat template, under those of each request.", "Server")
    response_role: str = arg("assistant", "Role of the messages that the model writes.", "Server")
    tool_call_parser: str | None = arg(None, "Format of the model's tool calls: hermes, llama3_json, mistral, pythonic, qwen3, qwen3_coder, checkpoint (what the checkpoint declares), or the name of a plugin. By default what the chat template gives away.", "Server")
    enable_auto_tool_choice: bool = arg(False, "Accepted.", "Server", harmless="requests with tools may always leave the choice to the model")
    exclude_tools_when_tool_choice_none: bool = arg(False, "Do not show tools to the template when tool_choice is none.", "Server")
    enable_log_requests: bool = arg(False, "Log each request's id, size and parameters.", "Server")
    disable_uvicorn_access_log: bool = arg(False, "No line in the log for each answer.", "Server")
    disable_fastapi_docs: bool = arg(False, "Do not serve /openapi.json and /docs.", "Server")
    disable_ui: bool = arg(False, "Do not serve the page at / (a playground and a live view of the engine), nor /engine/stats and /engine/blocks, which it reads.", "Server")
    enable_request_id_headers: bool = arg(False, "Accepted.", "Server", harmless="every answer has the header X-Request-Id")
    enable_prompt_tokens_details: bool = arg(False, "Accepted.", "Server", harmless="usage always tells how many prompt tokens were cached")
    profiler_dir: str | None = arg(None, "Folder for the traces of /start_profile and /stop_profile, which are refused without it.", "Server")
    # fmt: on


@cache
def specs(cls: type) -> Mapping[str, tuple[Any, Spec, Any]]:
    """Of each argument of `cls`, by name: type, `Spec` and default."""
    hints = get_type_hints(cls)
    found: dict[str, tuple[Any, Spec, Any]] = {}
    for f in fields(cls):
        default = f.default_factory() if callable(f.default_factory) else f.default
        found[f.name] = (hints[f.name], f.metadata["spec"], default)
    return found


def unknown_argument(name: str, known: Mapping[str, Any], value: Any = None) -> ClientError:
    """The answer to an argument that does not exist: why, or which one was meant."""
    if reason := FOREIGN.get(name):
        return ClientError(f"{name} has no counterpart in quire: {reason}", name, value)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f": did you mean {near[0]}?" if near else ": docs/configuration.md lists those that do"
    return ClientError(f"no argument named {name!r} exists{hint}", name, value)


_MULTIPLIERS = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def human_int(text: str) -> int:
    """An integer that may be written "8k", "25.6k", "1K" (1,024), "1M" or "4GiB". Errors: `ValueError`."""
    digits = text.strip().replace("_", "").removesuffix("iB").removesuffix("B")
    scale = _MULTIPLIERS.get(digits[-1:], 1)
    if scale == 1:
        return int(digits)
    number = float(digits[:-1]) * scale
    if number != int(number):
        raise ValueError(f"{text!r} is not a whole number")
    return int(number)


def _normal(name: str, value: Any, hint: Any, spec: Spec) -> Any:
    """`value` in its one spelling. Errors: `ClientError` for a type, choice or bound."""
    if name == "dtype" and not isinstance(value, str):
        value = str(value).removeprefix("torch.")  # a torch.dtype, named without importing torch
    if isinstance(value, Path) and "str" in str(hint):
        value = str(value)
    if spec.human and isinstance(value, str) and value != "auto":
        try:
            value = human_int(value)
        except ValueError:
            raise ClientError(f'{name}={value!r} is not a number such as 8192, "8k" or "8K"', name, value) from None
    if not callable(value):
        try:
            value = msgspec.convert(value, hint if not callable_allowed(hint) else dict[str, Any])
        except msgspec.ValidationError as e:
            if spec.secret:
                raise ClientError(f"{name} has the wrong type: {str(e).lower()}", name) from None
            raise ClientError(f"{name}={value!r} has the wrong type: {str(e).lower()}", name, value) from None
    elif not callable_allowed(hint) and hint is not Any:
        raise ClientError(f"{name}={value!r} has the wrong type: a function is not taken here", name, value)
    keys: Any = value if spec.secret else None
    if keys is not None and not all(key.strip() for key in keys):
        raise ClientError(f"{name} must not be empty: anybody would have it", name)
    if spec.choices is not None and value is not None and value not in spec.choices:
        near = difflib.get_close_matches(str(value), spec.choices, n=1)
        hint_text = f" (did you mean {near[0]}?)" if near else ""
        raise ClientError(f"{name}={value!r} must be one of {', '.join(spec.choices)}{hint_text}", name, value)
    _check_bounds(name, value, spec)
    return value


def callable_allowed(hint: Any) -> bool:
    """Whether a union type holds a function."""
    return "Callable" in str(hint)


def _check_bounds(name: str, value: Any, spec: Spec) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if value != value:
        raise ClientError(f"{name} must be a number, not nan", name, value)
    low, high = spec.low, spec.high
    if (low is not None and value < low) or (high is not None and value > high):
        if low is not None and high is not None:
            allowed = f"between {low:g} and {high:g}"
        else:
            allowed = f"at least {low:g}" if low is not None else f"at most {high:g}"
        raise ClientError(f"{name}={value!r} must be {allowed}", name, value)
