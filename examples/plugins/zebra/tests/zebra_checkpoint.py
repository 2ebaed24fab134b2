"""A tiny random checkpoint of Zebra, and the same arithmetic in plain PyTorch to compare with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

CONFIG: dict[str, Any] = {
    "architectures": ["ZebraForCausalLM"],
    "model_type": "zebra",
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "sliding_window": 9,
    "layer_types": ["full_attention", "sliding_attention"] * 2,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def write(folder: Path, **changes: Any) -> dict[str, Tensor]:
    """Makes the checkpoint; returns its tensors."""
    c = {**CONFIG, **changes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(c))
    d, f, v = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    kv = d // c["num_attention_heads"] * c["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (v, d), "lm_head": (v, d), "model.norm": (d,)}
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.self_attn.{n}_proj": (s, d) for n, s in (("q", d), ("k", kv), ("v", kv), ("o", d))}
        shapes |= {f"{at}.up_proj": (f, d), f"{at}.down_proj": (d, f)}
        shapes |= {f"{at}.{n}": (d,) for n in ("norm", "attn_weigh", "mlp_weigh")}
    torch.manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        embedding = name == "model.embed_tokens"
        spread = 1.0 if embedding else 0.3 if len(shape) == 1 else 2.0 / shape[1] ** 0.5
        tensors[f"{name}.weight"] = torch.randn(shape) * spread + (1.0 if len(shape) == 1 else 0.0)
    save_file(tensors, folder / "model.safetensors")
    return tensors


def logits(w: dict[str, Tensor], tokens: list[int]) -> Tensor:
    """(L, V) of one whole sequence, with nothing cached."""
    heads, kv_heads, size = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"], len(tokens)
    x = w["model.embed_tokens.weight"][tokens]
    e = x.shape[1] // heads
    angles = torch.outer(torch.arange(size), CONFIG["rope_theta"] ** (-torch.arange(0, e, 2) / e))
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + CONFIG["rms_norm_eps"]).rsqrt() * weight

    def turn(x: Tensor) -> Tensor:  # (heads, L, e)
        return x * cos + torch.cat((-x[..., e // 2 :], x[..., : e // 2]), -1) * sin

    for i, kind in enumerate(CONFIG["layer_types"]):
        at = f"model.layers.{i}"
        h = norm(x, w[f"{at}.norm.weight"])
        q, k, v = ((h @ w[f"{at}.self_attn.{n}_proj.weight"].T).view(size, -1, e).transpose(0, 1) for n in "qkv")
        k, v = (y.repeat_interleave(heads // kv_heads, 0) for y in (turn(k), v))
        seen = torch.ones(size, size).tril().bool()
        if kind == "sliding_attention":
            seen &= torch.ones(size, size).triu(1 - CONFIG["sliding_window"]).bool()
        scores = (turn(q) @ k.transpose(1, 2)) / e**0.5
        attended = (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1).flatten(1)
        mlp = (h @ w[f"{at}.up_proj.weight"].T).relu().square() @ w[f"{at}.down_proj.weight"].T
        x = x + attended @ w[f"{at}.self_attn.o_proj.weight"].T * w[f"{at}.attn_weigh.weight"]
        x = x + mlp * w[f"{at}.mlp_weigh.weight"]
    return norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T
