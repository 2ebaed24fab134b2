"""The workloads on a GPU: model shapes, token ids in, token counts out. Nothing but the standard library.

    W1  256 requests, 100 to 1024 in, 100 to 1024 out, temperature 0.6    offline throughput
    W2  1000 requests, 512 in, 128 out                                    offline throughput
    W3  one request, 128 in, 256 out                                      latency
    W4  1 x 8192, 1 x 4096, 16 x 4096 in, 1 out, prefix caching off       prefill
    W5  process start to import, to the engine, to the first token        start-up
    W6  64 requests, 4096 shared and 64 own in, 64 out: prefix new, known shared prefix
    W7  64 and 256 requests, 128 in, 256 out                              decoding
    W8  512 in, 128 out, at 20 and 40 requests a second, 1000 at once     serving

All greedy but W1; the end token is ignored. Ids come from `random.Random(seed)`, in an order that other engines'
runners draw in too: the same prompts for all. Weights are small random numbers.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

Prompts = list[list[int]]

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "attention_bias": False,
    "mlp_bias": False, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 131072,
    "vocab_size": 128256, "bos_token_id": 128000, "eos_token_id": 128001, "torch_dtype": "bfloat16",
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip

MODELS: dict[str, dict[str, Any]] = {
    "qwen06": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu", "attention_bias": False,
        "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 3072, "vocab_size": 151936, "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000, "max_position_embeddings": 40960, "bos_token_id": 151643,
        "eos_token_id": 151645, "torch_dtype": "bfloat16",
    },
    "l1b": _LLAMA | {
        "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64, "intermediate_size": 8192, "tie_word_embeddings": True,
        "rope_scaling": {**_LLAMA["rope_scaling"], "factor": 32.0},
    },
    "l8b": _LLAMA | {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 14336, "tie_word_embeddings": False,
    },
}  # fmt: skip


def write_model(root: Path, name: str) -> Path:
    """A folder with the config.json of a shape, to be loaded with load_format="dummy"."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(MODELS[name], indent=1))
    return folder


def weights(name: str) -> int:
    """Numbers that a decode step reads: all linear layers and the head."""
    c = MODELS[name]
    hidden, head = c["hidden_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
    layer = hidden * (q + 2 * kv) + q * hidden + 3 * hidden * c["intermediate_size"]
    return c["num_hidden_layers"] * layer + c["vocab_size"] * hidden


def kv_numbers(name: str) -> int:
    """Numbers in the KV cache for each token."""
    c = MODELS[name]
    return 2 * c["num_hidden_layers"] * c["num_key_value_heads"] * c["head_dim"]


def ids(draw: random.Random, count: int) -> list[int]:
    return [draw.randint(0, 10000) for _ in range(count)]


def fixed(count: int, length: int, seed: int) -> Prompts:
    draw = random.Random(seed)
    return [ids(draw, length) for _ in range(count)]


def shared(count: int, prefix: int, own: int, seed: int) -> Prompts:
    draw = random.Random(seed)
    head = ids(draw, prefix)
    return [head + ids(draw, own) for _ in range(count)]


def varied(count: int = 256, seed: int = 0) -> tuple[Prompts, list[int]]:
    """W1: prompts and output lengths."""
    draw = random.Random(seed)
    prompts = [ids(draw, draw.randint(100, 1024)) for _ in range(count)]
    return prompts, [draw.randint(100, 1024) for _ in range(count)]
