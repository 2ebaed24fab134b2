"""What this machine has: GPUs, CPU cores, memory. Found without importing torch.

Owns: the questions put to the operating system and to NVIDIA's management library. Knows nothing of what quire then
does with the answers. Every answer can be injected, so that a resolution for another machine can be tested here.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU: memory in bytes, compute capability (major, minor)."""

    name: str
    memory: int
    capability: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Machine:
    """What a configuration is resolved for. `no_gpu_reason` says why `gpus` is empty. `memory` is the host's, bytes;
    `cores` are physical ones that this process may use."""

    gpus: tuple[Gpu, ...] = ()
    no_gpu_reason: str = "no NVIDIA driver was found"
    cores: int = 1
    memory: int = 0


def probe() -> Machine:
    """This machine."""
    gpus, reason = _gpus(os.environ)
    return Machine(gpus, reason, physical_cores(), host_memory())


def host_memory() -> int:
    """Bytes of memory, the container's limit counted in; 0 where it cannot be told."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def available_memory() -> int:
    """Bytes of the host's memory that can be had without swapping; 8 GiB where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 8 << 30


def physical_cores() -> int:
    """Physical cores among the CPUs that this process may run on (two threads of one core count once)."""
    try:
        cpus = os.sched_getaffinity(0)
    except AttributeError:
        return max(1, os.cpu_count() or 1)
    cores: set[str] = set()
    for cpu in cpus:
        try:
            cores.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip())
        except OSError:
            cores.add(str(cpu))
    return max(1, len(cores))


def has_matrix_unit() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in a unit of their own (AMX)."""
    try:
        return " amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def cpu_name() -> str:
    """The processor's own name, where the system tells it."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        match = None
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def cpu_features() -> frozenset[str]:
    """Instruction set extensions, by the kernel's names (empty where the system does not tell)."""
    try:
        match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        match = None
    return frozenset(match.group(1).split()) if match else frozenset()


def torch_cuda_version() -> str | None:
    """The CUDA version that the installed torch was built for, None for a CPU build. Reads a file: torch is not
    imported."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text()
    except OSError:
        return None
    match = re.search(r"^cuda\b.*=\s*['\"]([\d.]+)['\"]", text, re.M)
    return match.group(1) if match else None


def _gpus(environ: Mapping[str, str]) -> tuple[tuple[Gpu, ...], str]:
    if torch_cuda_version() is None:
        return (), "the installed torch is a CPU build"
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return (), "no NVIDIA driver was found"
    if nvml.nvmlInit_v2() != 0:
        return (), "the NVIDIA driver does not answer"
    try:
        count = ctypes.c_uint()
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0 or count.value == 0:
            return (), "the NVIDIA driver shows no GPU"
        found = {i: gpu for i in range(count.value) if (gpu := _gpu(nvml, i)) is not None}
    finally:
        nvml.nvmlShutdown()
    visible = visible_devices(environ.get("CUDA_VISIBLE_DEVICES"), len(found))
    chosen = tuple(found[i] for i in visible if i in found)
    return chosen, "" if chosen else "CUDA_VISIBLE_DEVICES hides every GPU"


def visible_devices(value: str | None, count: int) -> list[int]:
    """What CUDA_VISIBLE_DEVICES leaves of `count` devices. As in CUDA, an entry that is no valid index hides all that
    follow it; entries by UUID are counted but not matched."""
    if value is None:
        return list(range(count))
    chosen: list[int] = []
    for position, entry in enumerate(e.strip() for e in value.split(",")):
        if entry.startswith(("GPU-", "MIG-")):
            chosen.append(position)
        elif entry.isdigit() and int(entry) < count:
            chosen.append(int(entry))
        else:
            break
    return chosen


class _NvmlMemory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def _gpu(nvml: ctypes.CDLL, index: int) -> Gpu | None:
    handle, name, memory = ctypes.c_void_p(), ctypes.create_string_buffer(96), _NvmlMemory()
    major, minor = ctypes.c_int(), ctypes.c_int()
    calls = (
        nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)),
        nvml.nvmlDeviceGetName(handle, name, ctypes.c_uint(96)),
        nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)),
        nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor)),
    )
    if any(calls):
        return None
    return Gpu(name.value.decode(errors="replace"), int(memory.total), (major.value, minor.value))
