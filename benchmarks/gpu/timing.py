"""Time on a GPU: calls captured in one CUDA graph, so that the host's cost is out of it.

Owns: the stopwatch. What is measured should touch more memory than the L2 cache holds, or say so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def calls(function: Callable[..., object], arguments: Sequence[Sequence[object]]) -> Callable[[], None]:
    """The function with each of the arguments, one after the other."""

    def run() -> None:
        for each in arguments:
            function(*each)

    return run


def graph_ms(run: Callable[[], object], repeats: int = 7) -> float:
    """Median duration of what `run` launches, after one run to compile and one replay to warm up."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    found: list[float] = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        found.append(start.elapsed_time(stop))
    return sorted(found)[repeats // 2]
