"""Write a Llama checkpoint as a GGUF file; runs in llama.cpp's virtual environment (numpy, gguf; no torch).

    python -m benchmarks.cpu.gguf_file FOLDER FILE bf16|q8_0|q4_0

Owns: names, the order of rows and the metadata of GGUF's llama architecture. Norms stay float32. Rows of query and key
go from the checkpoint's halves (x of all pairs, then y) to pairs (x, y), which is what that architecture rotates.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf  # pyright: ignore[reportMissingImports]
import numpy as np

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def weights(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, float32 array) of each tensor of a bf16 safetensors file."""
    data = np.memmap(path, dtype=np.uint8, mode="r")
    (length,) = struct.unpack("<Q", data[:8].tobytes())
    header: dict[str, Any] = json.loads(data[8 : 8 + length].tobytes())
    for name, info in header.items():
        if name == "__metadata__":
            continue
        assert info["dtype"] == "BF16", (name, info["dtype"])
        begin, end = (8 + length + offset for offset in info["data_offsets"])
        wide = data[begin:end].view(np.uint16).astype(np.uint32) << 16
        yield name, wide.view(np.float32).reshape(info["shape"])


def renamed(name: str) -> str:
    """GGUF's name of a weight."""
    name = name.removesuffix(".weight")
    if name in ("model.embed_tokens", "model.norm"):
        return {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}[name] + ".weight"
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.weight"


def paired(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from halves to pairs."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def add_metadata(writer: Any, config: dict[str, Any]) -> None:
    """What llama.cpp must know of the shape."""
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])


def add_vocabulary(writer: Any, config: dict[str, Any], tokenizer: dict[str, Any]) -> None:
    """The tokenizer, without which llama.cpp loads nothing."""
    special = {token["content"] for token in tokenizer["added_tokens"]}
    entries = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(entries)
    writer.add_token_types([control if entry in special else normal for entry in entries])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])


def main() -> None:
    folder, out, kind = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    quantization = gguf.GGMLQuantizationType[kind.upper()]
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_name(folder.name)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
    add_metadata(writer, config)
    add_vocabulary(writer, config, json.loads((folder / "tokenizer.json").read_text()))
    for name, weight in weights(folder / "model.safetensors"):
        if name.endswith("q_proj.weight"):
            weight = paired(weight, config["num_attention_heads"])
        elif name.endswith("k_proj.weight"):
            weight = paired(weight, config["num_key_value_heads"])
        if weight.ndim == 1:
            writer.add_tensor(renamed(name), np.ascontiguousarray(weight))
        else:
            packed = gguf.quants.quantize(np.ascontiguousarray(weight), quantization)
            writer.add_tensor(renamed(name), packed, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
