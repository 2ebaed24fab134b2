"""Attention over pages on a GPU: right at real sizes, and how near to what the memory or the matrix units give.

    python benchmarks/gpu/attention.py [--out FOLDER] [--check] [--time] [--invariant] [--models 8B]

Of the implementation "triton", or of "invariant". Without --check and --time, both.
Checks: against the reference in float32, over shapes, types, windows, page sizes, long rows, rows that share pages.
Times: a layer's call in a captured graph of several layers, each with keys and values of its own; decodes against the
bytes of keys and values at READ (those of a shared prefix once), prompts against the matrix units' PRODUCT (causal:
half of the square).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quire.ops.attention import AttentionMeta, GroupMeta
from quire.ops.attention import attention as reference
from quire.ops.triton.attention import attention, invariant_attention

READ = 4.4e12  # bytes/s of an H200
PRODUCT = 792e12  # bf16 operations/s of an H200
DEVICE = torch.device("cuda")


@dataclass
class Work:
    """One step over `layers` layers: rows of (length, count of queries), which share the first `prefix` tokens."""

    rows: Sequence[tuple[int, int]]
    heads: int
    kv_heads: int
    size: int
    block: int = 16
    prefix: int = 0
    layers: int = 1
    dtype: torch.dtype = torch.bfloat16
    captured: bool = False
    kernel: Callable[..., Tensor] = attention

    def __post_init__(self) -> None:
        used = [-(-length // self.block) for length, _ in self.rows]
        draw = random.Random(0)
        ids = list(range(sum(used)))
        draw.shuffle(ids)
        width = max(used) + 1
        tables = torch.zeros((len(self.rows), width), dtype=torch.int32)
        for row, count in enumerate(used):
            tables[row, :count] = torch.tensor([ids.pop() for _ in range(count)], dtype=torch.int32)
        tables[:, : self.prefix // self.block] = tables[0, : self.prefix // self.block]
        shape = (2, max(1, sum(used)), self.block, self.kv_heads, self.size)
        self.kv = [torch.randn(shape, dtype=self.dtype, device=DEVICE) for _ in range(self.layers)]
        total = sum(count for _, count in self.rows)
        self.q = [
            torch.randn((total, self.heads, self.size), dtype=self.dtype, device=DEVICE) for _ in range(self.layers)
        ]
        self.group = GroupMeta(tables.to(DEVICE), torch.empty(0, dtype=torch.int64))
        self.width = width
        self.counts = [count for _, count in self.rows]
        cu_q = torch.tensor([0, *torch.tensor(self.counts).cumsum(0).tolist()], dtype=torch.int32)
        self.cu_q, self.lengths = cu_q.to(DEVICE), torch.tensor([n for n, _ in self.rows], dtype=torch.int32).to(DEVICE)

    def meta(self) -> AttentionMeta:
        decodes = next((i for i, count in enumerate(self.counts) if count != 1), len(self.counts))
        return AttentionMeta(
            self.cu_q, self.lengths, None if self.captured else self.counts, max(self.counts),
            self.width * self.block, decodes, (self.group,), None if self.captured else [n for n, _ in self.rows],
        )  # fmt: skip

    def step(self) -> None:
        meta = self.meta()
        for q, kv in zip(self.q, self.kv, strict=True):
            self.kernel(q, kv, self.group, meta, self.size**-0.5)

    @property
    def bytes(self) -> int:
        """Of keys and values that a layer must read."""
        tokens = sum(n - self.prefix for n, _ in self.rows) + self.prefix
        return 2 * tokens * self.kv_heads * self.size * self.kv[0].element_size()

    @property
    def operations(self) -> float:
        seen = sum(count * length - count * (count - 1) / 2 for length, count in self.rows)
        return 4.0 * seen * self.heads * self.size


def per_layer(step: Callable[[], None], layers: int, repeats: int = 15) -> float:
    """Microseconds of a layer, median over replays of a captured step."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    marks = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        marks.append((start, stop))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in marks) * 1e3 / layers


def lengths(rows: int, low: int, high: int) -> list[tuple[int, int]]:
    draw = random.Random(rows)
    return [(draw.randint(low, high), 1) for _ in range(rows)]


SHAPES = {"0.6B": (16, 8, 128), "1B": (32, 8, 64), "8B": (32, 8, 128)}
DECODES: list[tuple[str, list[tuple[int, int]], int]] = [
    ("1 x 128", [(128, 1)], 32),
    ("1 x 256", [(256, 1)], 32),
    ("1 x 400", [(400, 1)], 32),
    ("1 x 4096", [(4096, 1)], 32),
    ("1 x 32768", [(32768, 1)], 16),
    ("8 x 128-1500", lengths(8, 128, 1500), 32),
    ("64 x 256", [(256, 1)] * 64, 16),
    ("64 x 128-1500", lengths(64, 128, 1500), 8),
    ("256 x 256", [(256, 1)] * 256, 8),
    ("256 x 128-1500", lengths(256, 128, 1500), 4),
    ("1024 x 128-1500", lengths(1024, 128, 1500), 2),
    ("255 x 256, 1 x 32768", [(32768, 1)] + [(256, 1)] * 255, 4),
]
PREFIXES: list[tuple[str, list[tuple[int, int]], int, int]] = [
    ("64 x 4160, 4096 shared", [(4160, 1)] * 64, 4096, 8),
    ("64 x 1100, 1024 shared", [(1100, 1)] * 64, 1024, 8),
    ("64 x 600, 512 shared", [(600, 1)] * 64, 512, 8),
    ("64 x 300, 256 shared", [(300, 1)] * 64, 256, 16),
    ("8 x 4160, 4096 shared", [(4160, 1)] * 8, 4096, 8),
    ("256 x 1100, 1024 shared", [(1100, 1)] * 256, 1024, 4),
]
PROMPTS: list[tuple[str, list[tuple[int, int]], int]] = [
    ("1 x 8192", [(8192, 8192)], 4),
    ("1 x 4096", [(4096, 4096)], 4),
    ("16 x 1024", [(1024, 1024)] * 16, 4),
    ("32 x 512", [(512, 512)] * 32, 4),
    ("64 x 128", [(128, 128)] * 64, 4),
    ("2048 of 32768", [(32768, 2048)], 2),
    ("64 x 64 of 4160", [(4160, 64)] * 64, 2),
    ("1 x 64 of 8192", [(8192, 64)], 8),
    ("256 decodes, 1 x 1024", [*lengths(256, 128, 1500), (1024, 1024)], 4),
]
CHECKS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("8B decodes", {"rows": lengths(64, 1, 1500)}, {}),
    ("8B decodes, captured", {"rows": [*lengths(63, 1, 1500), (0, 1)], "captured": True}, {}),
    ("8B one long", {"rows": [(32768, 1)]}, {}),
    ("8B long among short", {"rows": [(32768, 1), *lengths(255, 1, 300)]}, {}),
    ("8B prompts", {"rows": [(4096, 4096), (777, 777), (2000, 300), (64, 17)]}, {}),
    ("8B chunk", {"rows": [(16384, 512)]}, {}),
    ("8B shared", {"rows": lengths(64, 4100, 4300), "prefix": 4096}, {}),
    ("8B shared, captured", {"rows": [*lengths(63, 4100, 4300), (4300, 4)], "prefix": 4096, "captured": True}, {}),
    ("1B shared", {"rows": lengths(100, 1100, 1300), "prefix": 1024, "size": 64}, {}),
    ("0.6B shared", {"rows": lengths(30, 1100, 1300), "prefix": 1024, "heads": 16}, {}),
    ("8B mixed", {"rows": [*lengths(40, 1, 900), (500, 2), (300, 4), (129, 5), (800, 800)]}, {}),
    ("window", {"rows": [*lengths(40, 1, 3000), (3000, 2500), (700, 3)]}, {"window": 512}),
    ("softcap", {"rows": [*lengths(40, 1, 900), (700, 700)]}, {"softcap": 20.0}),
    ("blocks of 32", {"rows": [*lengths(40, 1, 900), (700, 700)], "block": 32}, {}),
    ("1B", {"rows": [*lengths(40, 1, 900), (700, 700)], "size": 64}, {}),
    ("0.6B", {"rows": [*lengths(40, 1, 900), (700, 700)], "heads": 16}, {}),
    ("heads of 80", {"rows": [*lengths(40, 1, 900), (700, 700)], "size": 80}, {}),
    ("heads of 256", {"rows": [*lengths(40, 1, 900), (700, 700)], "size": 256}, {}),
    ("one KV head", {"rows": [*lengths(40, 1, 900), (700, 700)], "heads": 71, "kv_heads": 1, "size": 64}, {}),
    ("as many KV heads", {"rows": [*lengths(40, 1, 900), (700, 700)], "kv_heads": 32}, {}),
    ("float16", {"rows": [*lengths(40, 1, 900), (700, 700)], "dtype": torch.float16}, {}),
    ("float32", {"rows": [*lengths(40, 1, 900), (700, 700)], "dtype": torch.float32}, {}),
]
BOUNDS = {torch.bfloat16: 6e-3, torch.float16: 1e-3, torch.float32: 3e-6}


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.float() - expected).norm() / expected.norm())


def check(kernel: Callable[..., Tensor] = attention) -> list[dict[str, Any]]:
    rows = []
    for name, shape, rule in CHECKS:
        work = Work(**{"heads": 32, "kv_heads": 8, "size": 128, **shape})
        scale = work.size**-0.5
        expected = reference(work.q[0].float(), work.kv[0], work.group, Work.meta(work), scale, **rule)
        got = kernel(work.q[0], work.kv[0], work.group, work.meta(), scale, **rule)
        rows.append({"check": name, "error": error(got, expected), "bound": BOUNDS[work.dtype]})
        print(
            f"{name:24} {rows[-1]['error']:.1e}", "" if rows[-1]["error"] < rows[-1]["bound"] else "WRONG", flush=True
        )
        del work, expected, got
    return rows


def time_all(kernel: Callable[..., Tensor] = attention, models: Sequence[str] = tuple(SHAPES)) -> list[dict[str, Any]]:
    rows = []
    shapes = {model: SHAPES[model] for model in models}
    for model, (heads, kv_heads, size) in shapes.items():
        for name, lens, layers in DECODES:
            work = Work(lens, heads, kv_heads, size, layers=layers, captured=True, kernel=kernel)
            us = per_layer(work.step, layers)
            rate = work.bytes / us * 1e6
            rows.append({"model": model, "work": name, "us": us, "GB/s": rate / 1e9, "of bound": rate / READ})
            print(f"{model:5} {name:22} {us:8.1f} us {rate / 1e9:6.0f} GB/s {rate / READ:6.1%}", flush=True)
            del work
        for name, lens, prefix, layers in PREFIXES:
            work = Work(lens, heads, kv_heads, size, prefix=prefix, layers=layers, captured=True, kernel=kernel)
            us = per_layer(work.step, layers)
            rate = work.bytes / us * 1e6
            rows.append({"model": model, "work": name, "us": us, "GB/s": rate / 1e9, "of bound": rate / READ})
            print(f"{model:5} {name:22} {us:8.1f} us {rate / 1e9:6.0f} GB/s {rate / READ:6.1%}", flush=True)
            del work
    for model, (heads, kv_heads, size) in shapes.items():
        for name, lens, layers in PROMPTS:
            work = Work(lens, heads, kv_heads, size, layers=layers, kernel=kernel)
            us = per_layer(work.step, layers, 7)
            rate = work.operations / us * 1e6
            rows.append({"model": model, "work": name, "us": us, "TFLOP/s": rate / 1e12, "of bound": rate / PRODUCT})
            print(f"{model:5} {name:22} {us:8.1f} us {rate / 1e12:6.0f} TFLOP/s {rate / PRODUCT:6.1%}", flush=True)
            del work
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--invariant", action="store_true")
    parser.add_argument("--models", default=",".join(SHAPES), help="whose shapes are timed")
    args = parser.parse_args()
    kernel = invariant_attention if args.invariant else attention
    both = not (args.check or args.time)
    with torch.inference_mode():
        checks = check(kernel) if args.check or both else []
        times = time_all(kernel, args.models.split(",")) if args.time or both else []
    report = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "checks": checks, "times": times}
    if args.out is not None:
        (args.out / "attention.json").write_text(json.dumps(report, indent=1))
    if any(not row["error"] < row["bound"] for row in checks):
        raise SystemExit("results differ")


if __name__ == "__main__":
    main()
