"""Linear layers, embeddings and the language model head. Owns: their shapes, split marks and checkpoint names.

Knows nothing of devices or sharding: passes change or replace these modules. A scheme that a pass set is applied when
the weights are there.
Shape legend: T tokens, S sampled rows, D features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor, nn

from quire.layers.slots import Part, SlotModule
from quire.ops.dispatch import Binder
from quire.ops.linear import EMBEDDING, LINEAR, QUANTIZED_EMBEDDING, QUANTIZED_LINEAR, QuantizedWeight


class Quantizes(Protocol):
    """What a quantization pass sets on a matrix."""

    def quantize(self, weight_ND: Tensor) -> QuantizedWeight: ...


class Matrix(SlotModule):
    """A module whose `weight` is a matrix that takes part in products, or is looked up in by rows."""

    weight: Tensor | QuantizedWeight

    def __init__(self, split: str | None = None) -> None:
        super().__init__(split)
        self.scheme: Quantizes | None = None
        self.op = LINEAR.reference

    def quantize(self) -> None:
        """Once loaded: apply the scheme; the loaded weight is let go."""
        if self.scheme is not None and isinstance(self.weight, Tensor):
            self.replace(self.scheme.quantize(self.weight))

    def replace(self, weight: QuantizedWeight) -> None:
        del self.weight  # a parameter cannot be overwritten with anything else
        self.weight = weight

    def bind(self, ops: Binder) -> None:
        outputs, inputs = self.weight.shape
        weight = self.weight
        if isinstance(weight, Tensor):
            self.op = ops.bind(LINEAR, inputs=inputs, outputs=outputs)
            return
        self.op = ops.bind(
            QUANTIZED_LINEAR,
            inputs=inputs,
            outputs=outputs,
            bits=weight.bits,
            group=weight.group,
            dynamic=weight.dynamic,
        )
        if (pack := getattr(self.op, "pack", None)) is not None:
            self.weight = pack(weight)


class Linear(Matrix):
    """y = x W^T + b. `transposed`: the checkpoint stores W as (in, out), as GPT-2's Conv1D does."""

    bias: Tensor | None

    def __init__(
        self, inputs: int, outputs: int, bias: bool = False, split: str | None = None, transposed: bool = False
    ) -> None:
        super().__init__(split)
        shape = (inputs, outputs) if transposed else (outputs, inputs)
        self.add_slot("weight", (outputs, inputs), [Part("weight", shape, transposed=transposed)])
        if bias:
            self.add_slot("bias", (outputs,))
        else:
            self.no_slot("bias")

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.op(x_TD, self.weight, self.bias)


class MergedLinear(Matrix):
    """Several linear layers of one input as one matrix. `parts` names them (siblings of this module in the checkpoint)
    with their output sizes; `packed`: the checkpoint holds them as one tensor with this module's own name, side by side
    or in `pieces` (which part, how many outputs) if their order is another.
    """

    bias: Tensor | None

    def __init__(
        self,
        inputs: int,
        parts: Mapping[str, int],
        bias: bool = False,
        split: str | None = None,
        packed: bool = False,
        transposed: bool = False,
        pieces: Sequence[tuple[str, int]] = (),
    ) -> None:
        super().__init__(split)
        self.sizes = list(parts.values())
        total = sum(self.sizes)
        weights: list[Part] = []
        biases: list[Part] = []
        starts = dict(zip(parts, accumulate(self.sizes, initial=0), strict=False))
        at = 0
        for name, size in pieces or parts.items():
            prefix, height = ("", total) if packed else (f"../{name}.", size)
            rows = slice(at, at + size) if packed else slice(None)
            shape = (inputs, height) if transposed else (height, inputs)
            take = (slice(None), rows) if transposed else (rows, slice(None))
            weights.append(Part(prefix + "weight", shape, starts[name], size, take, transposed))
            biases.append(Part(prefix + "bias", (height,), starts[name], size, (rows,)))
            starts[name] += size
            at += size
        self.add_slot("weight", (total, inputs), weights)
        if bias:
            self.add_slot("bias", (total,), biases)
        else:
            self.no_slot("bias")

    def merged(self, x_TD: Tensor) -> Tensor:
        """All outputs side by side."""
        return self.op(x_TD, self.weight, self.bias)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, ...]:
        """One view for each part."""
        return self.merged(x_TD).split(self.sizes, dim=-1)


class Embedding(Matrix):
    """Rows of a table, by token id or by position (`offset` is added first), times `scale` in the model's type."""

    def __init__(self, count: int, size: int, offset: int = 0, split: str | None = None, scale: float = 1.0) -> None:
        super().__init__(split)
        self.offset, self.scale = offset, scale
        self.op = EMBEDDING.reference
        self.add_slot("weight", (count + offset, size))

    def bind(self, ops: Binder) -> None:
        self.dtype = ops.dtype
        self.scale = torch.tensor(self.scale, dtype=ops.dtype).item()
        op = EMBEDDING if isinstance(self.weight, Tensor) else QUANTIZED_EMBEDDING
        self.op = ops.bind(op, size=self.weight.shape[1])

    def forward(self, ids_T: Tensor, add_TD: Tensor | None = None) -> Tensor:
        """The rows of the ids, plus `add`."""
        if isinstance(self.weight, Tensor):
            return self.op(ids_T, self.weight, self.offset, add_TD, self.scale)
        return self.op(ids_T, self.weight, self.offset, self.dtype, add_TD, self.scale)


class LMHead(Matrix):
    """Logits of hidden states; `tied` to the embedding's table or with a table of its own."""

    def __init__(self, size: int, vocab_size: int, tied: Embedding | None = None) -> None:
        super().__init__("vocab")
        self._table = () if tied is None else (tied,)  # in a tuple, so as not to be a submodule twice
        if tied is None:
            self.add_slot("weight", (vocab_size, size))
        else:
            self.weight = tied.weight

    @property
    def tied(self) -> bool:
        return bool(self._table)

    def untie(self) -> None:
        """Gives a tied head memory of its own, uninitialised."""
        self._table = ()
        assert isinstance(self.weight, Tensor)
        self.weight = nn.Parameter(torch.empty_like(self.weight), requires_grad=False)

    def quantize(self) -> None:
        """A tied table is kept once: the embedding, which comes earlier in the model, has quantized it."""
        for table in self._table:
            if isinstance(table.weight, QuantizedWeight):
                self.replace(table.weight)
                return
        super().quantize()

    def forward(self, hidden_SD: Tensor, dtype: torch.dtype | None = torch.float32) -> Tensor:
        """(S, V) in `dtype`; None: that of the hidden states."""
        return self.op(hidden_SD, self.weight, None, dtype)
