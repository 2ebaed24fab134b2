"""What the machine gives at most: copying, reading, bf16 products; and how fast one thread of Python is.

python -m benchmarks.gpu.ceilings [--json ceilings.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton
import triton.language as tl

NUMBERS = 1 << 30  # float32: 4 GiB, far more than any cache
EDGE = 8192
LOOP = 2_000_000


@triton.jit
def _read(source, out, total, PIECE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * PIECE
    stride = tl.num_programs(0).to(tl.int64) * PIECE
    lanes = tl.arange(0, PIECE)
    summed = tl.zeros([PIECE], tl.float32)
    while at < total:
        summed += tl.load(source + at + lanes)
        at += stride
    tl.store(out + tl.program_id(0), tl.sum(summed))


def seconds(function: Callable[[], object], rounds: int = 20) -> float:
    """The median on the device."""
    marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    for _ in range(rounds + 3):
        marks.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
        marks[-1][0].record()
        function()
        marks[-1][1].record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in marks[3:]) / 1e3


def host_score() -> float:
    """Millions of rounds a second of a loop of plain Python, the best of five."""
    best = 0.0
    for _ in range(5):
        begin, total = time.perf_counter(), 0
        for i in range(LOOP):
            total += i & 7
        best = max(best, LOOP / (time.perf_counter() - begin) / 1e6)
    return best


def memory() -> tuple[float, float]:
    """Bytes a second of copying (read and written) and of reading."""
    source = torch.randn(NUMBERS, device="cuda")
    target = torch.empty_like(source)
    size = source.numel() * source.element_size()
    copy = 2 * size / seconds(lambda: target.copy_(source))
    reads = [size / seconds(source.sum)]
    count = torch.cuda.get_device_properties(0).multi_processor_count
    for programs, piece, warps in ((4, 4096, 8), (8, 2048, 4), (8, 4096, 8), (16, 2048, 4)):
        out = torch.empty(count * programs, device="cuda")

        def read(out: torch.Tensor = out, piece: int = piece, warps: int = warps) -> None:
            _read[(len(out),)](source, out, NUMBERS, piece, num_warps=warps)

        reads.append(size / seconds(read))
    return copy, max(reads)


def product() -> float:
    """Operations a second."""
    a, b = (torch.randn(EDGE, EDGE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * EDGE**3 / seconds(lambda: a @ b, 30)


def measure() -> dict[str, float]:
    """The device's ceilings and the host's score."""
    copy, read = memory()
    found = {"copy_gb_s": copy / 1e9, "read_gb_s": read / 1e9, "bf16_tflop_s": product() / 1e12}
    return {name: round(value, 1) for name, value in (found | {"host_score": host_score()}).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = measure()
    print(json.dumps(found))
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
