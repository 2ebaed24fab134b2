"""`quire inspect`: what a checkpoint is, what it takes and whether it runs, without reading its weights.

Owns: the report's contents and its two forms (text, JSON). The facts come from where they are decided: the resolved
configuration, the headers of the weight files (`runner/estimate.py`), the model on the meta device, the tokenizer.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from quire.cli import flags
from quire.config import hub
from quire.config.args import EngineArgs, human_int
from quire.config.files import Stored
from quire.config.resolve import resolve, stored_dtype
from quire.config.schema import Config
from quire.models.bodies import body_architecture
from quire.models.choice import QUIRE, TRANSFORMERS
from quire.models.registry import ModelRegistry
from quire.runner import estimate
from quire.types.errors import ClientError
from quire.utils.devices import Gpu, Machine, probe
from quire.utils.logging import setup_logging

Report = dict[str, Any]


@click.command(cls=flags.Command, context_settings=flags.CONTEXT)
@click.argument("model_name", metavar="[MODEL]", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--gpu", "gpu_memory", metavar="SIZE", help="Estimate for a GPU with so much memory (24G) instead.")
@flags.options_of(EngineArgs)
def command(model_name: str | None, as_json: bool, gpu_memory: str | None, **values: Any) -> None:
    """Report what MODEL is, what it takes and whether it runs; only its small files and headers are read.

    The status is 0 if it can run, 1 if it cannot.
    """
    if model_name is not None:
        if values.get("model") is not None:
            raise flags.UserError("give the model as an argument or as --model, not both")
        values["model"] = model_name
    kwargs = flags.engine_kwargs(values, **flags.quiet())
    setup_logging(kwargs.get("log_level"))
    with flags.user_errors():
        machine = probe() if gpu_memory is None else imagined(gpu_memory)
        found = report(kwargs, machine)
    click.echo(json.dumps(found, indent=2) if as_json else as_text(found))
    if found["problems"]:
        raise SystemExit(1)


def imagined(memory: str) -> Machine:
    """This machine with one modern GPU of that memory."""
    try:
        size = human_int(memory)
    except ValueError:
        raise ClientError(f"--gpu {memory!r} is not a size such as 24G", "gpu", memory) from None
    return dataclasses.replace(probe(), gpus=(Gpu("a GPU", size, (9, 0)),), no_gpu_reason="")


def report(kwargs: Mapping[str, Any], machine: Machine) -> Report:
    """What is known of the model that the engine's arguments name. Raises `ClientError` where there is no such model;
    what keeps one from running is in `problems`."""
    args = EngineArgs(**kwargs)
    source = hub.find_checkpoint(args.model, args.revision, args.download_dir, token=args.hf_token, weights=False)
    raw = hub.read_config(source)
    names: Any = raw.get("architectures")
    found: Report = {
        "model": args.model,
        "path": str(source),
        "architectures": names if isinstance(names, list) else [],
        "model_type": raw.get("model_type"),
        "stored_dtype": stored_dtype(raw),
        "problems": [],
    }
    try:
        # Weights are not fetched for random ones; the estimate looks for headers by itself.
        config = resolve(EngineArgs(**{**kwargs, "load_format": "dummy"}), machine=machine)
    except ClientError as error:
        found["problems"].append(str(error))
        return found
    config = dataclasses.replace(config, load=dataclasses.replace(config.load, load_format=args.load_format))
    found["implementation"] = _implementation(config)
    found["plan"] = _plan(config)
    tensors, source_of, problems = _tensors(config, args)
    found["problems"] += problems
    found["parameters"] = _parameters(config, tensors, source_of)
    found["memory"] = _memory(config, machine, tensors)
    found["kv_cache"] = _kv_cache(config)
    found["tokenizer"] = _tokenizer(config)
    found["sampling"] = dict(config.model.generation_config)
    if found["memory"]["sequences"] == 0:
        length = config.model.max_model_len
        found["problems"].append(
            f"memory does not suffice for one sequence of max_model_len={length} tokens: lower max_model_len, "
            "quantize, or choose a smaller model or a larger device"
        )
    return found


def _implementation(config: Config) -> Report:
    arch = config.model.arch.architecture
    if config.model.model_impl != QUIRE:
        return {"architecture": arch, "by": TRANSFORMERS}
    return {"architecture": arch, "by": ModelRegistry.origin(body_architecture(arch)) or "nobody"}


def _plan(config: Config) -> Report:
    model, arch = config.model, config.model.arch
    return {
        "device": config.device.device,
        "dtype": model.dtype,
        "quantization": model.quantization,
        "max_model_len": model.max_model_len,
        "max_model_len_reason": model.max_model_len_reason,
        "max_num_seqs": config.scheduler.max_num_seqs,
        "max_num_batched_tokens": config.scheduler.max_num_batched_tokens,
        "tensor_parallel_size": config.parallel.tensor_parallel_size,
        "layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "heads": arch.num_heads,
        "kv_heads": arch.num_kv_heads,
        "head_dim": arch.head_dim,
        "vocab_size": arch.vocab_size,
    }


def _tensors(config: Config, args: EngineArgs) -> tuple[list[Stored] | None, str, list[str]]:
    """(the checkpoint's tensors, where they are known from, what does not fit)."""
    stored, source, problems = None, "", list[str]()
    local = hub.is_local(args.model)
    try:
        stored = estimate.stored_tensors(config)
        source = "headers of the weight files"
    except ClientError as error:
        if local and not Path(args.model).is_file():
            problems.append(str(error))
    if stored is None and not local and args.load_format != "dummy":
        stored = hub.remote_tensors(args.model, args.revision, args.hf_token)
        source = "headers of the weight files on the Hub"
    from quire.loading.passes import DTYPES, build_model
    from quire.loading.weights import Translates, check_names, wanted_tensors

    try:
        model = build_model(config, DTYPES[config.model.dtype])
        if stored is not None and not isinstance(model, Translates):
            check_names(model, config.model.path, {t.name: t.shape for t in stored})
    except ClientError as error:
        return stored, source, [*problems, str(error)]
    if stored is None:
        wanted = [Stored(name, "", shape) for name, shape in wanted_tensors(model).items()]
        return wanted, "config.json and the model's code", problems
    return stored, source, problems


def _parameters(config: Config, tensors: list[Stored] | None, source: str) -> Report:
    if tensors is None:
        return {"total": None, "parts": {}, "source": "unknown before loading: the weights are no safetensors"}
    parts = estimate.parameters(config, tensors)
    return {"total": sum(parts.values()), "parts": parts, "source": source}


def _memory(config: Config, machine: Machine, tensors: list[Stored] | None) -> Report:
    weights = None if tensors is None else estimate.weight_bytes(config, tensors)
    found = estimate.memory(config, machine, weights)
    where = machine.gpus[0].name if config.device.device == "cuda" else "this machine's memory"
    return {
        "device": where,
        "total_bytes": found.total,
        "weights_bytes": found.weights,
        "kv_cache_bytes": max(0, found.cache),
        "kv_bytes_per_token": found.token,
        "sequence_bytes": found.sequence,
        "sequences": found.sequences,
    }


def _kv_cache(config: Config) -> Report:
    groups = estimate.cached_groups(config)
    return {
        "dtype": config.cache.kv_cache_dtype,
        "block_size": config.cache.block_size,
        "groups": [{"kind": g.kind, "layers": len(g.layers), "window": g.window} for g in groups],
    }


def _tokenizer(config: Config) -> Report:
    from quire.engine.tokenizer import FastTokenizer, load_tokenizer

    try:
        tokenizer = load_tokenizer(config)
    except ClientError as error:
        return {"kind": None, "reason": str(error)}
    if tokenizer is None:
        return {"kind": None, "reason": "token ids only: skip_tokenizer_init, or a checkpoint without a tokenizer"}
    fast = isinstance(tokenizer, FastTokenizer)
    return {
        "kind": "fast" if fast else "Python",
        "vocab_size": tokenizer.backend.get_vocab_size() if fast else len(tokenizer.transformers()),
        "special_tokens": tokenizer.special_tokens,
        "eos_token_id": tokenizer.eos_token_id,
        "chat_templates": sorted(tokenizer.chat_templates),
    }


# --- for a person ----------------------------------------------------------------------------------------------------


def as_text(found: Report) -> str:
    """The report in a few lines."""
    rows: list[tuple[str, str]] = [("folder", found["path"])]
    if "implementation" in found:
        rows += _rows(found)
    else:
        rows.append(("architecture", ", ".join(found["architectures"]) or "none is named"))
    rows += [("cannot run" if i == 0 else "", problem) for i, problem in enumerate(found["problems"])]
    return "\n".join([found["model"], *(f"  {name:<14}{text}" for name, text in rows)])


def _rows(found: Report) -> list[tuple[str, str]]:
    plan, memory, kv, impl = found["plan"], found["memory"], found["kv_cache"], found["implementation"]
    parts = found["parameters"]
    by_part = ", ".join(f"{name} {_count(count)}" for name, count in parts["parts"].items())
    weights = "?" if memory["weights_bytes"] is None else estimate.size(memory["weights_bytes"])
    groups = ", ".join(_group(group) for group in kv["groups"])
    cache = (
        f"{estimate.size(memory['kv_bytes_per_token'])} a token in {kv['dtype']}; layers: {groups}"
        if groups
        else "none"
    )
    left = f"about {estimate.size(memory['kv_cache_bytes'])} left"
    if groups:
        left += (
            f" for the cache: {memory['sequences']} sequences of {plan['max_model_len']} tokens "
            f"({estimate.size(memory['sequence_bytes'])} each)"
        )
    quantization = f", rounded to {plan['quantization']}" if plan["quantization"] else ""
    sampling = ", ".join(f"{name} {value}" for name, value in found["sampling"].items())
    return [
        ("architecture", f"{impl['architecture']}, implemented by {impl['by']}"),
        ("shape", f"{plan['layers']} layers of {plan['hidden_size']}, {plan['heads']} heads of {plan['head_dim']} "
                  f"({plan['kv_heads']} of keys and values), {plan['vocab_size']} tokens"),
        ("dtype", f"{plan['dtype']} on {plan['device']} (stored: {found['stored_dtype']}){quantization}"),
        ("parameters", _count(parts["total"]) + (f": {by_part}" if by_part else "") + f" ({parts['source']})"),
        ("max_model_len", f"{plan['max_model_len']}: {plan['max_model_len_reason']}"),
        ("weights", weights),
        ("KV cache", cache),
        ("memory", f"{memory['device']}: {estimate.size(memory['total_bytes'])}, {left}"),
        ("tokenizer", _tokenizer_text(found["tokenizer"])),
        ("sampling", sampling or "plain defaults"),
    ]  # fmt: skip


def _group(group: Report) -> str:
    window = f" with a window of {group['window']}" if group["window"] else ""
    return f"{group['layers']} {group['kind']}{window}"


def _tokenizer_text(found: Report) -> str:
    if found["kind"] is None:
        return f"none ({found['reason']})"
    templates = ", ".join(found["chat_templates"]) or "none"
    special = ", ".join(f"{name.removesuffix('_token')} {text!r}" for name, text in found["special_tokens"].items())
    return (
        f"{found['kind']}, {found['vocab_size']} tokens, {special or 'no special tokens'}; chat template: {templates}"
    )


def _count(number: int | None) -> str:
    if number is None:
        return "?"
    for scale, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= scale:
            return f"{number / scale:.2f} {letter}"
    return str(number)
