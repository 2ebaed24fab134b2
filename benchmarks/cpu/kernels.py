"""The native CPU kernels against PyTorch's best, beside this machine's ceilings.

    python benchmarks/cpu/kernels.py [--threads 2] [--only linear,attention,small,step] [--model m135|m1b]
        [--tokens 1,2,4]

Both sides run alternately in this process, and each figure is a median. Weights are cycled through copies that exceed
the caches, as a step's are. On a machine with other work, `--cpu-time` (with --threads 1) counts the calling thread's
processor time instead, which is what the kernel itself needs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quire.ops.linear import QuantizedWeight
from quire.ops.native import program
from quire.ops.native.library import LEVELS, Pool
from quire.quantization.schemes import SCHEMES
from quire.utils.devices import physical_cores

CYCLE = 300 << 20  # bytes of weights in a round
# Torch's threads (libgomp's) spin for milliseconds after they have worked and take the cores from ours meanwhile: a
# step of m135 took 17 ms instead of 10 right after a torch product. Each side begins when the other one sleeps.
PAUSE = 0.03


@dataclass(frozen=True)
class Shape:
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    size: int
    vocab: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) by name."""
        q, kv = self.heads * self.size, self.kv_heads * self.size
        return {
            "qkv": (q + 2 * kv, self.hidden),
            "o": (self.hidden, q),
            "gate_up": (2 * self.inner, self.hidden),
            "down": (self.hidden, self.inner),
            "head": (self.vocab, self.hidden),
        }


MODELS = {
    "m135": Shape(576, 1536, 30, 9, 3, 64, 49152),
    "m1b": Shape(2048, 8192, 16, 32, 8, 64, 128256),
}
BF16 = torch.bfloat16


class Bench:
    def __init__(self, pool: Pool, rounds: int, clock: Callable[[], float]) -> None:
        self.pool, self.rounds, self.clock = pool, rounds, clock

    def medians(self, *functions: Callable[[], object]) -> list[float]:
        """Seconds of each, run alternately."""
        times: list[list[float]] = [[] for _ in functions]
        for turn in range(self.rounds + 1):
            for taken, function in zip(times, functions, strict=True):
                time.sleep(PAUSE)
                begin = self.clock()
                function()
                if turn:
                    taken.append(self.clock() - begin)
        return [statistics.median(taken) for taken in times]

    def ceilings(self) -> None:
        much = torch.zeros(CYCLE // 8, dtype=torch.int64)
        a, b = torch.randn(2048, 2048).to(BF16), torch.randn(2048, 2048).to(BF16)
        read, product = self.medians(much.sum, lambda: F.linear(a, b))
        print(
            f"ceilings by torch: read {much.nbytes / read / 1e9:.1f} GB/s, "
            f"bf16 {2 * 2048**3 / product / 1e9:.0f} GFLOP/s"
        )

    def linear(self, shape: Shape, counts: list[int]) -> None:
        """bf16, and weights in 8 and 4 bits as `quantization="int8"` and "int4" make them, each beside torch's bf16."""
        print(f"{'linear':10}{'bits':>5}{'M':>5}{'native us':>11}{'GB/s':>7}{'GFLOP/s':>9}{'torch us':>11}{'ratio':>7}")
        for name, (outputs, inputs) in shape.linears.items():
            copies = max(1, min(64, CYCLE // (outputs * inputs * 2)))
            weights = [torch.randn(outputs, inputs).to(BF16) for _ in range(copies)]
            for bits in (16, 8) if name == "head" else (16, 8, 4):  # "int4" keeps the head in 8 bits
                # Quantized weights are a half or a quarter as large, so that a cycle needs more of them.
                many = (
                    weights if bits == 16 else [self._quantized(weights[0], bits) for _ in range(copies * 16 // bits)]
                )
                for count in counts:
                    x, out = torch.randn(count, inputs).to(BF16), torch.empty(count, outputs, dtype=BF16)
                    record = program.linear if bits == 16 else program.quantized_linear
                    recorded = program.Program([record(x, w, None, out, count) for w in many])  # type: ignore[arg-type]
                    ours, theirs = self.medians(
                        lambda recorded=recorded: recorded.run(self.pool),
                        lambda x=x, weights=weights: [F.linear(x, w) for w in weights],
                    )
                    ours, theirs = ours / len(many), theirs / copies
                    rate, flops = outputs * inputs * bits / 8 / ours / 1e9, 2 * count * outputs * inputs / ours / 1e9
                    print(
                        f"{name:10}{bits:5}{count:5}{ours * 1e6:11.1f}{rate:7.1f}{flops:9.0f}"
                        f"{theirs * 1e6:11.1f}{theirs / ours:7.2f}"
                    )

    @staticmethod
    def _quantized(weight_NK: Tensor, bits: int) -> QuantizedWeight:
        """A copy of its own each time."""
        return SCHEMES[f"int{bits}"].quantize(weight_NK)

    def attention(self, shape: Shape) -> None:
        """Decode rows, and one prefill, against F.scaled_dot_product_attention on dense keys (which has no pages to
        follow, but for each row a call where lengths differ; here they are equal)."""
        print(f"{'attention':22}{'native us':>11}{'GB/s':>7}{'GFLOP/s':>9}{'torch us':>11}{'ratio':>7}")
        h, k, e, block = shape.heads, shape.kv_heads, shape.size, 16
        for rows, length, count in (
            (1, 200, 1),
            (1, 4000, 1),
            (32, 200, 1),
            (32, 1000, 1),
            (1, 256, 256),
            (1, 1024, 1024),
        ):
            pages = -(-length // block)
            copies = max(1, CYCLE // (rows * length * k * e * 4) // 4)
            kvs = [torch.randn(2, rows * pages, block, k, e).to(BF16) for _ in range(min(copies, shape.layers))]
            tables = torch.randperm(rows * pages).int().view(rows, pages)
            lengths = torch.full((rows,), length, dtype=torch.int32)
            cu_q = torch.arange(0, rows * count + 1, count).int()
            q, out = torch.randn(rows * count, h, e).to(BF16), torch.empty(rows * count, h, e, dtype=BF16)
            decodes = rows if count == 1 else 0
            recorded = program.Program(
                [program.attention(q, kv, tables, lengths, cu_q, out, rows, decodes, e**-0.5) for kv in kvs]
            )
            dense = [kv.view(2, rows, -1, k, e)[:, :, :length].transpose(2, 3).contiguous() for kv in kvs]
            query = q.view(rows, count, h, e).transpose(1, 2).contiguous()

            def theirs_all(dense: list[Tensor] = dense, query: Tensor = query, causal: bool = count > 1) -> None:
                for keys, values in dense:
                    F.scaled_dot_product_attention(query, keys, values, is_causal=causal, enable_gqa=True)

            ours, theirs = self.medians(lambda recorded=recorded: recorded.run(self.pool), theirs_all)
            ours, theirs = ours / len(kvs), theirs / len(kvs)
            pairs = rows * (length if count == 1 else count * (count + 1) / 2)
            rate, flops = rows * length * k * e * 4 / ours / 1e9, 4 * pairs * h * e / ours / 1e9
            label = f"{rows} x {count} of {length}"
            print(f"{label:22}{ours * 1e6:11.1f}{rate:7.1f}{flops:9.0f}{theirs * 1e6:11.1f}{theirs / ours:7.2f}")

    def small(self, shape: Shape, counts: list[int]) -> None:
        """A chain of 64 small operations: what each costs with the barrier behind it."""
        print(f"{'op':14}{'M':>5}{'native us':>11}{'torch us':>11}{'ratio':>7}")
        d = shape.hidden
        for count in counts:
            x, r, out = (torch.randn(count, d).to(BF16) for _ in range(3))
            w, both, act = torch.ones(d, dtype=BF16), torch.randn(count, 2 * shape.inner).to(BF16), torch.empty(0)
            act = torch.empty(count, shape.inner, dtype=BF16)
            norm = program.norm(program.RMS_NORM, x, r, w, None, out, r, 1e-5, count)
            silu = program.activation(both, act, "silu", True, count)
            nop = program.make(program.NOP, 0, (), ())

            def torch_norm(x: Tensor = x, r: Tensor = r, w: Tensor = w, d: int = d) -> None:
                for _ in range(64):
                    F.rms_norm(x + r, (d,), w, 1e-5)

            def torch_silu(both: Tensor = both) -> None:
                for _ in range(64):
                    gate, up = both.chunk(2, -1)
                    _ = F.silu(gate) * up

            for name, op, theirs in (
                ("barrier", nop, None),
                ("add+rmsnorm", norm, torch_norm),
                ("silu x up", silu, torch_silu),
            ):
                recorded = program.Program([op] * 64)
                functions = [lambda recorded=recorded: recorded.run(self.pool), *([theirs] if theirs else [])]
                times = [t / 64 * 1e6 for t in self.medians(*functions)]
                rest = f"{times[1]:11.2f}{times[1] / times[0]:7.2f}" if theirs else ""
                print(f"{name:14}{count:5}{times[0]:11.2f}{rest}")

    def step(self, shape: Shape, counts: list[int]) -> None:
        """A whole decode step, recorded: every layer, the head and the argmax, each row 200 tokens long."""
        print(f"{'step':8}{'rows':>6}{'ms':>9}{'GB/s':>8}{'bound ms at the read ceiling':>32}")
        length, block = 200, 16
        weights = [
            {name: torch.randn(n, k).mul(k**-0.5).to(BF16) for name, (n, k) in shape.linears.items() if name != "head"}
            for _ in range(shape.layers)
        ]
        table = torch.randn(shape.vocab, shape.hidden).to(BF16)
        much = torch.zeros(CYCLE // 8, dtype=torch.int64)
        for rows in counts:
            recorded, keep = self._record(shape, weights, table, rows, length, block)
            ours, read = self.medians(lambda recorded=recorded: recorded.run(self.pool), much.sum)
            kv = rows * length * shape.layers * shape.kv_heads * shape.size * 4
            moved = table.nbytes + sum(w.nbytes for layer in weights for w in layer.values()) + kv
            bound = moved / (much.nbytes / read)
            print(f"{'decode':8}{rows:6}{ours * 1e3:9.2f}{moved / ours / 1e9:8.1f}{bound * 1e3:20.2f}")
            del keep

    def _record(
        self, shape: Shape, weights: list[dict[str, Tensor]], table: Tensor, rows: int, length: int, block: int
    ) -> tuple[program.Program, list[Tensor]]:
        h, k, e, d = shape.heads, shape.kv_heads, shape.size, shape.hidden
        pages = -(-length // block)
        ids, positions = torch.randint(0, shape.vocab, (rows,)), torch.full((rows,), length - 1)
        tables = torch.arange(rows * pages).int().view(rows, pages)
        slots = tables[:, -1].long() * block + (length - 1) % block
        lengths, cu_q = torch.full((rows,), length, dtype=torch.int32), torch.arange(rows + 1).int()
        x, residual, normed = (torch.zeros(rows, d, dtype=BF16) for _ in range(3))
        qkv, out = torch.zeros(rows, (h + 2 * k) * e, dtype=BF16), torch.zeros(rows, h, e, dtype=BF16)
        q, key, value = (part.unflatten(-1, (-1, e)) for part in qkv.split([h * e, k * e, k * e], -1))
        inner, logits = torch.zeros(rows, shape.inner, dtype=BF16), torch.zeros(rows, shape.vocab)
        token, ones, angles = (
            torch.zeros(rows, dtype=torch.int64),
            torch.ones(d, dtype=BF16),
            torch.rand(2, 512, e // 2),
        )
        kvs = [torch.randn(2, rows * pages, block, k, e).to(BF16) for _ in weights]
        ops = [program.gather(ids, table, residual, rows)]
        ops.append(program.norm(program.RMS_NORM, residual, None, ones, None, normed, None, 1e-5, rows))
        for layer, kv in zip(weights, kvs, strict=True):
            ops += [
                program.linear(normed, layer["qkv"], None, qkv, rows),
                program.heads(
                    q, key, value, rows, table_2LF=angles, positions_T=positions, slots_T=slots, kv=kv, q_out_THE=q
                ),
                program.attention(q, kv, tables, lengths, cu_q, out, rows, rows, e**-0.5),
                program.linear(out.flatten(1), layer["o"], None, x, rows),
                program.norm(program.RMS_NORM, x, residual, ones, None, normed, residual, 1e-5, rows),
                program.linear(normed, layer["gate_up"], None, inner, rows, "silu", True),
                program.linear(inner, layer["down"], None, x, rows),
                program.norm(program.RMS_NORM, x, residual, ones, None, normed, residual, 1e-5, rows),
            ]
        ops += [program.linear(normed, table, None, logits, rows), program.argmax(logits, token, None, rows)]
        keep = [ids, positions, tables, slots, lengths, cu_q, x, residual, normed, qkv, out, inner, logits, token, ones]
        return program.Program(ops), [*keep, angles, *kvs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--only", default="small,linear,attention,step")
    parser.add_argument("--model", choices=MODELS, default="m135")
    parser.add_argument("--tokens", default="1,2,4,8,16,32,64,256,1024")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cpu-time", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pool = Pool(args.threads)
    bench = Bench(pool, args.rounds, time.thread_time if args.cpu_time else time.perf_counter)
    shape, counts = MODELS[args.model], [int(n) for n in args.tokens.split(",")]
    print(f"{args.model}, {args.threads} threads, level {LEVELS[pool.level]}")
    bench.ceilings()
    for name in args.only.split(","):
        if name == "linear":
            bench.linear(shape, counts)
        elif name == "attention":
            bench.attention(shape)
        elif name == "small":
            bench.small(shape, [n for n in counts if n <= 64])
        elif name == "step":
            bench.step(shape, [n for n in counts if n <= 64])
        else:
            parser.error(f"nothing named {name!r}")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
