"""The arguments: every name, type, choice and bound is checked when they are made, with an answer that helps."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from quire.config.args import GROUPS, EngineArgs, ServerArgs, human_int, specs
from quire.config.foreign import FOREIGN
from quire.types.errors import ClientError


def refusal(**kwargs: Any) -> ClientError:
    with pytest.raises(ClientError) as caught:
        EngineArgs(**kwargs)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("max_num_seq", "max_num_seqs"), ("tensor_paralel_size", "tensor_parallel_size"), ("blocksize", "block_size")],
)
def test_unknown_name_gets_the_nearest(name: str, nearest: str) -> None:
    error = refusal(**{name: 1})
    assert f"did you mean {nearest}?" in str(error)
    assert error.parameter == name


def test_name_like_no_other() -> None:
    assert "did you mean" not in str(refusal(zzzzzz=1))
    assert "zzzzzz" in str(refusal(zzzzzz=1))


def test_vllms_other_names_get_a_reason() -> None:
    assert "use gpu_memory_utilization" in str(refusal(kv_cache_free_gpu_mem_fraction=0.5))
    assert not set(FOREIGN) & set(specs(EngineArgs)), "an argument that exists cannot be foreign as well"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("block_size", "a", "wrong type"),
        ("block_size", True, "wrong type"),
        ("block_size", 0, "between 1 and 4096"),
        ("max_num_seqs", 2.5, "wrong type"),
        ("max_num_seqs", -1, "at least 1"),
        ("max_num_batched_tokens", "lots", '"8k"'),
        ("gpu_memory_utilization", 1.5, "between 0 and 1"),
        ("gpu_memory_utilization", float("nan"), "not nan"),
        ("dtype", "float61", "did you mean float16?"),
        ("scheduling_policy", "lifo", "fcfs, priority"),
        ("hf_overrides", 3, "wrong type"),
        ("seed", lambda: 1, "function"),
        ("swap_space", -1, "at least 0"),
        ("log_level", "loud", "must be one of"),
    ],
)
def test_bad_values(name: str, value: Any, words: str) -> None:
    error = refusal(**{name: value})
    assert words in str(error)
    assert str(error).startswith(name)
    assert error.parameter == name


@pytest.mark.parametrize("name", [n for n, (_, spec, _) in specs(EngineArgs).items() if spec.later])
def test_what_is_not_there_yet_is_refused_but_its_default_is_not(name: str) -> None:
    _, spec, default = specs(EngineArgs)[name]
    EngineArgs(**{name: default})
    other = {bool: True, int: 2, float: 2.0, str: "x"}.get(type(default))
    if default is None:
        other = (
            3
            if "int" in str(specs(EngineArgs)[name][0])
            else {"a": 1}
            if "dict" in str(specs(EngineArgs)[name][0])
            else "x"
        )
    assert spec.later in str(refusal(**{name: other}))


@pytest.mark.parametrize("name", [n for n, (_, spec, _) in specs(EngineArgs).items() if spec.harmless])
def test_what_is_harmless_is_accepted(name: str) -> None:
    hint, _, default = specs(EngineArgs)[name]
    other: Any = {bool: True, int: 2, str: "/media", dict: {"image": 2}}.get(type(default))
    other = other if default is not None else ({"a": 1} if "dict" in str(hint) else 2)
    assert getattr(EngineArgs(**{name: other}), name) == other


def test_none_is_the_default_everywhere() -> None:
    assert EngineArgs(**dict.fromkeys(specs(EngineArgs))) == EngineArgs()


def test_human_numbers() -> None:
    assert [human_int(s) for s in ("8192", "8k", "8K", "1M", "25.6k", "4G", "4GiB", "1_000", "-1")] == [
        *(8192, 8000, 8192, 1 << 20, 25600, 4 << 30, 4 << 30, 1000, -1)
    ]
    for bad in ("", "k", "1.0001k", "1.5", "8x"):
        with pytest.raises(ValueError):
            human_int(bad)
    assert EngineArgs(max_model_len="1K", kv_cache_memory_bytes="2M").max_model_len == 1024
    assert EngineArgs(max_model_len="auto").max_model_len == "auto"


def test_a_torch_dtype_is_understood_by_its_name() -> None:
    class LikeTorchDtype:
        def __str__(self) -> str:
            return "torch.bfloat16"

    assert EngineArgs(dtype=LikeTorchDtype()).dtype == "bfloat16"  # pyright: ignore[reportArgumentType]


def test_frozen_and_copied() -> None:
    args = EngineArgs(block_size=8)
    with pytest.raises(FrozenInstanceError):
        args.block_size = 4  # pyright: ignore[reportAttributeAccessIssue]
    assert replace(args, block_size=4).block_size == 4
    with pytest.raises(ClientError):
        replace(args, block_size=0)
    EngineArgs().override_generation_config["a"] = 1
    assert EngineArgs().override_generation_config == {}


def test_every_argument_is_documented() -> None:
    for name, (_, spec, _) in specs(EngineArgs).items():
        assert spec.group in GROUPS, name
        assert spec.help.endswith("."), name
        assert not (spec.harmless and spec.later), name


def test_arguments_of_the_guide() -> None:
    args = EngineArgs(tensor_parallel_size=4, block_size=32, swap_space=20, gpu_memory_utilization=0.9)
    assert (args.tensor_parallel_size, args.block_size, args.swap_space) == (4, 32, 20.0)
    assert ServerArgs(port=9000).port == 9000


def test_configuration_imports_no_torch() -> None:
    code = (
        "import sys; from quire.config import resolve, args, schema; import quire.utils.devices;"
        "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


@pytest.mark.parametrize(
    ("given", "words"),
    [("hunter2", "wrong type"), (["hunter2", 3], "wrong type"), (["hunter2", ""], "empty"), ([" "], "empty")],
)
def test_a_key_is_not_shown_and_not_empty(given: Any, words: str) -> None:
    with pytest.raises(ClientError, match=words) as e:
        ServerArgs(api_key=given)
    assert "hunter2" not in str(e.value) and e.value.value is None and e.value.parameter == "api_key"
