"""Who takes part: each engine's runner, virtual environment, model formats and surroundings.

Owns: the table PEERS. Knows nothing of workloads and figures.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.cpu import models

PRECISIONS = ("bf16", "int8", "int4")
QUIRE = "quire"


@dataclass(frozen=True, slots=True)
class Peer:
    """An engine. `formats`: what its model is made as, for each precision that it takes part in. `rival`: counts as a
    peer in start-up (C5), where engines written in C++ are shown but are no yardstick for one written in Python."""

    name: str
    title: str
    formats: dict[str, str]
    rival: bool = False
    environment: Callable[[Path], dict[str, str]] = field(default=lambda _: {})

    @property
    def module(self) -> str:
        return f"benchmarks.cpu.peers.run_{self.name}"

    def python(self, cache: Path) -> Path:
        """The interpreter of its virtual environment; quire's is the one that runs this."""
        return Path(sys.executable) if self.name == QUIRE else cache / "venvs" / self.name / "bin" / "python"

    def label(self, precision: str) -> str:
        """Its name in a table."""
        kind = self.formats[precision]
        return self.title if kind == "bf16" else f"{self.title} {kind}"

    def model(self, name: str, precision: str, cache: Path) -> Path:
        """The model in its format, made when it is not there."""
        kind = self.formats[precision]
        if self.name == "llamacpp":
            return models.gguf(name, kind, self.python(cache), cache)
        if self.name == "openvino":
            return models.openvino(name, kind, self.python(cache), cache)
        return models.checkpoint(name, cache)


def vllm_environment(venv: Path) -> dict[str, str]:
    """What its installation guide asks for: one thread a core, its OpenMP library, tcmalloc where the system has it."""
    libraries = [venv / "lib" / "libiomp5.so"]
    libraries += sorted(Path("/usr/lib").glob("*-linux-gnu/libtcmalloc_minimal.so.4"))
    cpus = sorted(os.sched_getaffinity(0))
    return {
        "LD_PRELOAD": ":".join(str(path) for path in libraries if path.exists()),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(str(cpu) for cpu in cpus),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(venv / "cache"),
    }


PEERS = {
    peer.name: peer
    for peer in (
        Peer(QUIRE, "quire", {"bf16": "bf16", "int8": "int8", "int4": "int4"}),
        Peer("llamacpp", "llama.cpp", {"bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}),
        Peer("openvino", "OpenVINO", {"bf16": "fp16", "int8": "int8", "int4": "int4"}),
        Peer("vllm", "vLLM-CPU", {"bf16": "bf16"}, rival=True, environment=vllm_environment),
        Peer("transformers", "Transformers", {"bf16": "bf16"}, rival=True),
    )
}
