"""From an architecture to a model that runs: a list of passes over the module tree.

Owns: the order meta -> stage -> shard -> quantize -> materialise -> load -> finish, and `load_model`, the one entry.
Knows no architecture by name. A feature that is off is a pass that does nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from quire.config.schema import Config
from quire.layers.linear import Matrix
from quire.loading.mapped import map_parameters
from quire.loading.pooling import load_dense
from quire.loading.weights import load_weights
from quire.models.choice import ENCODER, TRANSFORMERS, backend_class, encoder_class
from quire.models.pooling import PoolingModel
from quire.models.registry import ModelRegistry
from quire.ops.dispatch import Binder
from quire.quantization import SCHEMES, Scheme, mark_layers
from quire.types.errors import ClientError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadContext:
    """What a pass may ask about."""

    config: Config
    device: torch.device
    dtype: torch.dtype
    ops: Binder


class Pass(Protocol):
    """Changes the model in place."""

    def __call__(self, model: nn.Module, context: LoadContext) -> None: ...


class Whole:
    """The pass of a feature that is off (stage and shard on one device, say): every layer stays as it is."""

    def __call__(self, model: nn.Module, context: LoadContext) -> None:
        pass


class Materialise:
    """Gives every parameter memory on the device: on a CPU that of the checkpoint's file where it holds the parameter
    as it is, else uninitialised. Parameters that are one (a tied head) stay one."""

    def __call__(self, model: nn.Module, context: LoadContext) -> None:
        made: dict[int, nn.Parameter] = {}
        mapped: dict[int, torch.Tensor] = {}
        if context.device.type == "cpu":
            config = context.config
            mapped = map_parameters(model, config.model.path, config.load.load_format, context.dtype)
        for module in model.modules():
            for name, old in list(module.named_parameters(recurse=False)):
                if id(old) not in made:
                    new = mapped.get(id(old))
                    if new is None:
                        new = torch.empty(old.shape, dtype=context.dtype, device=context.device)
                    made[id(old)] = nn.Parameter(new, requires_grad=False)
                setattr(module, name, made[id(old)])


class Load:
    """Checkpoint tensors into the slots."""

    @torch.no_grad()
    def __call__(self, model: nn.Module, context: LoadContext) -> None:
        config = context.config
        load_weights(model, config.model.path, config.load.load_format, config.model.seed)


@runtime_checkable
class Builds(Protocol):
    """A module with tensors that are computed, not loaded, once the longest sequence (in tokens) is known."""

    def build(self, length: int, device: torch.device) -> None: ...


@runtime_checkable
class Binds(Protocol):
    """A module that runs ops."""

    def bind(self, ops: Binder) -> None: ...


@runtime_checkable
class Proves(Protocol):
    """A model whose code is not quire's: what it does is tried before it runs."""

    def prove(self, config: Config, device: torch.device, dtype: torch.dtype, ops: Binder) -> None: ...


class Quantize:
    """Marks the layers that the scheme changes; `Finish` changes them, when their weights are there."""

    def __init__(self, scheme: Scheme) -> None:
        self._scheme = scheme

    def __call__(self, model: nn.Module, context: LoadContext) -> None:
        mark_layers(model, self._scheme)


class Finish:
    """Quantizes, makes computed tensors and binds the ops, module by module, each source freed before the next."""

    def __call__(self, model: nn.Module, context: LoadContext) -> None:
        for module in model.modules():
            if isinstance(module, Matrix):
                module.quantize()
            if isinstance(module, Builds):
                module.build(context.config.model.max_model_len, context.device)
            if isinstance(module, Binds):
                module.bind(context.ops)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            assert tensor.device.type != "meta", f"{name} was never given memory"


def passes(quantization: str | None = None) -> list[tuple[str, Pass]]:
    """The passes by name, in order, for one device."""
    return [
        ("stage", Whole()),
        ("shard", Whole()),
        ("quantize", Whole() if quantization is None else Quantize(SCHEMES[quantization])),
        ("materialise", Materialise()),
        ("load", Load()),
        ("finish", Finish()),
    ]


def load_model(config: Config, device: torch.device, ops: Binder | None = None) -> nn.Module:
    """The model of `config`, loaded and ready to run on `device` (see `models.base.CausalLM` for what it can do).

    `ops` chooses the implementations and can report them; one is made where None is given.
    Raises `ClientError` for unknown architectures and for checkpoints that do not fit.
    """
    dtype = DTYPES.get(config.model.dtype)
    if dtype is None:
        raise ClientError(
            f"dtype {config.model.dtype!r} is not known; there are {', '.join(DTYPES)}", "dtype", config.model.dtype
        )
    context = LoadContext(config, device, dtype, ops or Binder(device, dtype))
    model = build_model(config, dtype)
    for _, change in passes(config.model.quantization):
        change(model, context)
    if config.pooling is not None:  # a folder of their own
        model.dense = load_dense(config.pooling.dense, config.load.load_format, device)
    if isinstance(model, Proves):
        model.prove(config, device, dtype, context.ops)
    return model.eval()


def build_model(config: Config, dtype: torch.dtype) -> nn.Module:
    """The module tree, parameters on the meta device. Raises `ClientError` for what no class implements."""
    if config.model.model_impl == ENCODER:
        return encoder_class()(config, dtype)
    if config.model.model_impl == TRANSFORMERS:
        return backend_class()(config, dtype)
    arch = config.model.arch
    with torch.device("meta"):
        if config.pooling is not None:
            return PoolingModel(arch, config.pooling, config.model.registered)
        return ModelRegistry.resolve([arch.architecture], config.model.registered)(arch)
