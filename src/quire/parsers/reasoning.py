"""Reasoning apart from content: text between tags, at the beginning of an answer.

Owns: the parsers and their registry. Plugins: entry points of the group `quire.reasoning_parsers`, each a class whose
instances are `ReasoningParser`s. Blanks around the reasoning belong to neither part.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from quire.parsers.registry import Parsers
from quire.types.errors import ClientError


class Split(NamedTuple):
    """`reasoning` is None where there was none; `content` is None where the answer ended before it."""

    reasoning: str | None
    content: str | None


class Piece(NamedTuple):
    """New text of a stream: of the reasoning, or of the content."""

    reasoning: bool
    text: str


class ReasoningStream(Protocol):
    """Whatever the text is cut into, the pieces joined are what `split` gives."""

    def feed(self, text: str) -> list[Piece]: ...
    def finish(self) -> list[Piece]: ...


class ReasoningParser(Protocol):
    """`end`: the text after which content comes."""

    end: str

    def begins(self, prompt: str) -> bool:
        """Whether the answer to `prompt` begins with reasoning, or may."""
        ...

    def split(self, text: str, prompt: str = "") -> Split: ...
    def stream(self, prompt: str = "") -> ReasoningStream: ...


class Tags:
    """Reasoning between two tags. It may be `always` there: then the answer begins inside it, with the first tag or
    without; else only where the answer, or the end of the prompt, has the first tag."""

    always = False

    def __init__(self, start: str = "<think>", end: str = "</think>") -> None:
        self.start, self.end = start, end

    def begins(self, prompt: str) -> bool:
        return not prompt.rstrip().endswith(self.end)

    def split(self, text: str, prompt: str = "") -> Split:
        stream = self.stream(prompt)
        pieces = stream.feed(text) + stream.finish()
        reasoning = "".join(p.text for p in pieces if p.reasoning)
        content = "".join(p.text for p in pieces if not p.reasoning)
        return Split(reasoning or None, content or None)

    def stream(self, prompt: str = "") -> _TagStream:
        inside = self.always or prompt.rstrip().endswith(self.start)
        return _TagStream(self.start, self.end, inside, self.begins(prompt))


class DeepSeekR1(Tags):
    """Its template writes the first tag itself, or the model leaves it out."""

    always = True


class _TagStream:
    """States: before anything was decided, in the reasoning, in the blanks after it, in the content."""

    def __init__(self, start: str, end: str, inside: bool, begins: bool) -> None:
        self._start, self._end, self._inside = start, end, inside
        self._state = "begin" if begins else "content"
        self._held = ""

    def feed(self, text: str) -> list[Piece]:
        self._held += text
        return self._take(final=False)

    def finish(self) -> list[Piece]:
        return self._take(final=True)

    def _take(self, final: bool) -> list[Piece]:
        out: list[Piece] = []
        if self._state == "begin":
            self._begin(final)
        if self._state == "blank":
            self._held = self._held.lstrip()
            if self._held:
                self._state = "reasoning"
        if self._state == "reasoning":
            self._reason(out, final)
        if self._state == "after":
            self._held = self._held.lstrip()
            if self._held:
                self._state = "content"
        if self._state == "content" and self._held:
            out.append(Piece(False, self._held))
            self._held = ""
        return out

    def _begin(self, final: bool) -> None:
        seen = self._held.lstrip()
        if seen.startswith(self._start):
            self._held, self._state = seen[len(self._start) :], "blank"
        elif final or not self._start.startswith(seen):
            self._state = "blank" if self._inside else "content"

    def _reason(self, out: list[Piece], final: bool) -> None:
        at = self._held.find(self._end)
        if at >= 0:
            shown, self._held, self._state = self._held[:at].rstrip(), self._held[at + len(self._end) :], "after"
        else:
            keep = 0 if final else overlap(self._held, self._end)
            shown = self._held[: len(self._held) - keep].rstrip()
            self._held = "" if final else self._held[len(shown) :]
        if shown:
            out.append(Piece(True, shown))


def overlap(text: str, tag: str) -> int:
    """How many characters at the end of `text` begin `tag` (not all of it)."""
    for n in range(min(len(text), len(tag) - 1), 0, -1):
        if tag.startswith(text[-n:]):
            return n
    return 0


REASONING_PARSERS = Parsers(
    "quire.reasoning_parsers",
    "reasoning_parser",
    {
        "deepseek_r1": "quire.parsers.reasoning:DeepSeekR1",
        "qwen3": "quire.parsers.reasoning:Tags",
        "tags": "quire.parsers.reasoning:Tags",
    },
)


def reasoning_parser(name: str) -> ReasoningParser:
    """The parser `name`; "tags:<start>,<end>" names the tags. Raises `ClientError`."""
    kind, _, tags = name.partition(":")
    arguments = tags.split(",") if tags else []
    if arguments and (len(arguments) != 2 or not all(arguments)):
        text = f"reasoning_parser {name!r}: write two tags, as in tags:<think>,</think>"
        raise ClientError(text, "reasoning_parser", name)
    return REASONING_PARSERS.find(kind)(*arguments)
