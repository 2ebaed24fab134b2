"""The error that quantizing the weights or the KV cache makes, on the bundled model's held-out text: perplexity, KL
divergence of the logits from those of bfloat16, share of positions with the same likeliest token, and the size of the
weights.

    python benchmarks/quantization.py [--items 100]

Text: the questions and right answers of tests/data/demo_heldout.jsonl, in the chat template. No time is measured.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quire import LLM, SamplingParams
from quire.types.request import Request

HELDOUT = Path(__file__).parents[1] / "tests" / "data" / "demo_heldout.jsonl"
METHODS: tuple[dict[str, Any], ...] = (
    {},
    *({"quantization": name} for name in ("int8", "int8_weight_only", "int4", "int4_weight_only")),
    {"kv_cache_dtype": "int8"},
)


def texts(tokenizer: Any, count: int) -> list[list[int]]:
    """Token ids of whole dialogues whose right answer is a text."""
    items = [json.loads(line) for line in HELDOUT.read_text().splitlines()]
    chosen = [i for i in items if "messages" in i and isinstance(i["expected"], str) and i["check"] == "exact"]
    step = max(1, len(chosen) // count)
    dialogues = [[*i["messages"], {"role": "assistant", "content": i["expected"]}] for i in chosen[::step][:count]]
    return [tokenizer.encode(tokenizer.apply_chat_template(d, tokenize=False)) for d in dialogues]


def log_probabilities(llm: LLM, prompts: list[list[int]]) -> list[torch.Tensor]:
    """For each prompt (L-1, V): the model's log probabilities of every token behind each position."""
    client = llm.llm_engine.client
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=-1, detokenize=False)
    dense: list[torch.Tensor] = []
    for i, prompt in enumerate(prompts):
        client.add(Request(str(i), prompt, params, seed=0))
        lines: list[torch.Tensor] = []
        while client.has_work:
            for delta in client.step():
                for part in delta.prompt_logprobs or ():
                    ids = torch.from_numpy(part.logprobs.ids[:, 1:].astype(np.int64))
                    lines.append(torch.zeros(ids.shape).scatter_(1, ids, torch.from_numpy(part.logprobs.values[:, 1:])))
        dense.append(torch.cat(lines))
    return dense


def weight_bytes(llm: LLM) -> int:
    """Bytes of all weights, a tied table counted once."""
    model = llm.llm_engine.client._executor.worker._runner._model  # type: ignore[attr-defined]
    tensors: dict[int, int] = {}
    for module in model.modules():
        for value in [*vars(module).values(), *module._parameters.values()]:
            for t in (value, getattr(value, "q", None), getattr(value, "scale_NG", None)):
                if isinstance(t, torch.Tensor):
                    tensors[t.data_ptr()] = t.nbytes
    return sum(tensors.values())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, default=100)
    args = parser.parse_args()
    reference: list[torch.Tensor] = []
    for method in METHODS:
        with LLM("demo", **method, dtype="bfloat16", log_level="warning") as llm:
            prompts = texts(llm.get_tokenizer(), args.items)
            dense = log_probabilities(llm, prompts)
            size = weight_bytes(llm)
        reference = reference or dense
        picked = [d.gather(1, torch.tensor(p[1:])[:, None]) for d, p in zip(dense, prompts, strict=True)]
        loss = -torch.cat(picked).mean().item()
        kl = torch.cat([(r.exp() * (r - d)).sum(1) for r, d in zip(reference, dense, strict=True)])
        same = torch.cat([r.argmax(1) == d.argmax(1) for r, d in zip(reference, dense, strict=True)])
        print(
            json.dumps(
                {
                    "quantization": ", ".join(f"{k}={v}" for k, v in method.items()) or "bfloat16",
                    "perplexity": round(float(np.exp(loss)), 4),
                    "kl_mean": round(kl.mean().item(), 6),
                    "kl_p99": round(kl.quantile(0.99).item(), 5),
                    "same_likeliest": round(same.float().mean().item(), 5),
                    "weights_mb": round(size / 1e6, 2),
                    "positions": len(kl),
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
