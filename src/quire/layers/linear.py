"""Linear layers, embeddings and the language model head. Owns: their shapes, split marks and checkpoint names.

Knows nothing of devices, sharding or quantization: passes change or replace these modules.
Shape legend: T tokens, S sampled rows, D features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quire.layers.slots import Part, SlotModule
from quire.ops.dispatch import Binder
from quire.ops.linear import LINEAR


class Linear(SlotModule):
    """y = x W^T + b. `transposed`: the checkpoint stores W as (in, out), as GPT-2's Conv1D does."""

    weight: Tensor
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
        self.op = LINEAR.reference

    def bind(self, ops: Binder) -> None:
        self.op = ops.bind(LINEAR, inputs=self.weight.shape[1], outputs=self.weight.shape[0])

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.op(x_TD, self.weight, self.bias)


class MergedLinear(SlotModule):
    """Several linear layers of one input as one matrix. `parts` names them (siblings of this module in the checkpoint)
    with their output sizes; `packed`: the checkpoint holds them as one tensor with this module's own name.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        inputs: int,
        parts: Mapping[str, int],
        bias: bool = False,
        split: str | None = None,
        packed: bool = False,
        transposed: bool = False,
    ) -> None:
        super().__init__(split)
        self.sizes = list(parts.values())
        total = sum(self.sizes)
        weights: list[Part] = []
        biases: list[Part] = []
        start = 0
        for name, size in parts.items():
            prefix, height = ("", total) if packed else (f"../{name}.", size)
            rows = slice(start, start + size) if packed else slice(None)
            shape = (inputs, height) if transposed else (height, inputs)
            take = (slice(None), rows) if transposed else (rows, slice(None))
            weights.append(Part(prefix + "weight", shape, start, size, take, transposed))
            biases.append(Part(prefix + "bias", (height,), start, size, (rows,)))
            start += size
        self.add_slot("weight", (total, inputs), weights)
        if bias:
            self.add_slot("bias", (total,), biases)
        else:
            self.no_slot("bias")
        self.op = LINEAR.reference

    def bind(self, ops: Binder) -> None:
        self.op = ops.bind(LINEAR, inputs=self.weight.shape[1], outputs=self.weight.shape[0])

    def merged(self, x_TD: Tensor) -> Tensor:
        """All outputs side by side."""
        return self.op(x_TD, self.weight, self.bias)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, ...]:
        """One view for each part."""
        return self.merged(x_TD).split(self.sizes, dim=-1)


class Embedding(SlotModule):
    """Rows of a table, by token id or by position (`offset` is added first)."""

    weight: Tensor

    def __init__(self, count: int, size: int, offset: int = 0, split: str | None = None) -> None:
        super().__init__(split)
        self.offset = offset
        self.add_slot("weight", (count + offset, size))

    def forward(self, ids_T: Tensor) -> Tensor:
        return F.embedding(ids_T + self.offset if self.offset else ids_T, self.weight)


class LMHead(SlotModule):
    """Logits of hidden states; `tied` to the embedding's table or with a table of its own."""

    weight: Tensor

    def __init__(self, size: int, vocab_size: int, tied: Embedding | None = None) -> None:
        super().__init__("vocab")
        self.tied = tied is not None
        if tied is None:
            self.add_slot("weight", (vocab_size, size))
        else:
            self.weight = tied.weight
        self.op = LINEAR.reference

    def bind(self, ops: Binder) -> None:
        self.op = ops.bind(LINEAR, inputs=self.weight.shape[1], outputs=self.weight.shape[0])

    def untie(self) -> None:
        """Gives a tied head memory of its own, uninitialised."""
        self.tied = False
        self.weight = nn.Parameter(torch.empty_like(self.weight), requires_grad=False)

    def forward(self, hidden_SD: Tensor) -> Tensor:
        return self.op(hidden_SD, self.weight, None).to(torch.float32)
