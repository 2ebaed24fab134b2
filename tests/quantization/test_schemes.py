"""Quantization at load: what the numbers mean, which layers change, and that a quantized model still answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from quire import LLM, SamplingParams
from quire.layers.linear import Embedding, Linear, LMHead, MergedLinear
from quire.ops.linear import QuantizedWeight, quantize_tokens, quantize_weight, quantized_linear
from quire.quantization import SCHEMES


@given(st.integers(1, 40), st.sampled_from([32, 64, 96]), st.sampled_from([4, 8]), st.sampled_from([0, 32]))
def test_rounding_is_to_the_nearest_step(rows: int, inputs: int, bits: int, group: int) -> None:
    weight = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows * inputs))
    quantized = quantize_weight(weight, bits, group, dynamic=False)
    assert quantized.shape == weight.shape
    assert quantized.group == (group or inputs)
    half_step = quantized.scale_NG.repeat_interleave(quantized.group, 1) / 2
    assert ((quantized.dense() - weight).abs() <= half_step * (1 + 1e-4)).all()
    some = torch.tensor([rows - 1, 0])
    assert torch.equal(quantized.dense(some), quantized.dense()[some])


@pytest.mark.parametrize("bits", [4, 8])
def test_dynamic_products_are_those_of_integers(bits: int) -> None:
    """Exactly: the sum of integer products, a scale for each group, a scale for each token."""
    draw = torch.Generator().manual_seed(0)
    x, bias = torch.randn(5, 64, generator=draw), torch.randn(7, generator=draw)
    weight = quantize_weight(torch.randn(7, 64, generator=draw), bits, 32, dynamic=True)
    xq, scale = quantize_tokens(x)
    assert xq.abs().max() == 127
    expected = F.linear(xq.double() * scale.double(), weight.dense().double()) + bias
    assert torch.allclose(quantized_linear(x, weight, bias).double(), expected, rtol=1e-5, atol=1e-5)
    assert quantized_linear(x.bfloat16(), weight, None, torch.float32).dtype == torch.float32


def model_of(llm: LLM) -> torch.nn.Module:
    client: Any = llm.llm_engine.client
    return client._executor.worker._runner._model


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_the_bundled_model_still_answers(name: str) -> None:
    questions = ["What is the capital of Peru?", "What is 17 + 25?", "Spell the word 'garden'."]
    with LLM("demo", quantization=name, max_model_len=128) as llm:
        conversations = [[{"role": "user", "content": question}] for question in questions]
        outputs = llm.chat(conversations, SamplingParams(temperature=0.0, max_tokens=30), use_tqdm=False)
        answers = [output.outputs[0].text for output in outputs]
        model = model_of(llm)
    assert "Lima" in answers[0] and "42" in answers[1] and "g-a-r-d-e-n" in answers[2]
    for module in model.modules():
        if isinstance(module, Linear | MergedLinear | LMHead | Embedding):
            assert isinstance(module.weight, QuantizedWeight), "the demo model's table is tied, so all of them change"
            small = isinstance(module, LMHead | Embedding) or SCHEMES[name].bits == 8
            assert module.weight.bits == (8 if small else 4)


def test_a_tied_table_is_kept_once() -> None:
    with LLM("demo", quantization="int8", max_model_len=64) as llm:
        model: Any = model_of(llm)
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_other_names_are_refused() -> None:
    with pytest.raises(ValueError, match="quantization"):
        LLM("demo", quantization="awq")
