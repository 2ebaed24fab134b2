"""Who breaks the steps: the search, by halving, for the request whose work makes a step fail.

Owns: which requests may run while somebody is suspected. After a failed step its requests run again in halves, each
alone, until they are past the place where the step failed. A failure that does not come back harms nobody; one that
does ends the one request that had the step for itself. Knows neither plans nor devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

# Requests that failed alone, one after the other, with no good step in between: then the device is broken.
BROKEN_AFTER = 3
NEVER = 1 << 62


class Trial:
    """`reached` answers how many tokens of a request have been computed, None where it has ended."""

    def __init__(self, reached: Callable[[str], int | None]) -> None:
        self._reached = reached
        self._groups: list[dict[str, int]] = []  # the last one runs; of each request where it is past the danger
        self._convicted = 0

    @property
    def running(self) -> frozenset[str] | None:
        """The requests that may run; None: all."""
        return frozenset(self._groups[-1]) if self._groups else None

    @property
    def broken(self) -> bool:
        return self._convicted >= BROKEN_AFTER

    def failed(self, suspects: Mapping[str, int], memory: bool) -> str | None:
        """A step failed that was to take these requests so far. Answers the one whose fault it is, once that is known.
        `memory`: there was too little of it; then a half runs to its end before the other begins."""
        alone = bool(self._groups) and len(self._groups.pop()) == 1
        named = [(name, NEVER if memory else end) for name, end in suspects.items()]
        if alone:
            self._convicted += 1
            self._skip_ended()
            return named[0][0]
        half = (len(named) + 1) // 2
        self._groups += [dict(group) for group in (named[half:], named[:half]) if group]
        return None

    def passed(self) -> bool:
        """A step went well. Answers whether `running` has changed."""
        self._convicted = 0
        if not self._groups or not self._done():
            return False
        self._groups.pop()
        self._skip_ended()
        return True

    def _done(self) -> bool:
        return all((at := self._reached(name)) is None or at >= end for name, end in self._groups[-1].items())

    def _skip_ended(self) -> None:
        while self._groups and all(self._reached(name) is None for name in self._groups[-1]):
            self._groups.pop()
