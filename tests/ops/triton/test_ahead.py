"""Kernels that are compiled before they are launched: which, and that nothing else becomes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from quire import LLM
from quire.ops.dispatch import Case, Choice
from quire.ops.norm import RMS_NORM
from quire.ops.triton import norm
from quire.ops.triton.ahead import AHEAD, Ahead, NotAhead, make_ahead
from quire.runner.graphs import Graphs, Layout, decode_sizes, row_sizes, token_sizes
from quire.runner.record import PlainRecorder

KERNELS = (
    "linear", "gated_linear", "embedding", "attention", "heads", "rms_norm", "gated_activation", "decode_batch",
    "ragged_batch", "update_rows", "draw_step", "sample",
)  # fmt: skip


def test_a_kernel_is_compiled_and_not_launched_then_launched(device: torch.device) -> None:
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(1)).to(device)
    weight = torch.full((40,), 1.5, device=device)
    plain = norm._norm_kernel

    def call(out: torch.Tensor) -> None:
        constants = (40, 0, 1e-5, 40, 64, False)
        plain((3, 1, 1), (x, None, weight, None, out, x), constants=constants, warps=1)

    ahead = Ahead(device)
    out = torch.full_like(x, 7.0)
    with ahead:
        call(out)
        call(out)
        assert AHEAD.get() is ahead
    ahead.close()
    assert AHEAD.get() is None and len(ahead.known) == 1
    assert torch.equal(out, torch.full_like(x, 7.0)), "it was not launched"
    call(out)
    assert torch.allclose(out, RMS_NORM.reference(x, None, weight, 1e-5)[0], rtol=1e-5)


def test_what_fails_ahead_is_left_for_later(device: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "quire")
    ahead = Ahead(device)
    ahead.foresee(lambda: 1 / 0)  # type: ignore
    assert AHEAD.get() is None and "ZeroDivisionError" in caplog.text
    ahead.close()


@pytest.fixture
def graphs(make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Graphs:
    """Of a tiny model whose ops are kernels, for 300 rows."""
    folder = make_checkpoint(torch_dtype="bfloat16", hidden_size=64, head_dim=16, vocab_size=160)
    options: dict[str, Any] = {"dtype": "bfloat16", "max_model_len": 96, "max_num_seqs": 300, "device": "cpu"}
    if torch.cuda.is_available():
        options["device"] = "cuda"
    llm = LLM(
        str(folder), load_format="dummy", skip_tokenizer_init=True, enforce_eager=True,
        kv_cache_memory_bytes=1 << 20, max_num_batched_tokens=1024, ops=dict.fromkeys(KERNELS, "triton"), **options,
    )  # fmt: skip
    client: Any = llm.llm_engine.client
    worker = client._executor.worker
    runner = worker._runner
    return Graphs(
        runner._model, runner._table, runner._store, worker.ops, worker.device, 1024, 2, 1024, PlainRecorder()
    )


def test_all_kernels_of_all_sizes_are_foreseen(graphs: Graphs) -> None:
    device = graphs._device
    foreseen, used = Ahead(device), Ahead(device)
    foreseen.foresee(graphs.foresee)

    def every_size() -> None:
        graphs.prepare()
        with torch.inference_mode():
            for size in decode_sizes(300):
                graphs._forward_decodes(size)
            for tokens in token_sizes(1024):
                for rows in row_sizes(300):
                    graphs._forward_ragged(Layout(tokens, rows), None)

    with used:
        every_size()
    assert len(used.known) > 15
    names = sorted({key[0]._jit.__name__ for key in used.known - foreseen.known})  # type: ignore
    assert not names, "kernels that a start would have compiled one after the other"
    for each in (foreseen, used):
        each.close()


def test_where_nothing_can_be_foreseen() -> None:
    for compiler in (make_ahead(torch.device("cpu")), Ahead(torch.device("cpu")).serves(_Ops("reference"), KV)):
        assert isinstance(compiler, NotAhead)
        with compiler:
            assert AHEAD.get() is None
        compiler.foresee(lambda: pytest.fail("it would be run"))
        compiler.close()
    ahead = Ahead(torch.device("cpu"))
    assert isinstance(ahead.serves(_Ops("triton"), torch.int8), NotAhead)
    ahead = Ahead(torch.device("cpu"))
    assert ahead.serves(_Ops("triton"), KV) is ahead
    ahead.close()


KV = torch.bfloat16


class _Ops(Any if TYPE_CHECKING else object):
    """As if attention were bound to the implementation of this name."""

    def __init__(self, chosen: str) -> None:
        self._chosen = chosen

    def report(self) -> list[Choice]:
        return [Choice("attention", Case(torch.device("cpu"), KV), self._chosen, ())]
