"""All linear layers of a decode step, and the head: the op `linear` (and `gated_linear`) beside cuBLAS.

    python -m benchmarks.gpu.linear [--models l1b l8b] [--tokens 1 16 64] [--ops linear=invariant]

Every layer has weights of its own, all products are captured in one graph. Checked against float32 products first.
Owns: the shapes, from those of the models, and the table that is printed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.gpu.timing import calls, graph_ms
from benchmarks.gpu.workloads import MODELS
from torch import Tensor

from quire.ops.dispatch import Binder
from quire.ops.linear import GATED_LINEAR, LINEAR, gated_linear

Product = Callable[[Tensor, Tensor], Tensor]


def shapes(name: str) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of a layer's matrices and the head."""
    c = MODELS[name]
    hidden, heads, kv, size = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    return {
        "qkv": ((heads + 2 * kv) * size, hidden),
        "o": (hidden, heads * size),
        "gate_up": (2 * c["intermediate_size"], hidden),
        "down": (hidden, c["intermediate_size"]),
        "head": (c["vocab_size"], hidden),
    }


def products(ops: Binder, outputs: int, inputs: int, gated: bool) -> tuple[Product, Product]:
    """The op's product and the plain one."""
    if gated:
        op = ops.bind(GATED_LINEAR, inputs=inputs, outputs=outputs, kind="silu")
        return lambda x, w: op(x, w, None, "silu"), lambda x, w: gated_linear(x, w, None, "silu")
    op = ops.bind(LINEAR, inputs=inputs, outputs=outputs)
    return lambda x, w: op(x, w, None), F.linear


def check(product: Product, x: Tensor, weight: Tensor, gated: bool) -> float:
    """Relative error against float32."""
    rows = slice(None) if gated else slice(0, 4096)
    got, exact = product(x, weight).float(), F.linear(x.float(), weight[rows].float())
    if gated:
        gate, up = exact.chunk(2, -1)
        exact = F.silu(gate) * up
    return ((got[:, : exact.shape[1]] - exact).norm() / exact.norm()).item()


def measure(name: str, tokens: list[int], dtype: torch.dtype, forced: dict[str, str]) -> None:
    device = torch.device("cuda")
    ops = Binder(device, dtype, forced)
    layers = MODELS[name]["num_hidden_layers"]
    weights: dict[str, list[Tensor]] = {}
    pairs: dict[str, tuple[Product, Product]] = {}
    for part, (outputs, inputs) in shapes(name).items():
        count = 1 if part == "head" else layers
        weights[part] = [torch.randn(outputs, inputs, dtype=dtype, device=device) * inputs**-0.5 for _ in range(count)]
        pairs[part] = products(ops, outputs, inputs, part == "gate_up")
    size = sum(w.numel() * w.element_size() for each in weights.values() for w in each)
    print(f"{name}: us a matrix, here / cuBLAS; the sum in ms (TB/s)")
    for count in tokens:
        xs = {part: torch.randn(count, w[0].shape[1], dtype=dtype, device=device) for part, w in weights.items()}
        cells: list[str] = []
        for part, each in weights.items():
            error = check(pairs[part][0], xs[part], each[0], part == "gate_up")
            assert error < 1e-2, f"{name} {part} at {count} tokens is wrong by {error:.2e}"
            work = [(xs[part], w) for w in each]
            times = [graph_ms(calls(product, work)) / len(each) * 1e3 for product in pairs[part]]
            cells.append(f"{part} {times[0]:.2f} / {times[1]:.2f}")
        work = [(part, xs[part], w) for part, each in weights.items() for w in each]
        sums = [
            graph_ms(calls(lambda part, x, w: pairs[part][0](x, w), work)),
            graph_ms(calls(lambda part, x, w: pairs[part][1](x, w), work)),
        ]
        total = " / ".join(f"{ms:.3f} ({size / ms / 1e9:.2f})" for ms in sums)
        print(f"  {count:5d} tokens  {'  '.join(cells)}  sum {total}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=sorted(MODELS), choices=sorted(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--ops", nargs="*", default=[], metavar="op=implementation")
    args: Any = parser.parse_args()
    for name in args.models:
        measure(name, args.tokens, getattr(torch, args.dtype), dict(pair.split("=") for pair in args.ops))


if __name__ == "__main__":
    main()
