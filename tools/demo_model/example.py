"""One exchange with the model, and the rule that holds some of them out of training. It knows no task."""

import random
import re
import zlib
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
Tool = dict[str, Any]
Random = random.Random

HELDOUT_ONE_IN = 12


@dataclass(frozen=True)
class Example:
    """One exchange. `messages` ends before the answer; a `prompt` in its place is raw text to continue.

    `keys` say what is new in it. Tasks that ask for the same thing share them: a sum is held out by its terms.
    """

    task: str
    keys: tuple[str, ...]
    answer: Message
    messages: list[Message] | None = None
    prompt: str | None = None
    tools: list[Tool] | None = None
    check: str = "exact"
    expected: Any = None

    @property
    def heldout(self) -> bool:
        return any(zlib.crc32(key.encode()) % HELDOUT_ONE_IN == 0 for key in self.keys)

    def item(self, identifier: str) -> dict[str, Any]:
        """The line that this example has in a file of held-out items."""
        expected = self.answer["content"] if self.expected is None else self.expected
        given = {"prompt": self.prompt} if self.prompt is not None else {"messages": self.messages}
        tools = {"tools": self.tools} if self.tools else {}
        return {"id": identifier, "task": self.task, **given, **tools, "check": self.check, "expected": expected}


def ask(rng: Random, wordings: list[str], **slots: Any) -> tuple[int, list[Message]]:
    """A user's question in one of the wordings, now and then as people type it: no full stop, no capital letter."""
    number = rng.randrange(len(wordings))
    text = wordings[number]
    if rng.random() < 0.1:
        text = text.rstrip(".?!")
    if rng.random() < 0.1:
        text = text[0].lower() + text[1:]
    return number, [{"role": "user", "content": articles(text.format(**slots))}]


def says(text: str) -> Message:
    return {"role": "assistant", "content": articles(text)}


def articles(text: str) -> str:
    """The wordings write "a" before every slot: make it "an" before a vowel."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
