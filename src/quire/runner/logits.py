"""Custom logits processors at work: callables of one request, and engine-wide ones (see `processors`).

Owns: the isolation of their faults: an exception fails the row whose work it was, never its neighbours. Knows nothing
of how parameters are stored or tokens drawn.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from quire.runner.processors import History, LogitsProcessor, one_line, processor_classes
from quire.types.errors import ClientError
from quire.types.plan import NewRow

logger = logging.getLogger(__name__)


def load_processors(names: Iterable[str | type], vocab_size: int, device: torch.device) -> tuple[LogitsProcessor, ...]:
    """The engine-wide processors (see `processor_classes`), made. Raises `ClientError` where one cannot be."""
    made: list[LogitsProcessor] = []
    for name, cls in processor_classes(names):
        try:
            made.append(cls(vocab_size, device))
        except Exception as error:
            text = f"logits processor {name!r} cannot be made: {one_line(error)}"
            raise ClientError(text, "logits_processors", name) from error
    return tuple(made)


def _name(processor: Any) -> str:
    return getattr(processor, "__qualname__", None) or type(processor).__qualname__


def _checked(result: Any, like: Tensor, processor: Any) -> Tensor:
    if not isinstance(result, Tensor) or result.shape != like.shape:
        got = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
        raise TypeError(f"{_name(processor)} must return logits of shape {tuple(like.shape)}, got {got}")
    return result


class RequestProcessors:
    """The callables of one request: f(output_ids, logits_V) or f(prompt_ids, output_ids, logits_V) -> logits_V."""

    def __init__(self, functions: Sequence[Callable[..., Any]]) -> None:
        self._functions = [(f, _takes_prompt(f)) for f in functions]

    def __call__(self, logits_V: Tensor, prompt_ids: list[int], output_ids: list[int]) -> Tensor:
        for f, takes_prompt in self._functions:
            arguments = (list(prompt_ids), list(output_ids)) if takes_prompt else (list(output_ids),)
            logits_V = _checked(f(*arguments, logits_V), logits_V, f)
        return logits_V


def _takes_prompt(f: Callable[..., Any]) -> bool:
    """Whether `f` takes three positional arguments; where its signature cannot be read, two are assumed."""
    try:
        inspect.signature(f).bind(None, None, None)
    except (TypeError, ValueError):
        return False
    return True


class EngineProcessors:
    """The engine-wide processors and which rows take part in which."""

    def __init__(self, processors: Sequence[LogitsProcessor]) -> None:
        self.processors = tuple(processors)
        self._rows: list[set[int]] = [set() for _ in self.processors]
        self._errors: dict[int, str] = {}

    def add(self, new: NewRow) -> bool:
        """Whether any processor takes part in the row."""
        for processor, rows in zip(self.processors, self._rows, strict=True):
            try:
                if processor.add(new.row, new.params):
                    rows.add(new.row)
            except Exception as error:
                self._fail(new.row, processor, "add", error)
        return self.takes(new.row)

    def takes(self, row: int) -> bool:
        return row in self._errors or any(row in rows for rows in self._rows)

    def fork(self, source: int, destination: int) -> bool:
        """Whether any processor takes part in the destination."""
        if source in self._errors:
            self._errors[destination] = self._errors[source]
        for processor, rows in zip(self.processors, self._rows, strict=True):
            if source not in rows:
                continue
            rows.add(destination)
            try:
                processor.fork(source, destination)
            except Exception as error:
                self._fail(destination, processor, "fork", error)
        return self.takes(destination)

    def retire(self, row: int) -> None:
        self._errors.pop(row, None)
        for processor, rows in zip(self.processors, self._rows, strict=True):
            if row not in rows:
                continue
            rows.discard(row)
            try:
                processor.retire(row)
            except Exception:  # the row is gone: nobody is left to be told
                logger.exception("logits processor %s failed to retire row %d", _name(processor), row)

    def apply(self, logits_SV: Tensor, rows: Sequence[int], history: History) -> list[tuple[int, str]]:
        """Runs the processors over their lines of `logits_SV`, in place. Returns (line, message) of those that failed.

        rows: the device row of each line of `logits_SV`.
        """
        failed = {s: self._errors[row] for s, row in enumerate(rows) if row in self._errors}
        for processor, mine in zip(self.processors, self._rows, strict=True):
            lines = [s for s, row in enumerate(rows) if row in mine and s not in failed]
            if lines:
                failed |= self._apply(processor, logits_SV, lines, rows, history)
        return sorted(failed.items())

    def _apply(
        self, processor: LogitsProcessor, logits_SV: Tensor, lines: list[int], rows: Sequence[int], history: History
    ) -> dict[int, str]:
        logits_GV = logits_SV[lines]
        try:
            out = processor.apply(logits_GV, [rows[s] for s in lines], history)
            logits_SV[lines] = _checked(out, logits_GV, processor)
            return {}
        except Exception as error:
            if len(lines) == 1:
                return {lines[0]: f"logits processor {_name(processor)} failed: {one_line(error)}"}
        failed: dict[int, str] = {}
        for s in lines:
            failed |= self._apply(processor, logits_SV, [s], rows, history)
        return failed

    def _fail(self, row: int, processor: LogitsProcessor, method: str, error: Exception) -> None:
        self._errors[row] = f"logits processor {_name(processor)} failed in {method}: {one_line(error)}"
