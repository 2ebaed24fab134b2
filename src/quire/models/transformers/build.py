"""The module tree of a model from its own code: parameters on the meta device, computed buffers real.

Owns: how it is made. Rotary frequencies and the like are what the model's own `__init__` computes, for code that
comes with a checkpoint as for Transformers' own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.initialization import no_init_weights

from quire.models.transformers.describe import hf_config, model_class
from quire.types.errors import ClientError

_patching = threading.Lock()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters that this thread's modules register lose their memory before anything is written to it."""
    mine, register = threading.get_ident(), nn.Module.register_parameter
    known: dict[int, nn.Parameter] = {}
    kept: list[nn.Parameter] = []  # an id is that of one parameter only as long as it lives

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and threading.get_ident() == mine and param.device.type != "meta":
            if id(param) not in known:
                known[id(param)] = nn.Parameter(param.to("meta"), requires_grad=False)
                kept.append(param)
            param = known[id(param)]
        register(self, name, param)

    with _patching:
        nn.Module.register_parameter = on_meta
        try:
            yield
        finally:
            nn.Module.register_parameter = register


def build(raw: Mapping[str, Any], folder: Path, trust_remote_code: bool, dtype: torch.dtype) -> Any:
    """The model with its head. Raises `ClientError` where its own code cannot make it."""
    config = hf_config(raw, folder, trust_remote_code)
    return make(model_class(config, raw, folder, trust_remote_code), config, dtype)


def make(made: Any, config: Any, dtype: torch.dtype, **options: Any) -> Any:
    """A model of the class `made`; see `build`."""
    before = torch.get_default_dtype()
    try:
        with torch.device("cpu"), parameters_on_meta(), no_init_weights():
            model = made._from_config(config, attn_implementation="eager", dtype=dtype, **options)
    except Exception as error:  # anything that a model's own code may raise
        text = next(iter(f"{type(error).__name__}: {error}".splitlines()))
        raise ClientError(f"{made.__name__} cannot be made from this configuration ({text})", "model") from error
    finally:
        torch.set_default_dtype(before)
    model.eval()
    model.tie_weights()
    model.requires_grad_(False)
    return model
