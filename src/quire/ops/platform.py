"""What this machine is, as far as choosing implementations asks. Owns: the facts about one device. Chooses nothing."""

from __future__ import annotations

import importlib.util
import platform
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Platform:
    """`capability`: CUDA compute capability, (0, 0) elsewhere. `features`: vector extensions of a CPU. Memory in bytes;
    0 where it cannot be asked."""

    device: torch.device
    name: str
    capability: tuple[int, int] = (0, 0)
    memory: int = 0
    features: tuple[str, ...] = ()
    triton: bool = False


def detect(device: torch.device) -> Platform:
    """The facts about `device`; does not create a CUDA context for a CPU device."""
    triton = importlib.util.find_spec("triton") is not None
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        return Platform(device, facts.name, (facts.major, facts.minor), facts.total_memory, triton=triton)
    features = tuple(torch.backends.cpu.get_cpu_capability().lower().split())
    return Platform(device, platform.processor() or platform.machine(), features=features, triton=triton)
