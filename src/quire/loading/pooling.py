"""sentence-transformers' dense layers, each from its folder beside the model. Owns: how they are made and filled."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from quire.config.pooling import DenseConfig
from quire.loading.weights import load_weights
from quire.models.pooling import Dense


@torch.no_grad()
def load_dense(layers: Iterable[DenseConfig], load_format: str, device: torch.device) -> nn.ModuleList:
    """In float32, as sentence-transformers has them. Raises `ClientError` for folders that do not hold them."""
    loaded = nn.ModuleList()
    for config in layers:
        with torch.device("meta"):
            dense = Dense(config)
        dense.to_empty(device=device)
        load_weights(dense, config.folder, load_format)
        loaded.append(dense)
    return loaded
