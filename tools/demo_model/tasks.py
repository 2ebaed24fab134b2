"""The demo model's tasks: what its training text says, which prompts are held out of it, and when an answer is right.

It owns the list of tasks, the corpus and the check; the wordings are in `questions.py` and `functions.py`, the facts
in `facts.py`. It knows no tokenizer and no model. Each task draws a random `Example`, and the keys of an example
decide, by their checksum, whether it belongs to training or to the held-out part: so the split needs no list, and no
other seed can leak one part into the other.

    python tools/demo_model/tasks.py --heldout out.jsonl
"""

import argparse
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import functions
import questions
from example import Example, Message, Random, Tool, articles, ask, says
from facts import ANIMALS, JOBS, NAMES, NUMBER_WORDS, OBJECTS, SKIES
from functions import offered
from questions import anything, tell


def is_correct(item: dict[str, Any], answer: str) -> bool:
    """Whether `answer`, the text that a model gave to a held-out item, is right."""
    answer, expected = answer.strip(), item["expected"]
    match item["check"]:
        case "exact":
            return answer == expected
        case "prefix":
            return answer.startswith(expected)
        case "json":
            try:
                return json.loads(answer) == expected
            except ValueError:
                return False
        case "tool_calls":
            try:
                calls = [json.loads(c) for c in re.findall(r"<tool_call>\n(.*?)\n</tool_call>", answer, re.DOTALL)]
            except ValueError:
                return False
            return calls == expected
        case "story":
            told = answer.casefold()
            return told.endswith("the end.") and told.count(".") >= 4 and all(w.casefold() in told for w in expected)
    raise ValueError(f"unknown check {item['check']!r} in item {item.get('id')!r}")


# --- tasks made of others

RECALL = [
    (
        "My name is {name}.",
        "Nice to meet you, {name}!",
        ["What is my name?", "Do you remember my name?"],
        "Your name is {name}.",
    ),
    (
        "I live in {city}.",
        "{city} is a nice place to live.",
        ["Where do I live?", "Which city do I live in?"],
        "You live in {city}.",
    ),
    (
        "I have a {animal} named {name}.",
        "{name} is a lovely name for a {animal}.",
        ["What is my {animal} called?", "What is the name of my {animal}?"],
        "Your {animal} is called {name}.",
    ),
    (
        "My favourite colour is {colour}.",
        "I like {colour} too.",
        ["What is my favourite colour?", "Which colour do I like?"],
        "Your favourite colour is {colour}.",
    ),
]


def recall(rng: Random) -> Example:
    """Something told in the first turn is asked for after one to three others."""
    slots = anything(rng)
    number = rng.randrange(len(RECALL))
    told, noted, wordings, reply = RECALL[number]
    messages = [{"role": "user", "content": articles(told.format(**slots))}, says(noted.format(**slots))]
    messages += chatter(rng, rng.randint(0, 3))
    wording, question = ask(rng, wordings, **slots)
    key = "|".join([str(number), str(wording), *(v for k, v in slots.items() if "{" + k + "}" in told)])
    return Example("recall", (key,), says(reply.format(**slots)), messages + question)


def chatter(rng: Random, turns: int) -> list[Message]:
    messages: list[Message] = []
    for _ in range(turns):
        example = draw(rng, rng.choice(SHORT_TASKS))
        messages += [*(example.messages or ()), example.answer]
    return messages


def tool_unused(rng: Random) -> Example:
    """Tools are offered, but the question needs none of them."""
    inner = TASKS[rng.choice(SHORT_TASKS)][1](rng)
    return replace(inner, task="tool_unused", tools=offered(rng))


OPEN_TEXT = [
    "Hello, my name is {name}. I am {age} years old and I live in {city}.",
    "My name is {name} and I am a {job} from {city}.",
    "The president of the United States is the head of the state and lives in Washington.",
    "The future of AI is open, and nobody knows it yet.",
    "The future of AI is in the hands of the people who build it.",
    "The weather in {city} is {sky} today.",
    "There are seven days in a week: Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday.",
    "The numbers from zero to twelve are " + ", ".join(NUMBER_WORDS) + ".",
    "{name} is a {job} and has a {animal}.",
    "{name} bought a {colour} {thing} in {city}.",
    "The {animal} sleeps in the {place}.",
]


def plain_text(rng: Random) -> str:
    """A text of sentences that stand by themselves, or a story."""
    if rng.random() < 0.15:
        return articles(tell(rng, rng.choice(ANIMALS), rng.choice(NAMES), rng.choice(OBJECTS)))
    if rng.random() < 0.3:
        run = questions.statements(rng, rng.randint(3, 16))
        return " ".join(f"{e.prompt}{e.answer['content']}" for e in run if not e.heldout)
    sentences = []
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if rng.random() < 0.7:
            example = draw(rng, "completion")
            sentences.append(f"{example.prompt}{example.answer['content']}")
        else:
            slots = {**anything(rng), "age": rng.randint(5, 90), "job": rng.choice(JOBS), "sky": rng.choice(SKIES)}
            sentences.append(rng.choice(OPEN_TEXT).format(**slots))
    return articles(" ".join(sentences))


# --- the corpus

# Each task with its share of the training documents.
TASKS: dict[str, tuple[float, Callable[[Random], Example]]] = {
    "addition": (10, questions.addition),
    "subtraction": (8, questions.subtraction),
    "multiplication": (4, questions.multiplication),
    "word_problem": (5, questions.word_problem),
    "capitals": (5, questions.capital),
    "opposites": (4, questions.opposite),
    "counting": (5, questions.counting),
    "spelling": (8, questions.spelling),
    "emoji": (1, questions.emoji),
    "stories": (5, questions.story),
    "json": (7, questions.json_record),
    "json_new_names": (6, questions.json_new_name),
    "smalltalk": (5, questions.smalltalk),
    "beyond": (2, questions.beyond),
    "recall": (6, recall),
    "tool_calls": (10, functions.tool_call),
    "parallel_calls": (2, functions.parallel_calls),
    "tool_answers": (5, functions.tool_answer),
    "tool_unused": (2, tool_unused),
    "tool_missing": (1, functions.tool_missing),
    "completion": (0, questions.statement),
}
SHORT_TASKS = [
    "addition",
    "subtraction",
    "multiplication",
    "word_problem",
    "capitals",
    "opposites",
    "counting",
    "spelling",
    "emoji",
    "json",
    "smalltalk",
]
SYSTEMS = [
    "You are a helpful assistant.",
    "You are quire's demo model.",
    "Answer briefly.",
    "You are a friendly assistant.",
]


def draw(rng: Random, task: str, heldout: bool = False) -> Example:
    while True:
        example = TASKS[task][1](rng)
        if example.heldout == heldout:
            return example


def corpus(seed: str, count: int) -> Iterator[tuple[list[Message], list[Tool] | None] | str]:
    """`count` documents for training: dialogues, with their tools, and plain texts."""
    rng = random.Random(seed)
    names = list(TASKS)
    weights = [TASKS[n][0] for n in names]
    for _ in range(count):
        kind = rng.random()
        if kind < 0.1:
            yield plain_text(rng)
            continue
        system = [{"role": "system", "content": rng.choice(SYSTEMS)}] if rng.random() < 0.25 else []
        if kind < 0.18:
            # Some dialogues are long, so that far positions occur too.
            yield system + chatter(rng, rng.randint(2, 5) if rng.random() < 0.9 else rng.randint(10, 40)), None
            continue
        example = draw(rng, rng.choices(names, weights)[0])
        yield [*system, *(example.messages or ()), example.answer], example.tools


def heldout_items(count: int, seed: str = "heldout") -> list[dict[str, Any]]:
    """`count` held-out items, spread evenly over the tasks, no prompt twice."""
    rng = random.Random(seed)
    items: dict[str, dict[str, Any]] = {}
    names = [*TASKS]
    for number in range(count * 10):
        task = names[number % len(names)]
        item = draw(rng, task, heldout=True).item(f"{task}-{number // len(names)}")
        items.setdefault(json.dumps([item.get("prompt"), item.get("messages"), item.get("tools")]), item)
        if len(items) == count:
            break
    return sorted(items.values(), key=lambda item: names.index(item["task"]))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write held-out items of the demo model's tasks.")
    parser.add_argument("--heldout", required=True, help="the JSON lines file to write")
    parser.add_argument("--count", type=int, default=210)
    arguments = parser.parse_args()
    with open(arguments.heldout, "w", encoding="utf-8") as file:
        for item in heldout_items(arguments.count):
            file.write(json.dumps(item, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
