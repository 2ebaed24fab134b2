"""How many tokens of prompts a step may hold beside rows that decode, so that it takes no longer than asked.

Owns: the line that steps are measured to lie on, seconds = decodes + slope * tokens of prompts. Knows no plans and no
clock; it is told what each step took.
"""

from __future__ import annotations

FIRST = 256  # tokens, before anything was measured
LEAST, MULTIPLE = 64, 32
NEW = 0.2  # the weight of a new measurement
OUTLIER = 4.0  # one that is so many times what was expected counts as that: a graph was captured, the host was away


class Pace:
    """`target`: seconds that a step may take."""

    def __init__(self, target: float) -> None:
        self._target = target
        self._decodes: float | None = None
        self._slope: float | None = None

    def tokens(self) -> int:
        """Of prompts, in a step that decodes too."""
        if self._slope is None:
            return FIRST
        left = self._target - (self._decodes or 0.0)
        return max(LEAST, int(left / self._slope) // MULTIPLE * MULTIPLE)

    def expected(self, prompt_tokens: int, decodes: int) -> float:
        """Seconds of such a step; less where too little was measured."""
        return (self._decodes or 0.0 if decodes else 0.0) + (self._slope or 0.0) * prompt_tokens

    def took(self, prompt_tokens: int, decodes: int, seconds: float) -> None:
        """A step of so many tokens of prompts and so many decoding rows took `seconds`."""
        if not prompt_tokens:
            self._decodes = _follow(self._decodes, seconds)
        elif prompt_tokens >= LEAST // 2:
            more = max(seconds - self.expected(0, decodes), 1e-9)
            self._slope = _follow(self._slope, more / prompt_tokens)


def _follow(known: float | None, new: float) -> float:
    return new if known is None else known + NEW * (min(new, OUTLIER * known) - known)
