"""Zebra in quire against plain PyTorch: in chunks, over shared prefixes, with sequences that are preempted."""

from __future__ import annotations

import random
import sys
from importlib.metadata import entry_points
from pathlib import Path

import torch

from quire import LLM, ModelRegistry, SamplingParams, TokensPrompt

sys.path.insert(0, str(Path(__file__).parent))

import zebra_checkpoint as zebra

NEW = 16


def test_the_package_is_found_and_its_model_is_imported_when_asked_for() -> None:
    (point,) = entry_points(group="quire.models", name="ZebraForCausalLM")
    assert point.value == "quire_zebra.model:ZebraForCausalLM"
    assert "ZebraForCausalLM" in ModelRegistry.get_supported_archs()
    assert ModelRegistry.resolve("ZebraForCausalLM").__name__ == "ZebraForCausalLM"


def test_tokens_and_logprobs_equal_plain_pytorch(tmp_path: Path) -> None:
    weights = zebra.write(tmp_path)
    draw = random.Random(1)
    shared = [draw.randrange(199) for _ in range(20)]
    prompts = [[*shared[:n], *(draw.randrange(199) for _ in range(m))] for n, m in ((0, 1), (0, 40), (20, 5), (20, 9))]
    few = {"max_model_len": 64, "block_size": 4, "num_gpu_blocks_override": 50, "max_num_batched_tokens": 12}
    with LLM(str(tmp_path), dtype="float32", skip_tokenizer_init=True, max_num_seqs=4, **few) as llm:
        params = SamplingParams(temperature=0, max_tokens=NEW, logprobs=1, ignore_eos=True)
        asked = [TokensPrompt(prompt_token_ids=p) for p in prompts]
        outputs = [o.outputs[0] for o in llm.generate(asked, params, use_tqdm=False)]
    wrong = {**weights, "model.layers.0.attn_weigh.weight": weights["model.layers.1.attn_weigh.weight"]}
    agrees = 0
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = list(output.token_ids)
        expected = zebra.logits(weights, [*prompt, *tokens])[len(prompt) - 1 : -1].log_softmax(-1)
        best = expected.max(-1)
        assert len(tokens) == NEW and (best.values - expected[range(NEW), tokens] < 1e-3).all()
        assert output.logprobs is not None
        given = torch.tensor([line[token].logprob for line, token in zip(output.logprobs, tokens, strict=True)])
        assert torch.allclose(given, expected[range(NEW), tokens], atol=1e-3)
        other = zebra.logits(wrong, [*prompt, *tokens])[len(prompt) - 1 : -1].argmax(-1)
        agrees += int((other == torch.tensor(tokens)).sum())
    assert len({t for o in outputs for t in o.token_ids}) > 10
    assert agrees < 3 * NEW, "a model that is wrong in one layer would be noticed"
