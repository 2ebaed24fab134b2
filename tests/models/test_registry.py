"""The registry of models: built-ins, registration from outside, errors."""

from __future__ import annotations

import inspect
from importlib import import_module

import pytest

from quire.models.llama import LlamaForCausalLM
from quire.models.registry import ModelRegistry, Registry
from quire.types.errors import ClientError

BUILT_IN = [
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "OPTForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
]


def test_built_ins_are_there() -> None:
    assert set(BUILT_IN) <= set(ModelRegistry.get_supported_archs())
    for name in BUILT_IN:
        assert ModelRegistry.resolve([name]).__name__ == name


def test_classes_and_names_can_be_registered() -> None:
    registry = Registry()
    registry.register_model("Mine", LlamaForCausalLM)
    registry.register_model("Yours", "quire.models.llama:LlamaForCausalLM")
    assert registry.resolve("Mine") is LlamaForCausalLM
    assert registry.resolve(["Unknown", "Yours"]) is LlamaForCausalLM


def test_errors_are_one_line_and_helpful() -> None:
    with pytest.raises(
        ClientError, match="no implementation of LamaForCausalLM: the closest are LlamaForCausalLM"
    ) as e:
        ModelRegistry.resolve(["LamaForCausalLM"])
    assert "\n" not in str(e.value)
    with pytest.raises(ClientError, match="quire has"):
        ModelRegistry.resolve(["Xyz"])
    registry = Registry()
    with pytest.raises(ClientError, match="module:Class"):
        registry.register_model("Mine", "quire.models.llama")
    registry.register_model("Mine", "quire.models.nothing:Mine")
    with pytest.raises(ClientError, match="No module named"):
        registry.resolve("Mine")


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3"])
def test_kin_of_llama_are_short(name: str) -> None:
    assert len(inspect.getsource(import_module(f"quire.models.{name}")).splitlines()) <= 60
