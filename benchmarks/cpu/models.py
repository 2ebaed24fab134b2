"""The two models, made on the spot: random weights, so that nothing is downloaded; only their shapes matter.

Owns: the shapes, the checkpoint folders (config, bf16 safetensors, a small tokenizer where a peer insists on one) and
what the peers' own formats are made with. Everything lies in a cache folder, is made once and renamed into place.

    python -m benchmarks.cpu.models [m135 m1b] [--cache FOLDER]

Weights are small normal numbers and never zeros, which some processors multiply faster. Greedy decoding of such a model
soon repeats itself: it is no oracle of correctness.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".bench"
SPECIAL = ("<s>", "</s>", "<pad>")
LEARNT = 20_000  # entries of the vocabulary that text can reach; the rest fill it up


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama-like model with tied embeddings."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    theta: float
    head: int = 64
    length: int = 8192

    @property
    def block_weights(self) -> int:
        """Weights of all layers' matrices."""
        attention = self.hidden * self.head * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def embedding_weights(self) -> int:
        """Weights of the embedding, which is the head as well."""
        return self.vocab * self.hidden

    def config(self) -> dict[str, Any]:
        """config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.length,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "rope_theta": self.theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.theta},
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
            "torch_dtype": "bfloat16",
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Each weight's name and shape."""
        query, key = self.heads * self.head, self.kv_heads * self.head
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for layer in range(self.layers):
            name = f"model.layers.{layer}"
            found |= {
                f"{name}.input_layernorm.weight": (self.hidden,),
                f"{name}.self_attn.q_proj.weight": (query, self.hidden),
                f"{name}.self_attn.k_proj.weight": (key, self.hidden),
                f"{name}.self_attn.v_proj.weight": (key, self.hidden),
                f"{name}.self_attn.o_proj.weight": (self.hidden, query),
                f"{name}.post_attention_layernorm.weight": (self.hidden,),
                f"{name}.mlp.gate_proj.weight": (self.intermediate, self.hidden),
                f"{name}.mlp.up_proj.weight": (self.intermediate, self.hidden),
                f"{name}.mlp.down_proj.weight": (self.hidden, self.intermediate),
            }
        return found | {"model.norm.weight": (self.hidden,)}


SHAPES = {
    "m135": Shape(576, 30, 9, 3, 1536, 49_152, 100_000.0),  # SmolLM2-135M
    "m1b": Shape(2048, 16, 32, 8, 8192, 128_256, 500_000.0),  # Llama-3.2-1B
}


def checkpoint(name: str, cache: Path = CACHE) -> Path:
    """The folder of a model in Hugging Face's layout."""
    return _once(cache / "models" / name, lambda folder: write_checkpoint(SHAPES[name], folder))


def gguf(name: str, kind: str, python: Path, cache: Path = CACHE) -> Path:
    """The same weights as a file for llama.cpp; `kind` is bf16, q8_0 or q4_0."""
    source = checkpoint(name, cache)

    def make(folder: Path) -> None:
        _run(python, "-m", "benchmarks.cpu.gguf_file", source, folder / "model.gguf", kind)

    return _once(cache / "gguf" / f"{name}-{kind}", make) / "model.gguf"


def openvino(name: str, kind: str, python: Path, cache: Path = CACHE) -> Path:
    """The same weights as a folder for OpenVINO; `kind` is fp16, int8 or int4 (in groups of 128, its default, where
    rows can be divided so)."""
    source = checkpoint(name, cache)
    group = next(size for size in (128, 64, 32) if SHAPES[name].hidden % size == 0)

    def make(folder: Path) -> None:
        command = ("export", "openvino", "--model", source, "--task", "text-generation-with-past")
        groups = ("--group-size", str(group)) if kind == "int4" else ()
        _run(python.parent / "optimum-cli", *command, "--weight-format", kind, *groups, folder)

    return _once(cache / "openvino" / f"{name}-{kind}", make)


def write_checkpoint(shape: Shape, folder: Path) -> None:
    """config.json, generation_config.json, the tokenizer and the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    _json(folder / "config.json", shape.config())
    _json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2})
    write_tokenizer(shape.vocab, folder)
    write_weights(shape, folder)


def write_weights(shape: Shape, folder: Path) -> None:
    """model.safetensors: normal numbers; norms around 1."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, size in shape.tensors().items():
        x = torch.empty(size, dtype=torch.float32).normal_(0.0, 0.02, generator=generator)
        x = x + 1.0 if len(size) == 1 else torch.where(x == 0, 0.02, x)
        tensors[name] = x.to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def write_tokenizer(vocab_size: int, folder: Path) -> None:
    """A byte-level BPE that nobody trained: bytes, then pairs of bytes in order, then entries that no text reaches."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = [*SPECIAL, *letters]
    pairs = [(a, b) for a in letters for b in letters][: max(0, min(vocab_size, LEARNT) - len(plain))]
    entries = [*plain, *(a + b for a, b in pairs)][:vocab_size]
    entries += [f"filler{i}" for i in range(len(entries), vocab_size)]
    tokenizer = Tokenizer(models.BPE({entry: i for i, entry in enumerate(entries)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict(zip(("bos_token", "eos_token", "pad_token"), SPECIAL, strict=True))
    _json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})


def _once(path: Path, make: Callable[[Path], None]) -> Path:
    """`path`, made beside its place and renamed, so that what is there is whole."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"making {path.parent.name}/{path.name}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            part = Path(scratch) / "part"
            part.mkdir()
            make(part)
            shutil.move(part, path)
    return path


def _run(*command: str | Path) -> None:
    done = subprocess.run([str(c) for c in command], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr.strip().splitlines()[-1:]}")


def _json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--cache", type=Path, default=CACHE)
    args = parser.parse_args()
    for name in args.names:
        print(checkpoint(name, args.cache))


if __name__ == "__main__":
    main()
