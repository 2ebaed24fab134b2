"""Operations of the native library from tensors: one function for each op code, and `Program`, a list of them.

Owns: how tensors become pointers, strides and counts (csrc/cpu/quire.h says what each field means). Knows no modules.
An operation holds raw pointers: the caller keeps the tensors alive. Counts are numbers, or `dim(k)` for entry k of the
`Dims` that a program runs with.

Shape legend: T tokens, D features, N outputs, K inputs or KV heads, H query heads, E head size, S rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quire.ops.native.library import Dims, Operation, Pool

if TYPE_CHECKING:
    from quire.ops.linear import QuantizedWeight

NOP, LINEAR, RMS_NORM, LAYER_NORM, ACTIVATION, GATHER, SAMPLE, HEADS, ATTENTION, ARGMAX, LINEAR_Q, ADD = range(12)
GATED, SOLO, WIDE = 1 << 16, 1 << 17, 1 << 18
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
INT8 = 3

_GELU_TANH = ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh")
KINDS = {
    "linear": 0, "silu": 1, "swish": 1, "gelu": 2, "gelu_python": 2, **dict.fromkeys(_GELU_TANH, 3), "quick_gelu": 4,
    "relu": 5, "relu2": 6, "relu6": 7, "tanh": 8, "sigmoid": 9,
}  # fmt: skip

# An operation on fewer numbers than this runs on the calling thread: waking another costs more than it saves.
SMALL = 1 << 13


def dim(k: int) -> int:
    """A count that is read from entry `k` of the `Dims` at run time."""
    return -1 - k


def make(
    op: int, flags: int, pointers: Sequence[Tensor | None], ints: Sequence[int], floats: Sequence[float] = ()
) -> Operation:
    made = Operation(op, flags)
    p = made.p
    for n, tensor in enumerate(pointers):
        if tensor is not None:
            p[n] = tensor.data_ptr()
    made.i[: len(ints)] = ints
    if floats:
        made.f[: len(floats)] = floats
    return made


def stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _small(tokens: int, width: int) -> int:
    return SOLO if 0 <= tokens * width < SMALL else 0


def _wide(weight: Tensor | None, x: Tensor) -> int:
    """Whether the weight of an RMSNorm is kept in float32 beside numbers of a smaller type."""
    return WIDE if weight is not None and weight.dtype != x.dtype else 0


def _cache(kv: Tensor | None) -> int:
    """B of the operations on a KV cache."""
    return INT8 << 4 if kv is not None and kv.dtype == torch.int8 else 0


def linear(
    x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, out_TN: Tensor, tokens: int, kind: str = "linear",
    gated: bool = False, add_TN: Tensor | None = None,
) -> Operation:  # fmt: skip
    """out = kind(x W^T + bias) + add; `gated`: W has 2N rows, out = kind(first N outputs) * last N."""
    flags = TYPES[x_TK.dtype] | TYPES[out_TN.dtype] << 8 | KINDS[kind] << 12 | (GATED if gated else 0)
    outputs, inputs = weight_NK.shape
    ints = (tokens, outputs // 2 if gated else outputs, inputs, stride(x_TK), stride(weight_NK), stride(out_TN),
            stride(add_TN))  # fmt: skip
    return make(LINEAR, flags | _small(1, inputs * outputs), (x_TK, weight_NK, bias_N, out_TN, add_TN), ints)


def quantized_linear(
    x_TK: Tensor, weight: QuantizedWeight, bias_N: Tensor | None, out_TN: Tensor, tokens: int, kind: str = "linear",
    gated: bool = False, add_TN: Tensor | None = None,
) -> Operation:  # fmt: skip
    """As `linear`, with a weight in 8 or 4 bits."""
    flags = TYPES[x_TK.dtype] | TYPES[out_TN.dtype] << 8 | KINDS[kind] << 12 | (GATED if gated else 0)
    outputs, inputs = weight.shape
    ints = (tokens, outputs // 2 if gated else outputs, inputs, stride(x_TK), stride(weight.q), stride(out_TN),
            stride(add_TN), weight.bits, weight.group, int(weight.dynamic))  # fmt: skip
    pointers = (x_TK, weight.q, bias_N, out_TN, add_TN, weight.scale_NG)
    return make(LINEAR_Q, flags | _small(1, inputs * outputs), pointers, ints)


def computes(operation: Operation, x_TN: Tensor) -> bool:
    """Whether an operation is a linear layer, and nothing more, that computes `x`."""
    plain = operation.op in (LINEAR, LINEAR_Q) and not operation.flags & (GATED | 15 << 12) and not operation.p[4]
    return plain and operation.p[3] == x_TN.data_ptr() and operation.i[1] == x_TN.shape[-1]


def gated(linear: Operation, out: int, kind: str) -> Operation:
    """A linear layer of 2N outputs with the gated activation of them, N dense outputs at `out`."""
    made = Operation.from_buffer_copy(linear)
    made.flags |= KINDS[kind] << 12 | GATED
    made.p[3] = out
    made.i[1] = made.i[5] = linear.i[1] // 2
    return made


def norm(
    op: int, x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor | None, bias_D: Tensor | None, out_TD: Tensor,
    total_TD: Tensor | None, eps: float, tokens: int,
) -> Operation:  # fmt: skip
    """total = x + residual; out = norm(total). `total` is needed where there is a residual, and may be the residual."""
    size = x_TD.shape[-1]
    ints = (tokens, size, stride(x_TD), stride(residual_TD), stride(out_TD), stride(total_TD))
    pointers = (x_TD, residual_TD, weight_D, out_TD, total_TD, bias_D)
    flags = TYPES[x_TD.dtype] | _small(tokens, size) | (_wide(weight_D, x_TD) if op == RMS_NORM else 0)
    return make(op, flags, pointers, ints, (eps,))


def activation(x_TD: Tensor, out_TD: Tensor, kind: str, gated: bool, tokens: int) -> Operation:
    """out = kind(x), `gated`: kind(first half) * second half."""
    size = out_TD.shape[1]
    flags = TYPES[x_TD.dtype] | KINDS[kind] << 12 | (GATED if gated else 0) | _small(tokens, 4 * size)
    return make(ACTIVATION, flags, (x_TD, out_TD), (tokens, size, stride(x_TD), stride(out_TD)))


def softcap(x_TD: Tensor, out_TD: Tensor, cap: float, tokens: int) -> Operation:
    """out = cap * tanh(x / cap)."""
    made = activation(x_TD, out_TD, "tanh", False, tokens)
    made.f[0] = cap
    return made


def gather(
    ids_T: Tensor, table_VD: Tensor, out_TD: Tensor, tokens: int, offset: int = 0, add_TD: Tensor | None = None,
    scale: float = 1.0,
) -> Operation:  # fmt: skip
    """out = table[ids + offset] * scale + add."""
    rows, size = table_VD.shape
    ints = (tokens, size, rows, stride(table_VD), stride(out_TD), offset, stride(add_TD))
    flags = TYPES[table_VD.dtype] | _small(tokens, size)
    return make(GATHER, flags, (ids_T, table_VD, out_TD, add_TD), ints, (scale,))


def quantized_gather(
    ids_T: Tensor, table: QuantizedWeight, out_TD: Tensor, tokens: int, offset: int = 0, add_TD: Tensor | None = None,
    scale: float = 1.0,
) -> Operation:  # fmt: skip
    """As `gather`, from a table in 8 bits with one scale for each row."""
    rows, size = table.shape
    ints = (tokens, size, rows, stride(table.q), stride(out_TD), offset, stride(add_TD))
    flags = TYPES[out_TD.dtype] | INT8 << 4 | _small(tokens, size)
    return make(GATHER, flags, (ids_T, table.q, out_TD, add_TD, table.scale_NG), ints, (scale,))


def add(a_TD: Tensor, b_TD: Tensor, out_TD: Tensor, tokens: int) -> Operation:
    size = a_TD.shape[1]
    ints = (tokens, size, stride(a_TD), stride(b_TD), stride(out_TD))
    return make(ADD, TYPES[a_TD.dtype] | _small(tokens, size), (a_TD, b_TD, out_TD), ints)


def heads(
    q_THE: Tensor | None, k_TKE: Tensor | None, v_TKE: Tensor | None, tokens: int, *, table_2LF: Tensor | None = None,
    positions_T: Tensor | None = None, slots_T: Tensor | None = None, kv: Tensor | None = None,
    q_out_THE: Tensor | None = None, q_norm_E: Tensor | None = None, k_norm_E: Tensor | None = None, eps: float = 0.0,
) -> Operation:  # fmt: skip
    """Head norm, rotation and KV write, each where its tensors are given. `kv`: (2, N, B, K, E), or in int8 as
    `ops.cache` says."""
    some = next(x for x in (q_THE, k_TKE, v_TKE) if x is not None)
    h_q = 0 if q_THE is None else q_THE.shape[1]
    h_kv = next((x.shape[1] for x in (k_TKE, v_TKE) if x is not None), 0)
    length, half = (0, 0) if table_2LF is None else table_2LF.shape[1:]
    ints = (tokens, h_q, h_kv, some.shape[2], half, length, stride(q_THE), stride(k_TKE), stride(v_TKE),
            stride(q_out_THE), *((0, 0) if kv is None else kv.stride()[2:4]))  # fmt: skip
    keys, values = (None, None) if kv is None else (kv[0], kv[1])
    pointers = (q_THE, k_TKE, v_TKE, table_2LF, positions_T, slots_T, keys, values, q_out_THE, q_norm_E,
                k_norm_E)  # fmt: skip
    flags = TYPES[some.dtype] | _cache(kv) | _wide(q_norm_E, some) | _small(tokens, (h_q + 2 * h_kv) * some.shape[2])
    return make(HEADS, flags, pointers, ints, (eps,))


def attention(
    q_THE: Tensor, kv: Tensor, block_tables_RP: Tensor, lengths_R: Tensor, cu_q: Tensor, out_THE: Tensor, rows: int,
    decodes: int, scale: float, window: int | None = None, softcap: float | None = None, slopes_H: Tensor | None = None,
) -> Operation:  # fmt: skip
    """Attention of `rows` rows, the first `decodes` of one token each, over pages (2, N, B, K, E), or int8."""
    block, kv_heads = kv.shape[2:4]
    ints = (rows, decodes, q_THE.shape[1], kv_heads, q_THE.shape[2], block, stride(block_tables_RP), stride(q_THE),
            stride(out_THE), kv.stride(2), window or 0, kv.stride(3))  # fmt: skip
    pointers = (q_THE, kv[0], kv[1], block_tables_RP, lengths_R, cu_q, out_THE, slopes_H)
    return make(ATTENTION, TYPES[q_THE.dtype] | _cache(kv), pointers, ints, (scale, softcap or 0.0))


def argmax(x_SV: Tensor, index_S: Tensor, value_S: Tensor | None, rows: int) -> Operation:
    """Index (int64) and value (float32) of the largest number of each row, as `ops.sampling.draw_greedy`."""
    flags = TYPES[x_SV.dtype] | _small(rows, x_SV.shape[1])
    return make(ARGMAX, flags, (x_SV, index_S, value_S), (rows, x_SV.shape[1], stride(x_SV)))


def sample(
    x_SV: Tensor, temperature_S: Tensor, log_min_p_S: Tensor, top_k_S: Tensor, top_p_S: Tensor, greedy_S: Tensor,
    noise: Sequence[Tensor], tokens_S: Tensor, top_S: Tensor, low_S: Tensor, rows: int,
) -> Operation:  # fmt: skip
    """A token of each row as `ops.sampling.sample` (whose arguments these are), -1 where this cannot tell."""
    pointers = (x_SV, temperature_S, log_min_p_S, top_k_S, top_p_S, greedy_S, *noise, tokens_S, top_S, low_S)
    return make(SAMPLE, _small(rows, x_SV.shape[1]), pointers, (rows, x_SV.shape[1], stride(x_SV)))


class Program:
    """Operations in order over fixed buffers, recorded once and run with the sizes of each step."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        self._operations = (Operation * len(operations))(*operations)
        self._count = len(operations)
        self.dims = Dims()

    def __len__(self) -> int:
        return self._count

    def run(self, pool: Pool) -> None:
        pool.run(self._operations, self._count, self.dims)
