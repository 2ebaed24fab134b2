"""Logprobs in OpenAI's two shapes. Owns: those shapes; the numbers come from the engine."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from quire.types.outputs import Logprob, PromptLogprobs

FLOOR = -9999.0  # JSON has no infinity


def finite(value: float) -> float:
    return value if math.isfinite(value) else FLOOR


def token_text(token: int, entry: Logprob, as_id: bool) -> str:
    return f"token_id:{token}" if as_id else entry.decoded_token or ""


def completion(
    lines: list[dict[int, Logprob] | None],
    tokens: list[int],
    offset: int,
    top: int,
    as_id: bool,
    name: Callable[[int], str],
) -> tuple[dict[str, Any], int]:
    """The lines of `tokens` for a completion, and the offset after them. A line that is None (the first token of a
    prompt) has no value; its token's text is then what `name` says."""
    out: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    for token, line in zip(tokens, lines, strict=True):
        entry = line[token] if line else Logprob(0.0, decoded_token=name(token))
        text = token_text(token, entry, as_id)
        out["text_offset"].append(offset)
        out["tokens"].append(text)
        out["token_logprobs"].append(finite(entry.logprob) if line else None)
        shown = list(line.items())[: top + 1] if line else []
        out["top_logprobs"].append({token_text(t, e, as_id): finite(e.logprob) for t, e in shown} if line else None)
        offset += len(text)
    return out, offset


def chat(lines: list[dict[int, Logprob]], tokens: list[int], top: int, as_id: bool) -> dict[str, Any]:
    """The lines of `tokens` for a chat message."""
    content: list[dict[str, Any]] = []
    for token, line in zip(tokens, lines, strict=True):
        others = [(t, e) for t, e in line.items() if t != token or (e.rank or top + 1) <= top]
        others.sort(key=lambda item: -item[1].logprob)
        shown = [_entry(t, e, as_id) for t, e in others[:top]]
        content.append({**_entry(token, line[token], as_id), "top_logprobs": shown})
    return {"content": content}


def _entry(token: int, entry: Logprob, as_id: bool) -> dict[str, Any]:
    text = token_text(token, entry, as_id)
    return {"token": text, "logprob": finite(entry.logprob), "bytes": list(text.encode("utf-8", "replace"))}


def prompt(lines: PromptLogprobs | None) -> list[Any] | None:
    """Prompt logprobs in vLLM's shape: a dict by token id for each token, None for the first."""
    if lines is None:
        return None
    return [
        line and {
            str(t): {"logprob": finite(e.logprob), "rank": e.rank, "decoded_token": e.decoded_token}
            for t, e in line.items()
        }
        for line in lines
    ]  # fmt: skip
