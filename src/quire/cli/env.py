"""`quire env`: what this machine has, and what quire makes of it. For bug reports, and for "why is it slow?".

Owns: the report's contents and its two forms (text, JSON). The facts are those of `utils/devices.py` and `quire.ops`.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from typing import Any

import click

from quire import __version__
from quire.cli import flags
from quire.utils import devices, optional
from quire.utils.environment import ENVIRONMENT

LIBRARIES = (
    "torch",
    "numpy",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "msgspec",
    "triton",
)
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "sve")
DTYPES = ("float32", "bfloat16", "float16")


@click.command(cls=flags.Command, context_settings=flags.CONTEXT)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Device to choose for.")
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", help="Number type to choose for.")
def command(as_json: bool, device: str, dtype: str) -> None:
    """Report the machine, the libraries and the operations that would be chosen."""
    machine = devices.probe()
    if device == "auto":
        device = "cuda" if machine.gpus else "cpu"
    if device == "cuda" and not machine.gpus:
        raise click.UsageError(f"no GPU: {machine.no_gpu_reason}")
    found = report(machine)
    with flags.user_errors():
        found["operations"] = {"device": device, "dtype": dtype, "chosen": operations(device, dtype)}
    click.echo(json.dumps(found, indent=2) if as_json else as_text(found))


def report(machine: devices.Machine) -> dict[str, Any]:
    """Everything but the operations; imports no torch."""
    present = devices.cpu_features()
    return {
        "quire": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "executable": sys.executable,
        "cpu": {
            "name": devices.cpu_name(),
            "physical_cores": machine.cores,
            "features": [f for f in FEATURES if f in present],
            "memory_gib": round(machine.memory / (1 << 30), 1),
        },
        "gpus": [
            {
                "name": g.name,
                "memory_gib": round(g.memory / (1 << 30), 1),
                "capability": ".".join(map(str, g.capability)),
            }
            for g in machine.gpus
        ],
        "no_gpu_reason": machine.no_gpu_reason if not machine.gpus else None,
        "torch_cuda": devices.torch_cuda_version(),
        "libraries": {name: optional.version(name) for name in LIBRARIES},
        "environment": {name: os.environ[name] for name in (*ENVIRONMENT, "OMP_NUM_THREADS") if name in os.environ},
    }


def operations(device: str, dtype: str) -> list[dict[str, Any]]:
    """Of each operation: the implementation that would be chosen, and each candidate with why not (None: it can)."""
    import torch

    from quire import ops

    choices = ops.report(torch.device(device), getattr(torch, dtype))
    return [{"op": c.op, "chosen": c.chosen, "candidates": dict(c.candidates)} for c in choices]


def as_text(found: dict[str, Any]) -> str:
    """The report for a person."""
    cpu, chosen = found["cpu"], found["operations"]
    lines = [
        f"quire {found['quire']}, Python {found['python']}, {found['platform']}",
        f"CPU: {cpu['name']}, {cpu['physical_cores']} cores, {cpu['memory_gib']} GiB, {' '.join(cpu['features'])}",
    ]
    for gpu in found["gpus"]:
        lines.append(f"GPU: {gpu['name']}, {gpu['memory_gib']} GiB, capability {gpu['capability']}")
    if not found["gpus"]:
        lines.append(f"GPU: none ({found['no_gpu_reason']})")
    lines += ["", "Libraries:"]
    lines += [f"  {name} {version or 'not installed'}" for name, version in found["libraries"].items()]
    lines += ["", "Environment variables:"]
    lines += [f"  {name}={value}" for name, value in found["environment"].items()] or ["  none set"]
    lines += ["", f"Operations ({chosen['device']}, {chosen['dtype']}):"]
    for choice in chosen["chosen"]:
        lines.append(f"  {choice['op']}: {choice['chosen']}")
        for name, reason in choice["candidates"].items():
            if name != choice["chosen"]:
                lines.append(f"    not {name}: {reason or 'lower priority'}")
    return "\n".join(lines)
