"""The kernels of a layer beside its products and attention: time on the device, TB/s, and the host's cost of a launch.

    python -m benchmarks.gpu.elementwise [--tokens 1 64 8192]

For each op what its Triton kernel takes, beside the reference. Owns: the cases and the table that is printed. Up to
some hundred tokens the data lie in the L2 cache, as they do between the kernels of a step.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from benchmarks.gpu.timing import calls, graph_ms
from torch import Tensor

from quire.ops.activation import GATED_ACTIVATION
from quire.ops.cache import COPY_PAGES
from quire.ops.dispatch import Binder, Op
from quire.ops.heads import HEADS
from quire.ops.linear import EMBEDDING
from quire.ops.norm import RMS_NORM

DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
CALLS = 20


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=DTYPE, device=DEVICE)


def heads(tokens: int, heads: int, kv_heads: int, size: int, normed: bool) -> tuple[Any, ...]:
    qkv = random(tokens, (heads + 2 * kv_heads) * size)
    parts = qkv.split([heads * size, kv_heads * size, kv_heads * size], dim=1)
    q, k, v = (x.unflatten(1, (-1, size)) for x in parts)
    pages = max(64, tokens // 16)
    kv = random(2, pages, 16, kv_heads, size)
    slots = torch.randperm(pages * 16, device=DEVICE)[:tokens]
    positions = torch.arange(tokens, device=DEVICE)
    table = torch.randn(2, 16384, size // 2, device=DEVICE)
    norms = (random(size), random(size)) if normed else (None, None)
    return q, k, v, kv, slots, positions, table, *norms, 1e-6


def cases(tokens: int) -> list[tuple[str, Op, tuple[Any, ...], int]]:
    """(what, op, arguments, bytes that it must move)."""
    made: list[tuple[str, Op, tuple[Any, ...], int]] = []
    for size in (1024, 2048, 4096):
        x, residual, weight = random(tokens, size), random(tokens, size), random(size)
        made.append((f"rms_norm {size}", RMS_NORM, (x, residual, weight, 1e-5), tokens * size * 8))
    for size in (3072, 8192, 14336):
        made.append(
            (f"gated_activation {size}", GATED_ACTIVATION, (random(tokens, 2 * size), "silu"), tokens * size * 6)
        )
    for shape in ((16, 8, 128, True), (32, 8, 64, False), (32, 8, 128, False)):
        moved = tokens * (shape[0] + 2 * shape[1]) * shape[2] * 4
        made.append((f"heads {shape[0]}/{shape[1]} x {shape[2]}", HEADS, heads(tokens, *shape), moved))
    ids = torch.randint(0, 32000, (tokens,), device=DEVICE)
    made.append(("embedding 4096", EMBEDDING, (ids, random(32000, 4096), 0), tokens * 4096 * 4))
    return made


def host_us(run: Callable[[], object]) -> float:
    """What a call costs the host."""
    for _ in range(20):
        run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(100):
        run()
    taken = time.perf_counter() - start
    torch.cuda.synchronize()
    return taken / 100 * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 64, 256, 2048, 8192])
    args = parser.parse_args()
    ops = Binder(DEVICE, DTYPE)
    print("us on the device (TB/s), the reference; us on the host")
    for tokens in args.tokens:
        for what, op, arguments, moved in cases(tokens):
            run = ops.bind(op)
            ours, plain = (graph_ms(calls(f, [arguments] * CALLS)) / CALLS * 1e3 for f in (run, op.reference))
            host = host_us(calls(run, [arguments]))
            print(
                f"{tokens:6d} {what:22s} {ours:8.2f} ({moved / ours / 1e6:5.2f}) {plain:8.2f}; {host:5.1f}", flush=True
            )
    tensors = [random(2, 1024, 16, 8, 128) for _ in range(32)]
    sources, targets = torch.randperm(1024)[:64].chunk(2)
    copy = ops.bind(COPY_PAGES)
    print(f"copy_pages, 32 layers, 32 pages of 64 KiB: {host_us(lambda: copy(tensors, sources, targets)):.1f} us")


if __name__ == "__main__":
    main()
