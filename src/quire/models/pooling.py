"""Models that pool: the body of a language model, and what stands behind it instead of the head for tokens.

Owns: the heads for classes and sentence-transformers' dense layers. How hidden
states become one vector is the runner's. Shape legend: T tokens, S vectors, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quire.config.arch import ModelArch
from quire.config.pooling import DenseConfig, PoolingConfig
from quire.layers.slots import Part, SlotModule
from quire.layers.step import Step
from quire.models.base import CausalLM
from quire.models.bodies import body_architecture
from quire.models.registry import ModelRegistry

_UNUSED = ("lm_head.", "score.", "classifier.")  # heads that a checkpoint may have and this model has not

_FUNCTIONS = {
    "identity": lambda x: x,
    "sigmoid": torch.sigmoid,
    "softmax": lambda x: torch.softmax(x, -1),
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": F.gelu,
}


def activation(name: str, x: Tensor) -> Tensor:
    """One of `config.pooling.ACTIVATIONS`, over the last dimension."""
    return _FUNCTIONS[name](x)


class Head(SlotModule):
    """A small linear layer in float32, whatever the model computes in. `name`: that of its tensors in the checkpoint,
    without `.weight` and `.bias`, relative to this module."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, name: str, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.add_slot("weight", (outputs, inputs), [Part(f"{name}.weight", (outputs, inputs))])
        if bias:
            self.add_slot("bias", (outputs,), [Part(f"{name}.bias", (outputs,))])
        else:
            self.no_slot("bias")

    def forward(self, x_SD: Tensor) -> Tensor:
        return F.linear(x_SD.float(), self.weight.float(), None if self.bias is None else self.bias.float())


class TokenHead(SlotModule):
    """The rows of a language model's head that belong to some tokens; `difference`: the second against the first."""

    weight: Tensor

    def __init__(self, source: str, vocab: int, size: int, tokens: tuple[int, ...], difference: bool) -> None:
        super().__init__()
        self._difference = difference
        parts = [
            Part(source, (vocab, size), i, 1, (slice(token, token + 1), slice(None))) for i, token in enumerate(tokens)
        ]
        self.add_slot("weight", (len(tokens), size), parts)

    def forward(self, x_SD: Tensor) -> Tensor:
        logits_SC = F.linear(x_SD.float(), self.weight.float())
        return logits_SC[:, 1:2] - logits_SC[:, :1] if self._difference else logits_SC


class Dense(nn.Module):
    """sentence-transformers' module of that name; its weights are in a folder of their own, and join the model when
    they are loaded (`loading/pooling.py`)."""

    def __init__(self, config: DenseConfig) -> None:
        super().__init__()
        self.config = config
        self.linear = Head("../linear", config.inputs, config.outputs, config.bias)

    def forward(self, x_SD: Tensor) -> Tensor:
        return activation(self.config.activation, self.linear(x_SD))


class PoolingModel(nn.Module):
    """The body of a language model named as in the checkpoint (`prefix`), and its heads."""

    unused = _UNUSED

    def __init__(self, arch: ModelArch, config: PoolingConfig, registered: Mapping[str, str]) -> None:
        """`registered`: models by name that came from another process."""
        super().__init__()
        self.arch = arch
        whole: CausalLM = ModelRegistry.resolve([body_architecture(arch.architecture)], registered)(arch)
        self.prefix = whole.prefix
        self.add_module(self.prefix, whole.get_submodule(self.prefix))
        size = whole.lm_head.weight.shape[1]
        self.heads = nn.ModuleList(_heads(whole, size, config))
        self.dense = nn.ModuleList()

    def forward(self, tokens_T: Tensor, positions_T: Tensor, step: Step) -> Tensor:
        """Token ids and positions (int64) of the ragged batch -> hidden states (T, D), in the model's dtype."""
        return self.get_submodule(self.prefix)(tokens_T, positions_T, step)

    def classify(self, x_SD: Tensor) -> Tensor:
        """Logits (S, C), float32."""
        for i, head in enumerate(self.heads):
            x_SD = head(torch.relu(x_SD) if i else x_SD)
        return x_SD

    def project(self, x_SD: Tensor) -> Tensor:
        """Embeddings of pooled vectors, float32."""
        return project(self.dense, x_SD)


def project(layers: nn.ModuleList, x_SD: Tensor) -> Tensor:
    """Pooled vectors through sentence-transformers' dense layers, float32."""
    x_SD = x_SD.float()
    for dense in layers:
        x_SD = dense(x_SD)
    return x_SD


def _heads(whole: CausalLM, size: int, config: PoolingConfig) -> list[nn.Module]:
    if config.tokens:
        vocab = whole.lm_head.weight.shape[0]
        tied = f"{whole.prefix}.{whole.embedding_path}.weight"
        source = tied if whole.lm_head.tied else "lm_head.weight"
        return [TokenHead(f"../../{source}", vocab, size, config.tokens, config.difference)]
    sizes = [size] * len(config.head) + [len(config.labels)]
    # A head for each token, or of several layers, has biases in Transformers' classes; one for sequences has none.
    bias = config.per_token
    return [
        Head(f"../../{name}", inputs, outputs, bias)
        for name, (inputs, outputs) in zip(config.head, pairwise(sizes), strict=True)
    ]
