"""Texts embedded in a second: quire beside Transformers in padded batches, on the same random weights.

python benchmarks/pooling.py [--texts 256] [--threads 2]

Prompts of 16 to 256 random tokens. Transformers gets them sorted by length in batches of 32, which spares it most
of the padding; the better of two passes counts, for each. Prints one JSON object a model.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from quire import LLM
from quire.config.hub import demo_model_path

BATCH = 32
SMALL_BERT = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 1536}


def folders(root: Path) -> dict[str, tuple[Path, str]]:
    """Checkpoints by name, each with its number type: the demo model's body, and a BERT of the size of bge-small."""
    bert = transformers.BertModel(transformers.BertConfig(**SMALL_BERT))
    bert.save_pretrained(root / "bert")
    return {"demo": (demo_model_path(), "bfloat16"), "bert-small": (root / "bert", "float32")}


def texts(count: int, vocab: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(5, vocab) for _ in range(draw.randint(16, 256))] for _ in range(count)]


def best(work: Callable[[], Any]) -> float:
    """Seconds of the faster of two passes, after one that warms up."""
    seconds: list[float] = []
    for _ in range(3):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])


def theirs(folder: Path, dtype: str, prompts: list[list[int]]) -> float:
    model: Any = transformers.AutoModel.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    ordered = sorted(prompts, key=len)

    @torch.inference_mode()
    def work() -> None:
        for i in range(0, len(ordered), BATCH):
            some = ordered[i : i + BATCH]
            longest = max(map(len, some))
            ids = torch.tensor([[*p, *[0] * (longest - len(p))] for p in some])
            mask = torch.tensor([[1] * len(p) + [0] * (longest - len(p)) for p in some])
            hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
            torch.nn.functional.normalize(hidden[torch.arange(len(some)), mask.sum(1) - 1].float(), dim=-1)

    return best(work)


def ours(folder: Path, dtype: str, prompts: list[list[int]], threads: int) -> float:
    settings: dict[str, Any] = {"skip_tokenizer_init": True, "enable_prefix_caching": False, "threads": threads}
    with LLM(str(folder), runner="pooling", dtype=dtype, max_model_len=512, **settings) as llm:
        given: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        return best(lambda: llm.embed(given, use_tqdm=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        for name, (folder, dtype) in folders(Path(root)).items():
            vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
            prompts = texts(args.texts, vocab)
            torch.set_num_threads(args.threads)
            other = args.texts / theirs(folder, dtype, prompts)
            mine = args.texts / ours(folder, dtype, prompts, args.threads)
            print(json.dumps({"model": name, "dtype": dtype, "quire": mine, "transformers": other, "x": mine / other}))


if __name__ == "__main__":
    main()
