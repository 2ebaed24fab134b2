"""Fixtures of the parity tests. The folder is put on the path so that any import mode finds the harness."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import parity_harness


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`checkpoint(arch, **overrides) -> folder`, each made once a session."""
    root = tmp_path_factory.mktemp("checkpoints")

    def make(arch: str, **overrides: Any) -> Path:
        return parity_harness.make_checkpoint(root, arch, **overrides)

    return make


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny shapes lose by threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
