"""Recorded steps give what eager ones give, and models that cannot be recorded run eagerly."""

from __future__ import annotations

import ctypes
import json
import mmap
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from quire import LLM, SamplingParams
from quire.ops.native.bound import most_tokens
from quire.ops.native.kernels import ANY, Kernels
from quire.ops.native.library import Pool, load
from quire.ops.native.recorder import Buffers, record
from quire.runner.replay import HostReplay, NoReplay

needs_library = pytest.mark.skipif(isinstance(load(), str), reason=str(load()))
STEP, ROWS = 150, 5
NATIVE: Any = None if isinstance(load(), str) else Kernels(Pool(2))
PROMPTS = [[(7 * i + 3 * j) % 2000 + 10 for j in range(n)] for i, n in enumerate((1, 3, 90, 17, 33, 5))]


def replay_of(llm: LLM) -> Any:
    client: Any = llm.llm_engine.client
    return client._executor.worker._runner._replay


def resident(array: NDArray[np.uint8]) -> int:
    """Bytes of it that the system has given memory to."""
    size = mmap.PAGESIZE
    pages = (ctypes.c_ubyte * -(-array.nbytes // size))()
    assert not ctypes.CDLL(None).mincore(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes), pages)
    return size * sum(page & 1 for page in pages)


def run(**options: Any) -> tuple[list[Any], int]:
    """What is visible, and how many steps were replayed."""
    with LLM("demo", dtype="float32", max_model_len=160, skip_tokenizer_init=True, **options) as llm:
        replay, count = replay_of(llm), [0]
        plain = replay.run

        def counted(*given: Any) -> Any:
            count[0] += 1
            return plain(*given)

        replay.run = counted
        common: dict[str, Any] = {"max_tokens": 20, "ignore_eos": True, "detokenize": False}
        params = [
            SamplingParams(temperature=0.0, **common),
            SamplingParams(temperature=0.9, seed=3, n=2, **common),
            SamplingParams(temperature=0.0, logprobs=2, prompt_logprobs=1, **common),
            SamplingParams(temperature=1.0, top_k=9, seed=1, repetition_penalty=1.2, **common),
            SamplingParams(temperature=0.0, min_tokens=4, **common),
            SamplingParams(temperature=0.0, **common),
        ]
        outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], params, use_tqdm=False)
        assert options.get("num_gpu_blocks_override") is None or llm.llm_engine.stat_logger.stats.preemptions > 0
        return [[list(c.token_ids) for c in output.outputs] for output in outputs], count[0]


@needs_library
@pytest.mark.parametrize("options", [{}, {"num_gpu_blocks_override": 14}, {"max_num_batched_tokens": 24}], ids=str)
def test_recorded_steps_equal_eager_ones(options: dict[str, Any]) -> None:
    recorded, replays = run(**options)
    eager, none = run(enforce_eager=True, **options)
    assert recorded == eager
    assert replays >= 19
    assert none == 0


@pytest.fixture(scope="module")
def engines() -> Iterator[tuple[LLM, LLM]]:
    """One that records its steps and one that does not; both in float32."""
    common: dict[str, Any] = {"dtype": "float32", "max_model_len": 400, "skip_tokenizer_init": True}
    common |= {"max_num_batched_tokens": STEP, "max_num_seqs": ROWS, "enable_prefix_caching": False}
    with LLM("demo", **common) as recorded, LLM("demo", enforce_eager=True, **common) as eager:
        yield recorded, eager


@needs_library
@given(st.lists(st.tuples(st.integers(1, 390), st.integers(1, 8)), min_size=1, max_size=7))
@example([(STEP, 2)])
@example([(STEP + 1, 2), (1, 8)])
@settings(max_examples=12, deadline=None)
def test_steps_of_any_size_are_recorded(engines: tuple[LLM, LLM], shapes: list[tuple[int, int]]) -> None:
    """Prefill, decode and both mixed, up to the largest step there is, with the same logits to the last bit."""
    prompts = [
        {"prompt_token_ids": [(11 * i + 7 * j) % 2000 + 10 for j in range(n)]} for i, (n, _) in enumerate(shapes)
    ]
    params = [
        SamplingParams(temperature=0.0, max_tokens=m, logprobs=3, ignore_eos=True, detokenize=False) for _, m in shapes
    ]
    replay = replay_of(engines[0])
    assert isinstance(replay, HostReplay) and isinstance(replay_of(engines[1]), NoReplay)
    watch: Any = replay
    sizes: list[int] = []
    taken: list[bool] = []
    takes, most = replay.takes, STEP

    def watched(plan: Any) -> bool:
        if len(plan.rows):
            sizes.append(int(plan.counts.sum()))
            taken.append(takes(plan))
        return takes(plan)

    watch.takes = watched
    try:
        recorded, eager = ([o.outputs[0] for o in llm.generate(prompts, params, use_tqdm=False)] for llm in engines)
    finally:
        watch.takes = takes
    assert max(sizes) == min(STEP, sum(n for n, _ in shapes[:ROWS]))
    assert taken == [size <= most for size in sizes]
    assert [c.token_ids for c in recorded] == [c.token_ids for c in eager]
    assert [c.logprobs for c in recorded] == [c.logprobs for c in eager]


@needs_library
def test_only_plain_bf16_layers_are_limited() -> None:
    native = Kernels(Pool(1), few=8)

    def layer(op: str, weight: Any) -> nn.Module:
        module: Any = nn.Module()
        module.op, module.weight = getattr(native, op), weight
        return module

    half, whole = (torch.zeros(2, 2, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    assert most_tokens(nn.ModuleList([layer("linear", whole), layer("linear", half)])) == 8
    others = [layer("linear", whole), layer("quantized_linear", object()), layer("rms_norm", half)]
    assert most_tokens(nn.ModuleList([*others, layer("embedding", half)])) == ANY


@needs_library
def test_buffers_are_touched_as_far_as_a_step_needs() -> None:
    """Room for the largest step must not cost the memory of the largest step."""
    with LLM("demo", max_num_batched_tokens=8192, skip_tokenizer_init=True) as llm:
        memory = replay_of(llm)._recording._memory
        assert sum(each.nbytes for each in memory) > 20 << 20
        params = SamplingParams(temperature=0.0, max_tokens=3, detokenize=False)
        llm.generate({"prompt_token_ids": [10, 11, 12]}, params, use_tqdm=False)
        assert sum(resident(each) for each in memory) < 4 << 20


LEARNED = {
    "gpt2": {"architectures": ["GPT2LMHeadModel"], "n_embd": 48, "n_layer": 2, "n_head": 3, "n_positions": 96},
    "opt": {"architectures": ["OPTForCausalLM"], "word_embed_proj_dim": 48},
    "opt-350m": {"architectures": ["OPTForCausalLM"], "word_embed_proj_dim": 24, "do_layer_norm_before": False},
}
OPT_SIZES = {"hidden_size": 48, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 3}


@needs_library
@pytest.mark.parametrize("kind", LEARNED)
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_learned_positions_are_recorded(tmp_path: Path, kind: str, quantization: str | None) -> None:
    raw: dict[str, Any] = {"vocab_size": 300, "max_position_embeddings": 96, "bos_token_id": 1, "eos_token_id": 2}
    raw |= LEARNED[kind] | (OPT_SIZES if kind != "gpt2" else {})
    (tmp_path / "config.json").write_text(json.dumps(raw))
    params = SamplingParams(temperature=0.0, max_tokens=6, logprobs=2, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": [(5 * i + j) % 250 + 10 for j in range(n)]} for i, n in enumerate((1, 70, 12))]
    common: dict[str, Any] = {"load_format": "dummy", "dtype": "float32", "skip_tokenizer_init": True}
    common["quantization"] = quantization
    seen: list[Any] = []
    for eager in (False, True):
        with LLM(str(tmp_path), enforce_eager=eager, **common) as llm:
            assert isinstance(replay_of(llm), NoReplay if eager else HostReplay)
            seen.append([o.outputs[0] for o in llm.generate(prompts, params, use_tqdm=False)])
    assert [c.token_ids for c in seen[0]] == [c.token_ids for c in seen[1]]
    assert [c.logprobs for c in seen[0]] == [c.logprobs for c in seen[1]]


@needs_library
def test_recording_imports_no_compiler() -> None:
    """Torch's compiler takes a second to import, which nobody who starts an engine should wait for."""
    code = "import sys; from quire import LLM; LLM(max_model_len=64); sys.exit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_reference_ops_are_not_recorded() -> None:
    with LLM("demo", max_model_len=64, skip_tokenizer_init=True, ops={"*": "reference"}) as llm:
        assert isinstance(replay_of(llm), NoReplay)


class Gate(nn.Module):
    """A gated activation of a linear layer; `keep`: what the layer gave is looked at once more."""

    def __init__(self, keep: bool) -> None:
        super().__init__()
        self.keep = keep
        self.layer: Any = nn.Module()
        self.layer.op = NATIVE.linear
        self.op: Any = NATIVE.gated_activation
        self.norm: Any = nn.Module()
        self.norm.op = NATIVE.rms_norm
        self.weight_NK, self.scale_N = torch.randn(64, 24).bfloat16(), torch.ones(64).bfloat16()

    def forward(self, x_TK: Tensor) -> tuple[Tensor, ...]:
        both = self.layer.op(x_TK, self.weight_NK, None)
        out = self.op(both, "silu")
        if self.keep:
            return out, self.norm.op(both, None, self.scale_N, 1e-5)[0]
        del both
        return (self.norm.op(out, None, self.scale_N[:32], 1e-5)[0],)


@needs_library
@pytest.mark.parametrize("keep", [False, True])
def test_a_gate_is_part_of_its_layer_unless_that_is_read_again(keep: bool) -> None:
    model, x_TK = Gate(keep), torch.randn(7, 24).bfloat16()
    with torch.inference_mode():
        expected = model(x_TK)
        recording = record(model, NATIVE.pool, {7: 0}, lambda _: model(x_TK))
        recording.dims[0] = 7
        recording.run()
        assert len(recording) == (3 if keep else 2)
        for ours, plain in zip(recording.outputs, expected, strict=True):
            torch.testing.assert_close(ours, plain, rtol=0.02, atol=0.02)  # one rounding to bfloat16 less


def test_buffers_are_used_again_once_nobody_looks_at_them() -> None:
    buffers = Buffers()
    a = buffers.empty((4, 8), torch.float32)
    address = a.data_ptr()
    view = a[1:]
    del a
    other = buffers.empty((4, 8), torch.float32)
    assert other.data_ptr() != address, "a view still lives"
    del view
    b = buffers.empty((2, 8), torch.bfloat16)
    assert b.data_ptr() == address
    assert b.data_ptr() % 64 == 0
    assert len(buffers.all) == 2
