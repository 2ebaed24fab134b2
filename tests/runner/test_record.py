"""What the recorder of CUDA graphs asks of streams, in order, also where a recording fails."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from quire.runner.record import CudaRecorder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    log: list[str] = []

    class Stream:
        def __init__(self, name: str = "inside") -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            log.append(f"{self.name} waits for {other.name}")

    class Graph:
        def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
            log.append("begin")

        def capture_end(self) -> None:
            log.append("end")

    outside = Stream("outside")
    fakes = {"Stream": Stream, "CUDAGraph": Graph, "graph_pool_handle": object, "stream": lambda _: nullcontext()}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: outside)
    return log


@pytest.mark.parametrize("fails", [None, 1, 2])
def test_what_comes_next_waits_for_all_that_was_begun(asked: list[str], fails: int | None) -> None:
    """Also where memory ends at the first or the second of the two runs: their kernels write into buffers that the step
    which then runs without a graph writes too."""

    def function() -> torch.Tensor:
        asked.append("run")
        if asked.count("run") == fails:
            raise torch.OutOfMemoryError("no memory")
        return torch.zeros(1)

    with nullcontext() if fails is None else pytest.raises(torch.OutOfMemoryError):
        CudaRecorder()(function)
    recorded = ["begin", "run", "end"] if fails != 1 else []
    assert asked == ["inside waits for outside", "run", *recorded, "outside waits for inside"]
