"""Trains the demo model: tokenizer, weights and model card, all from the text that `tasks.py` writes.

It owns the tokenizer's and the model's shape and the recipe. The same command runs on a GPU (minutes) and on a CPU,
where `--minutes` bounds it: the learning rate follows the larger of steps done and time spent, and so ends at zero.

    python tools/demo_model/train.py --out src/quire/assets/demo
"""

import argparse
import json
import math
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from evaluate import Table, accuracy, evaluate
from tasks import corpus, heldout_items

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIALS = [END_OF_TEXT, IM_START, IM_END]
# One digit is one token, or sums would have to be learnt for each way of cutting a number up.
WORDS = r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CONTEXT = 2048
# Prompts are random draws that nobody can foresee: they get little of the loss.
PROMPT_WEIGHT = 0.1
SHARDS = 64

LLAMA = {
    "vocab_size": 3072,
    "hidden_size": 256,
    "intermediate_size": 576,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": CONTEXT,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": SPECIALS.index(IM_END),
    "pad_token_id": SPECIALS.index(END_OF_TEXT),
}


@dataclass(frozen=True)
class Recipe:
    documents: int
    steps: int
    batch: int
    learning_rate: float
    minutes: float
    seed: int


# --- tokenizer


def chat_template() -> str:
    return (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8").strip()


def plain_words(documents: int, seed: int) -> Iterator[str]:
    """The corpus as text for the tokenizer: contents only, since the template's words come with every dialogue."""
    for document in corpus(f"tokenizer-{seed}", documents):
        if isinstance(document, str):
            yield document
            continue
        messages, tools = document
        for message in messages:
            yield message["content"] or json.dumps(message["tool_calls"], ensure_ascii=False)
        if tools:
            yield json.dumps(tools, ensure_ascii=False)


def train_tokenizer(documents: int, seed: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=LLAMA["vocab_size"],
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([chat_template()] * 100 + list(plain_words(documents, seed)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[IM_START],
        chat_template=chat_template(),
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Written by hand, so that the file reads the same in every release of Transformers."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": [IM_START],
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": chat_template(),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


# --- data


def tokenized(folder: Path, seed: int, count: int, shard: int) -> tuple[np.ndarray, np.ndarray]:
    """One shard of the corpus as rows of CONTEXT tokens, with 1 where a token belongs to an answer or a plain text."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    texts: list[str] = []
    for document in corpus(f"{seed}-{shard}", count):
        if isinstance(document, str):
            texts.append(document)
        else:
            messages, tools = document
            texts.append(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False))
    start, end = SPECIALS.index(IM_START), SPECIALS.index(IM_END)
    assistant = tokenizer.encode("assistant", add_special_tokens=False)
    rows, answered = [np.zeros(0, np.uint16)], [np.zeros(0, np.uint8)]
    for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False):
        ids = np.array([*encoding.ids, SPECIALS.index(END_OF_TEXT)], np.uint16)
        if len(ids) > CONTEXT:
            continue
        if len(rows[-1]) + len(ids) > CONTEXT:
            # Every row starts with a whole document, so that the model meets texts with nothing before them.
            rows.append(ids[:0])
            answered.append(np.zeros(0, np.uint8))
        rows[-1] = np.concatenate([rows[-1], ids])
        answered[-1] = np.concatenate([answered[-1], answer_mask(ids, start, end, assistant)])
    return padded(rows), padded(answered)


def padded(rows: list[np.ndarray]) -> np.ndarray:
    return np.stack([np.pad(row, (0, CONTEXT - len(row))) for row in rows])


def answer_mask(ids: np.ndarray, start: int, end: int, assistant: list[int]) -> np.ndarray:
    starts = np.flatnonzero(ids == start)
    if not len(starts):
        return np.ones(len(ids), np.uint8)
    mask = np.zeros(len(ids), np.uint8)
    for at in starts:
        if list(ids[at + 1 : at + 1 + len(assistant)]) == assistant:
            stop = at + int(np.argmax(ids[at:] == end))
            mask[at + 1 + len(assistant) : stop + 1] = 1
    return mask


def training_rows(folder: Path, recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    # The shards, not the processes, carry the seeds: the rows are the same on every machine.
    make = partial(tokenized, folder, recipe.seed, math.ceil(recipe.documents / SHARDS))
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        shards = list(pool.map(make, range(SHARDS)))
    return np.concatenate([rows for rows, _ in shards]), np.concatenate([mask for _, mask in shards])


# --- training


def batches(count: int, batch: int, seed: int) -> Iterator[np.ndarray]:
    """Row numbers, epoch after epoch in a new order."""
    rng = np.random.default_rng(seed)
    left = np.zeros(0, np.int64)
    while True:
        while len(left) < batch:
            left = np.concatenate([left, rng.permutation(count)])
        yield left[:batch]
        left = left[batch:]


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor, answered: torch.Tensor) -> torch.Tensor:
    weights = PROMPT_WEIGHT + (1 - PROMPT_WEIGHT) * answered[:, 1:].flatten().float()
    weights *= (answered[:, 1:] | (ids[:, 1:] != LLAMA["pad_token_id"])).flatten()
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits.flatten(0, 1).float()
    losses = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
    return (losses * weights).sum() / weights.sum()


def train(folder: Path, recipe: Recipe, device: str) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    rows, answered = training_rows(folder, recipe)
    print(f"{rows.size / 1e6:.1f}M tokens in {len(rows)} rows, {answered.mean():.0%} of them answers", flush=True)
    torch.manual_seed(recipe.seed)
    torch.set_float32_matmul_precision("high")
    model = LlamaForCausalLM(LlamaConfig(**LLAMA)).to(device).train()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=device == "cuda")
    began, progress, step, loss = time.monotonic(), 0.0, 0, torch.zeros(())
    for chosen in batches(len(rows), recipe.batch, recipe.seed):
        if progress >= 1:
            break
        ids = torch.from_numpy(rows[chosen].astype(np.int64)).to(device)
        said = torch.from_numpy(answered[chosen]).to(device)
        warm, cosine = min(1.0, (step + 1) / 100), 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * warm * cosine
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = loss_of(model, ids, said)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        minutes = (time.monotonic() - began) / 60
        progress = max(step / recipe.steps, minutes / recipe.minutes)
        if step % 100 == 0 or step == 10 or progress >= 1:
            print(f"step {step}: loss {loss.item():.4f}, {minutes:.1f} min", flush=True)
    facts = {"steps": step, "minutes": minutes, "tokens": step * recipe.batch * CONTEXT, "loss": loss.item()}
    facts["parameters"] = sum(p.numel() for p in model.parameters())
    return model, facts


def save(model: LlamaForCausalLM, folder: Path) -> None:
    model.to(torch.bfloat16)
    stops = [SPECIALS.index(IM_END), SPECIALS.index(END_OF_TEXT)]
    model.generation_config = GenerationConfig(
        eos_token_id=stops, pad_token_id=LLAMA["pad_token_id"], do_sample=True, temperature=0.5, top_p=0.9
    )
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


# --- the card


def card(recipe: Recipe, facts: dict[str, Any], device: str, tables: dict[str, Table]) -> str:
    first = next(iter(tables.values()))
    rows = [
        f"| {task} | {total} | " + " | ".join(f"{t[task][0] / t[task][1]:.1%}" for t in tables.values()) + " |"
        for task, (_, total) in first.items()
    ]
    items = sum(total for _, total in first.values())
    rows.append(f"| **all** | {items} | " + " | ".join(f"**{accuracy(t):.1%}**" for t in tables.values()) + " |")
    return (
        (Path(__file__).parent / "card.md")
        .read_text(encoding="utf-8")
        .format(
            millions=facts["parameters"] / 1e6,
            documents=recipe.documents,
            seed=recipe.seed,
            layers=LLAMA["num_hidden_layers"],
            width=LLAMA["hidden_size"],
            heads=LLAMA["num_attention_heads"],
            kv_heads=LLAMA["num_key_value_heads"],
            head_dim=LLAMA["head_dim"],
            vocabulary=LLAMA["vocab_size"],
            context=CONTEXT,
            steps=facts["steps"],
            batch_tokens=recipe.batch * CONTEXT,
            millions_of_tokens=facts["tokens"] / 1e6,
            minutes=facts["minutes"],
            device=device,
            learning_rate=recipe.learning_rate,
            prompt_weight=PROMPT_WEIGHT,
            items=items,
            header=" | ".join(tables),
            rule="---:|" * (len(tables) - 1) + "---:",
            rows="\n".join(rows),
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Train quire's demo model.")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--documents", type=int, default=1_200_000)
    parser.add_argument("--steps", type=int, default=4200)
    parser.add_argument("--batch", type=int, default=32, help=f"rows of {CONTEXT} tokens in a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--minutes", type=float, default=60, help="end the steps after this time")
    parser.add_argument("--items", type=int, default=2000, help="held-out items to measure")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    recipe = Recipe(given.documents, given.steps, given.batch, given.learning_rate, given.minutes, given.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    began = time.monotonic()
    save_tokenizer(train_tokenizer(min(given.documents, 60_000), given.seed), given.out)
    print(f"tokenizer: {time.monotonic() - began:.0f} s", flush=True)
    model, facts = train(given.out, recipe, device)
    save(model, given.out)
    items = heldout_items(given.items)
    tables = {}
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        tables[name] = evaluate(given.out, items, dtype, device, show=40 if dtype == torch.float32 else 0)
        print(f"{name}: {accuracy(tables[name]):.2%} at {time.monotonic() - began:.0f} s", flush=True)
    name = torch.cuda.get_device_name().removeprefix("NVIDIA ") if device == "cuda" else "CPU"
    (given.out / "README.md").write_text(card(recipe, facts, name, tables), encoding="utf-8")
    print((given.out / "README.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
