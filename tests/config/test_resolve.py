"""Every auto becomes concrete, by rules that can be checked for any machine from any machine."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from quire.config.args import EngineArgs
from quire.config.resolve import GIB, INVARIANT, default_budgets, resolve
from quire.config.schema import Config
from quire.ops import report
from quire.ops.dispatch import REGISTRY
from quire.types.errors import ClientError
from quire.utils.devices import Gpu, Machine

CPU = Machine(cores=2, memory=24 * GIB, no_gpu_reason="this is a test")
H200 = Machine(gpus=(Gpu("NVIDIA H200", 140 * GIB, (9, 0)),), cores=16, memory=128 * GIB)
T4 = Machine(gpus=(Gpu("Tesla T4", 15 * GIB, (7, 5)),), cores=8, memory=64 * GIB)
A100X4 = Machine(gpus=(Gpu("NVIDIA A100-SXM4-80GB", 80 * GIB, (8, 0)),) * 4, cores=64, memory=512 * GIB)

Make = Callable[..., Path]


def refusal(machine: Machine = CPU, **kwargs: Any) -> ClientError:
    with pytest.raises(ClientError) as caught:
        resolve(EngineArgs(**kwargs), machine=machine)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("stored", "machine", "expected"),
    [
        ("float32", CPU, "float32"),
        ("bfloat16", CPU, "bfloat16"),
        ("float16", CPU, "bfloat16"),
        (None, CPU, "float32"),
        ("float8_e4m3fn", CPU, "float32"),
        ("float16", H200, "float16"),
        ("bfloat16", H200, "bfloat16"),
        ("float32", H200, "bfloat16"),
        ("bfloat16", T4, "float16"),
        ("float32", T4, "float16"),
    ],
)
def test_auto_dtype(make_checkpoint: Make, stored: str | None, machine: Machine, expected: str) -> None:
    old = make_checkpoint(torch_dtype=stored)
    new = make_checkpoint(name="new", torch_dtype=None, dtype=stored)
    for folder in (old, new):
        config = resolve(EngineArgs(model=str(folder)), machine=machine)
        assert config.model.dtype == config.cache.kv_cache_dtype == expected


def test_stated_dtype_is_honoured(make_checkpoint: Make) -> None:
    folder = str(make_checkpoint())
    for asked, got in (("half", "float16"), ("float", "float32"), ("bfloat16", "bfloat16")):
        assert resolve(EngineArgs(model=folder, dtype=asked), machine=CPU).model.dtype == got


def test_stated_dtypes_get_advice(make_checkpoint: Make, caplog: pytest.LogCaptureFixture) -> None:
    folder = str(make_checkpoint(torch_dtype="bfloat16"))
    with caplog.at_level(logging.WARNING, "quire"):
        assert resolve(EngineArgs(model=folder, dtype=torch.bfloat16), machine=CPU).model.dtype == "bfloat16"
        assert not caplog.records
        resolve(EngineArgs(model=folder, dtype=torch.half), machine=CPU)
        resolve(EngineArgs(model=folder, dtype="half"), machine=H200)
    assert [r.getMessage().count("bfloat16") > 0 for r in caplog.records] == [True, True]
    assert "compute capability 8.0" in str(refusal(machine=T4, model=folder, dtype="bfloat16"))
    assert "must be one of" in str(refusal(model=folder, dtype="fp16"))


def test_overridden_architectures(make_checkpoint: Make) -> None:
    folder = str(make_checkpoint())

    def arch(overrides: Any) -> str:
        return resolve(EngineArgs(model=folder, hf_overrides=overrides), machine=CPU).model.arch.architecture

    assert arch({"architectures": ["MistralForCausalLM"]}) == "MistralForCausalLM"
    assert arch(lambda raw: {**raw, "architectures": ["Qwen2ForCausalLM"]}) == "Qwen2ForCausalLM"
    assert 'must be a list, ["Qwen2' in str(refusal(model=folder, hf_overrides={"architectures": "Qwen2ForCausalLM"}))


def test_the_length_is_logged_with_its_reason(make_checkpoint: Make, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "quire"):
        model = resolve(EngineArgs(model=str(make_checkpoint())), machine=CPU).model
    assert model.max_model_len_reason == "what the checkpoint allows: 256, the max_position_embeddings of config.json"
    assert f"max_model_len=256: {model.max_model_len_reason}" in caplog.text


def test_a_changed_dtype_is_logged(make_checkpoint: Make, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "quire"):
        resolve(EngineArgs(model=str(make_checkpoint(torch_dtype="float16"))), machine=CPU)
    assert any("dtype=bfloat16" in r.getMessage() and "float16" in r.getMessage() for r in caplog.records)


def test_max_model_len(make_checkpoint: Make) -> None:
    folder = str(make_checkpoint(max_position_embeddings=256))

    def length(value: Any, model: str = folder, **kwargs: Any) -> int:
        return resolve(EngineArgs(model=model, max_model_len=value, **kwargs), machine=CPU).model.max_model_len

    assert length(None) == length(-1) == length("auto") == 256
    assert length(100) == 100
    error = refusal(model=folder, max_model_len=257)
    assert "at most 256" in str(error) and "rope_scaling" in str(error) and error.parameter == "max_model_len"
    assert "at least 2" in str(refusal(model=folder, max_model_len=0))
    assert length(1024, hf_overrides={"rope_scaling": {"rope_type": "linear", "factor": 4.0}}) == 1024


def test_absolute_positions_cannot_be_stretched(make_checkpoint: Make) -> None:
    opt = make_checkpoint(architectures=["OPTForCausalLM"], model_type="opt", max_position_embeddings=64)
    error = str(refusal(model=str(opt), max_model_len=65))
    assert "at most 64" in error and "rope" not in error


def test_windows_that_never_fill_are_dropped(make_checkpoint: Make) -> None:
    folder = str(make_checkpoint(architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=32))

    def windows(**kwargs: Any) -> tuple[tuple[int | None, ...], int]:
        model = resolve(EngineArgs(model=folder, **kwargs), machine=CPU).model
        return model.arch.sliding_windows, model.max_model_len

    assert windows() == ((32, 32), 256)
    assert windows(max_model_len=33) == ((32, 32), 33)
    assert windows(max_model_len=32) == ((None, None), 32)
    assert windows(disable_sliding_window=True) == ((None, None), 32)


def test_end_tokens_of_both_files_are_merged(make_checkpoint: Make) -> None:
    folder = make_checkpoint(eos_token_id=2, generation={"eos_token_id": [7, 2]})
    assert resolve(EngineArgs(model=str(folder)), machine=CPU).model.arch.eos_token_ids == (2, 7)


def test_generation_defaults(make_checkpoint: Make, tmp_path: Path) -> None:
    stored = {"temperature": 0.6, "top_p": 0.9, "max_new_tokens": 99, "do_sample": True, "top_k": None}
    folder = str(make_checkpoint(generation=stored))

    def defaults(**kwargs: Any) -> dict[str, Any]:
        return dict(resolve(EngineArgs(model=folder, **kwargs), machine=CPU).model.generation_config)

    assert defaults() == {"temperature": 0.6, "top_p": 0.9, "max_tokens": 99}
    assert defaults(generation_config="quire") == defaults(generation_config="vllm") == {}
    assert defaults(override_generation_config={"top_k": 5, "max_new_tokens": 3}) == {
        **{"temperature": 0.6, "top_p": 0.9, "top_k": 5, "max_tokens": 3}
    }
    other = tmp_path / "other"
    other.mkdir()
    (other / "generation_config.json").write_text(json.dumps({"min_p": 0.1}))
    assert defaults(generation_config=str(other)) == {"min_p": 0.1}
    assert "is no folder" in str(refusal(model=folder, generation_config="nowhere"))


def test_overrides_merge_or_call(make_checkpoint: Make) -> None:
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}
    folder = str(make_checkpoint(rope_scaling=scaling))

    def factor(overrides: Any) -> float:
        rope = resolve(EngineArgs(model=folder, hf_overrides=overrides), machine=CPU).model.arch.rope
        assert rope is not None and rope.original_max_position == 128
        return rope.factor

    assert factor({}) == 2.0
    assert factor({"rope_scaling": {"factor": 8.0}}) == 8.0
    assert factor(lambda c: {**c, "rope_scaling": {**scaling, "factor": 3.0}}) == 3.0
    assert "must return" in str(refusal(model=folder, hf_overrides=lambda c: None))


@pytest.mark.parametrize(
    ("machine", "usage", "workers", "expected"),
    [
        (CPU, "llm", 1, (512, 256)),
        (CPU, "server", 1, (512, 128)),
        (CPU, "llm", 2, (1024, 512)),
        (H200, "llm", 1, (16384, 1024)),
        (H200, "server", 1, (8192, 1024)),
        (A100X4, "server", 4, (2048, 256)),
        (T4, "llm", 1, (8192, 256)),
    ],
)
def test_default_budgets(machine: Machine, usage: str, workers: int, expected: tuple[int, int]) -> None:
    assert default_budgets("cuda" if machine.gpus else "cpu", machine, usage, workers) == expected


def test_budgets_fit_each_other(make_checkpoint: Make) -> None:
    folder = str(make_checkpoint())

    def budgets(**kwargs: Any) -> tuple[int, int]:
        s = resolve(EngineArgs(model=folder, **kwargs), machine=CPU).scheduler
        return s.max_num_batched_tokens, s.max_num_seqs

    assert budgets(max_num_batched_tokens=8) == (8, 8)
    assert budgets(max_num_seqs=5000) == (5000, 5000)
    assert budgets(max_num_batched_tokens="1K", max_num_seqs=3) == (1024, 3)
    assert "less than max_num_seqs=16" in str(refusal(model=folder, max_num_batched_tokens=8, max_num_seqs=16))
    assert "max_model_len=256" in str(refusal(model=folder, enable_chunked_prefill=False, max_num_batched_tokens=255))
    long = str(make_checkpoint(name="long", max_position_embeddings=9000))
    assert (
        resolve(EngineArgs(model=long, enable_chunked_prefill=False), machine=CPU).scheduler.max_num_batched_tokens
        == 9000
    )


@pytest.mark.parametrize(
    ("machine", "kwargs", "expected"),
    [
        (CPU, {}, (1, 0)),
        (CPU, {"async_scheduling": True}, (2, 1)),
        (H200, {}, (2, 1)),
        (H200, {"async_scheduling": False}, (1, 0)),
        (CPU, {"depth": 4}, (4, 0)),
        (CPU, {"depth": 4, "lead": 1}, (4, 1)),
        (H200, {"depth": 1}, (1, 0)),
        (H200, {"device": "cpu"}, (1, 0)),
    ],
)
def test_depth_and_lead(
    make_checkpoint: Make, machine: Machine, kwargs: dict[str, Any], expected: tuple[int, int]
) -> None:
    s = resolve(EngineArgs(model=str(make_checkpoint()), **kwargs), machine=machine).scheduler
    assert (s.depth, s.lead) == expected


def test_parallel_sizes_need_devices(make_checkpoint: Make) -> None:
    folder = str(make_checkpoint())
    error = str(refusal(model=folder, tensor_parallel_size=4))
    assert "needs 4 devices" in error and "this is a test" in error and "2 CPU cores" in error
    assert "has 1 GPU:" in str(refusal(H200, model=folder, tensor_parallel_size=4))
    parallel = resolve(EngineArgs(model=folder, tensor_parallel_size=4), machine=A100X4).parallel
    assert (parallel.world_size, parallel.distributed_executor_backend) == (4, "mp")
    assert resolve(EngineArgs(model=folder), machine=CPU).parallel.distributed_executor_backend == "uni"
    assert "use 'mp'" in str(refusal(model=folder, tensor_parallel_size=2, distributed_executor_backend="uni"))


def test_devices_and_memory(make_checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(make_checkpoint())
    assert "this is a test" in str(refusal(model=folder, device="cuda"))
    assert resolve(EngineArgs(model=folder), machine=H200).device.device == "cuda"
    assert "at most 21" in str(refusal(model=folder, swap_space=40))
    assert resolve(EngineArgs(model=folder, swap_space=20), machine=CPU).cache.swap_space == 20.0
    assert "above 0" in str(refusal(model=folder, gpu_memory_utilization=0))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert resolve(EngineArgs(model=folder), machine=CPU).device.threads == 2
    assert resolve(EngineArgs(model=folder, tensor_parallel_size=2), machine=CPU).device.threads == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert resolve(EngineArgs(model=folder), machine=CPU).device.threads == 7
    assert resolve(EngineArgs(model=folder, threads=3), machine=CPU).device.threads == 3


def test_seed_names_and_logprobs(make_checkpoint: Make) -> None:
    folder = str(make_checkpoint(vocab_size=128))
    model = resolve(EngineArgs(model=folder, served_model_name=["a", "b"]), machine=CPU).model
    assert (model.seed, model.served_model_names, model.tokenizer) == (0, ("a", "b"), folder)
    assert "vocabulary's 128" in str(refusal(model=folder, max_logprobs=129))
    assert model.model_impl == "quire"


def test_bad_model_folders(make_checkpoint: Make, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no config.json" in str(refusal(model=str(empty)))
    assert "does not exist" in str(refusal(model=str(tmp_path / "nowhere")))
    assert "is empty" in str(refusal(model=""))
    (empty / "config.json").write_text("{not json")
    assert "not valid JSON" in str(refusal(model=str(empty)))
    (empty / "config.json").write_text("[]")
    assert "JSON object" in str(refusal(model=str(empty)))
    weights = empty / "model.safetensors"
    weights.write_bytes(b"")
    assert "is a file" in str(refusal(model=str(weights)))
    # No test reaches the network: offline, an id that is not in the cache says so.
    assert "not in the local cache" in str(refusal(model="someone/not-a-model", download_dir=str(tmp_path)))


def test_a_bare_config_serves_for_dummy_weights(make_checkpoint: Make) -> None:
    file = make_checkpoint() / "config.json"
    config = resolve(EngineArgs(model=str(file), load_format="dummy", skip_tokenizer_init=True), machine=CPU)
    assert config.model.path == file.parent
    assert "load_format='dummy'" in str(refusal(model=str(file)))


def test_nothing_is_left_to_decide(make_checkpoint: Make) -> None:
    config = resolve(EngineArgs(model=str(make_checkpoint())), machine=CPU)

    def values(node: Any, path: str) -> list[tuple[str, Any]]:
        if is_dataclass(node):
            return [v for f in fields(node) for v in values(getattr(node, f.name), f"{path}.{f.name}")]
        return [(path, node)]

    assert isinstance(config, Config)
    for path, value in values(config, "config"):
        assert value != "auto" or path == "config.model.tokenizer_mode" or path == "config.load.load_format", path


def test_a_quantized_checkpoint_is_refused(make_checkpoint: Make) -> None:
    folder = make_checkpoint(quantization_config={"quant_method": "awq", "bits": 4})
    e = refusal(model=str(folder), load_format="dummy")
    assert "awq" in str(e) and e.parameter == "model"


def test_a_length_without_room_for_an_answer(make_checkpoint: Make) -> None:
    e = refusal(model=str(make_checkpoint()), load_format="dummy", max_model_len=1)
    assert "at least 2" in str(e) and e.parameter == "max_model_len"


def test_a_folder_may_be_a_path(make_checkpoint: Make) -> None:
    folder = make_checkpoint()
    assert EngineArgs(model=folder).model == str(folder)  # type: ignore[arg-type]


def test_deterministic_chooses_implementations_on_a_gpu(make_checkpoint: Make) -> None:
    folder = str(make_checkpoint())
    found = resolve(EngineArgs(model=folder, deterministic=True, ops={"linear": "reference"}), machine=H200).device.ops
    assert found == {"linear": "reference", "gated_linear": "invariant", "attention": "invariant"}
    assert not resolve(EngineArgs(model=folder), machine=H200).device.ops
    for op, name in INVARIANT.items():
        report(torch.device("cpu"), torch.float32)  # imports all that is built in
        assert name in [known.name for known in REGISTRY[op].implementations]


@pytest.mark.parametrize(
    ("machine", "given", "why"),
    [
        (CPU, {}, "for GPUs; leave it out"),
        (H200, {"quantization": "int8"}, "no kernels for quantization='int8'"),
        (H200, {"dtype": "float32"}, "no kernels for float32"),
    ],
)
def test_what_deterministic_cannot_keep_is_refused(
    make_checkpoint: Make, machine: Machine, given: dict[str, Any], why: str
) -> None:
    with pytest.raises(ClientError, match=why):
        resolve(EngineArgs(model=str(make_checkpoint()), deterministic=True, **given), machine=machine)


def test_an_int8_cache_is_refused_on_a_gpu(make_checkpoint: Make) -> None:
    with pytest.raises(ClientError, match="no kernels on a GPU"):
        resolve(EngineArgs(model=str(make_checkpoint()), kv_cache_dtype="int8"), machine=H200)
