"""What this machine can do at most: bytes read and operations in a second. Runs as a process of its own, prints JSON.

    python -m benchmarks.cpu.ceilings [--threads 2]

Owns: the two measurements. Reading: libc's memchr looks for a byte that is not there in 1 GiB of huge pages, each
thread in its part; no other reader that was tried is faster. Operations: a bf16 product of 2048^3 by PyTorch. The best
of several: a limit is what was possible at least once.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import threading
import time
from collections.abc import Callable

SIZE = 1 << 30


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Shortest duration."""
    call()
    found: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)


def read_rate(threads: int) -> float:
    """GB/s."""
    memory = mmap.mmap(-1, SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    ctypes.memset(address, 1, SIZE)  # else every page would be the one page of zeros
    part, cpus = SIZE // threads, sorted(os.sched_getaffinity(0))
    find = ctypes.CDLL(None).memchr
    find.argtypes, find.restype = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t), ctypes.c_void_p

    def look(index: int) -> None:
        os.sched_setaffinity(0, {cpus[index % len(cpus)]})  # of this thread alone
        find(address + index * part, 0, part)

    def search() -> None:
        workers = [threading.Thread(target=look, args=(i,)) for i in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    return SIZE / seconds(search, 15) / 1e9


def product_rate() -> float:
    """bf16 GFLOP/s."""
    import torch

    a = torch.randn(2048, 2048, dtype=torch.bfloat16)
    return 2 * 2048**3 / seconds(lambda: torch.nn.functional.linear(a, a), 25) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    threads = parser.parse_args().threads
    import torch

    torch.set_num_threads(threads)
    print(json.dumps({"read_gb_s": read_rate(threads), "bf16_gflop_s": product_rate(), "threads": threads}))


if __name__ == "__main__":
    main()
