"""Fixtures that every package's tests share. Owns: checkpoint folders made on the fly, without weights."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before any test imports torch or tokenizers: two test processes share two cores, so each op gets one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach the network

# Triton decides once, when it is imported, whether its interpreter runs its kernels: for tests/ops/triton it does,
# and torch may import it before those are reached. No other test is to find the variable.
if importlib.util.find_spec("triton") is not None and not os.path.exists("/dev/nvidiactl"):
    os.environ["TRITON_INTERPRET"] = "1"
    importlib.import_module("triton")
    del os.environ["TRITON_INTERPRET"]

TINY_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


def pytest_configure() -> None:
    """Hypothesis: no deadline, since the machines that run this differ, and the same examples in each run, so that a
    change is judged by itself; `make soak` draws many more, other ones each time."""
    from hypothesis import settings

    settings.register_profile("quire", deadline=None, derandomize=True)
    settings.register_profile("soak", deadline=None, max_examples=2000)
    if settings.get_current_profile_name() == "default":
        settings.load_profile("quire")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where torch sees no CUDA device (torch is imported only if there are any)."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a checkpoint folder: config.json (a tiny Llama, changed by the keyword arguments; None
    removes an entry) and, where `generation` is given, generation_config.json."""

    def make(generation: dict[str, Any] | None = None, name: str = "model", **changes: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        config = {k: v for k, v in {**TINY_LLAMA, **changes}.items() if v is not None}
        (folder / "config.json").write_text(json.dumps(config))
        if generation is not None:
            (folder / "generation_config.json").write_text(json.dumps(generation))
        return folder

    return make


@pytest.fixture
def default_ctrl_c() -> Iterator[None]:
    """Python's own answer to Ctrl-C, which a process that was started in the background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _quire_log_untouched() -> Iterator[None]:
    """Tests that set up logging leave no handler or level behind."""
    logger = logging.getLogger("quire")
    level, handlers = logger.level, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers
