"""Greedy answers of a model folder to held-out items, judged by `tasks.is_correct`, as a table by task.

It knows Transformers and the tasks, not how the model was trained.

    python tools/demo_model/evaluate.py src/quire/assets/demo --dtype float32 --items tests/data/demo_heldout.jsonl
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks import heldout_items, is_correct

Table = dict[str, tuple[int, int]]
REQUIRED = 0.95


def answers(model: Any, tokenizer: Any, items: list[dict[str, Any]], batch: int, max_new_tokens: int) -> list[str]:
    prompts = [
        item["prompt"]
        if "prompt" in item
        else tokenizer.apply_chat_template(
            item["messages"], tools=item.get("tools"), add_generation_prompt=True, tokenize=False
        )
        for item in items
    ]
    # Prompts of like length share a batch, so that little of it is padding.
    order = sorted(range(len(items)), key=lambda i: (len(prompts[i]), i))
    found = [""] * len(items)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        inputs = tokenizer([prompts[i] for i in chosen], return_tensors="pt", padding=True, padding_side="left")
        inputs = inputs.to(model.device)
        ids = model.generate(**inputs, do_sample=False, temperature=None, top_p=None, max_new_tokens=max_new_tokens)
        texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            found[i] = text
    return found


def evaluate(
    folder: Path, items: list[dict[str, Any]], dtype: torch.dtype, device: str, batch: int = 256, show: int = 0
) -> Table:
    """Right answers and items of each task."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    table: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for item, answer in zip(items, answers(model, tokenizer, items, batch, 192), strict=True):
        right = is_correct(item, answer)
        table[item["task"]][0] += right
        table[item["task"]][1] += 1
        if not right and show > 0:
            show -= 1
            asked = item.get("prompt") or item["messages"][-1]["content"]
            print(f"  {item['id']}: {asked!r}\n    expected {item['expected']!r}\n    got      {answer!r}")
    return {task: (right, total) for task, (right, total) in table.items()}


def accuracy(table: Table) -> float:
    return sum(right for right, _ in table.values()) / sum(total for _, total in table.values())


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure a model folder on held-out items of the demo model's tasks.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--items", type=Path, help="a JSON lines file of items (default: draw --count of them)")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--show", type=int, default=0, help="print this many wrong answers")
    given = parser.parse_args()
    if given.items:
        items = [json.loads(line) for line in given.items.read_text(encoding="utf-8").splitlines()]
    else:
        items = heldout_items(given.count)
    table = evaluate(given.folder, items, getattr(torch, given.dtype), given.device, given.batch, given.show)
    for task, (right, total) in table.items():
        print(f"{task:16} {right:5} / {total:<5} {right / total:7.1%}")
    print(f"{'all':16} {accuracy(table):21.1%} ({given.dtype})")
    return 0 if accuracy(table) >= REQUIRED else 1


if __name__ == "__main__":
    sys.exit(main())
