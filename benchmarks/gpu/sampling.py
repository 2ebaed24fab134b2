"""What drawing tokens costs on a GPU: microseconds of one step's draw, replayed as a CUDA graph.

    python benchmarks/gpu/sampling.py [--rows 1 64] [--vocab 128256] [--kernels]

Logits are bf16, flat (normal, which random weights give) or peaked (a few hundred likely tokens, which a trained model
gives), a fresh buffer for each call of the graph. The bound is one read of the logits at 4.4 TB/s.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from quire.ops.sampling import Kind, Out
from quire.ops.triton import sampling

CASES: dict[str, dict[str, float]] = {
    "greedy": {}, "temperature": {"temperature": 0.8}, "min_p .05": {"min_p": 0.05}, "top_k 50": {"top_k": 50},
    "top_p .9": {"top_p": 0.9}, "both": {"top_k": 50, "top_p": 0.9},
}  # fmt: skip


def make_logits(rows: int, vocab: int, peaked: bool, copies: int) -> Tensor:
    g = torch.Generator(device="cuda").manual_seed(rows + vocab)
    x = torch.empty((copies, rows, vocab), dtype=torch.bfloat16, device="cuda")
    for part in x:
        part.normal_(generator=g)
        if peaked:
            part *= 2
            part[:, torch.randperm(vocab, generator=g, device="cuda")[:300]] += torch.linspace(
                18, 4, 300, device="cuda"
            )
    return x


def tables(rows: int, case: dict[str, float]) -> tuple[Tensor, Tensor]:
    low = torch.tensor(case.get("min_p", 0.0)).log().item()
    reals = torch.tensor([[case.get("temperature", 1.0), low, case.get("top_p", 1.0), 1.0, 0.0, 0.0]] * rows)
    wholes = torch.tensor([[7 + 13 * i, 0, 0, int(case.get("top_k", 0)), 0] for i in range(rows)])
    return reals.double().cuda(), wholes.long().cuda()


def graph_us(calls: list[Callable[[], None]], repeats: int = 20) -> float:
    """Microseconds of a call, the median over replays of a graph of all of them."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[2:])[len(times[2:]) // 2] * 1000 / len(calls)


def calls_for(x: Tensor, name: str, whole: bool = False) -> list[Callable[[], None]]:
    """The draw `name` from each of the buffers; `whole`: by the graph that can do everything."""
    rows, case = x.shape[1], CASES[name]
    at, positions = torch.arange(rows, device="cuda"), torch.full((rows,), 900, device="cuda")
    reals, wholes = tables(rows, case)
    out = Out.new(rows, x.device)._replace(
        packed_S2=torch.empty((rows, 2), dtype=torch.int32, device="cuda"),
        last_X=torch.empty(rows, dtype=torch.int64, device="cuda"),
    )
    kind = Kind.TOP_P if whole or "top_p" in case else Kind.TOP_K if case.keys() & {"top_k", "min_p"} else Kind.NOISE
    kind = Kind.GREEDY if not case and not whole else kind
    return [lambda part=part: sampling.draw_step(part, at, positions, reals, wholes, out, kind) for part in x]


def by_kernel(calls: list[Callable[[], None]]) -> str:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for call in calls[:5]:
            call()
        torch.cuda.synchronize()
    events = [e for e in profile.key_averages() if e.key.startswith("_") or e.count >= 5]
    return ", ".join(f"{e.key} {e.device_time_total / 5:.1f}" for e in events)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 256, 1024])
    parser.add_argument("--vocab", type=int, nargs="+", default=[128256, 151936])
    parser.add_argument("--kernels", action="store_true", help="the time of each kernel too")
    options = parser.parse_args()
    print(f"{'':26}{'bound':>8}" + "".join(f"{name:>13}" for name in CASES))
    for vocab in options.vocab:
        for rows in options.rows:
            for peaked in (False, True):
                copies = min(32, max(4, (1 << 29) // (rows * vocab * 2)))
                x = make_logits(rows, vocab, peaked, copies)
                line = f"{vocab:7} {rows:5} {'peaked' if peaked else 'flat':10}"
                line += f"{rows * vocab * 2 / 4.4e6:10.1f}"
                for name in CASES:
                    line += f"{graph_us(calls_for(x, name)):13.1f}"
                print(line, flush=True)
                if options.kernels:
                    for name in ("temperature", "top_k 50", "top_p .9"):
                        print(f"    {name}: {by_kernel(calls_for(x, name, whole=True))}", flush=True)
                del x


if __name__ == "__main__":
    main()
