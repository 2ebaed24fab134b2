"""Pairs of texts and their scores.

Owns: which texts make a pair, what a model is shown of it (both texts at once where it classifies pairs, each alone
where it embeds), and the way from its vectors to scores. Knows no queues: prompts out, vectors in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from quire.config.schema import Config
from quire.engine.chat import render_chat
from quire.engine.tokenizer import NONE, Tokenizer
from quire.types.errors import ClientError
from quire.types.outputs import PoolingOutput, PoolingRequestOutput
from quire.types.pooling import CLASSIFY, EMBED, PoolingParams

Vector = PoolingRequestOutput[PoolingOutput]


class Plan:
    """The prompts of a scoring, and what to do with their vectors. Raises `ClientError` for texts that make no pairs
    and for models that give no scores.

    `template`: Jinja source or a file that writes a pair as one prompt, for models that see both texts at once. `cut`:
    the most tokens of a first and of a second text, 0: all.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer | None,
        first: Any,
        second: Any,
        params: PoolingParams,
        template: str | None = None,
        cut: tuple[int, int] = (0, 0),
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        a, b = texts_of(first, "data_1"), texts_of(second, "data_2")
        if not a or not b or len(a) not in (1, len(b)):
            text = f"{len(a)} and {len(b)} texts make no pairs: give one and one, one and several, or as many of each"
            raise ClientError(text, "data_2", len(b))
        pooling = config.pooling
        if pooling is None:
            text = f"the model {config.model.model!r} generates text: to score with it, make the engine with"
            raise ClientError(f"{text} runner='pooling'", "runner")
        if tokenizer is None:
            raise ClientError(f"scores need a tokenizer, {NONE}", "data_1")
        self.add_special_tokens = True
        self._both = pooling.scores_pairs
        self._pairs = list(zip(a * len(b) if len(a) == 1 else a, b, strict=True))
        if not self._both and EMBED not in pooling.tasks:
            text = f"the model has {len(pooling.labels)} classes: scores come from models with one, or from embedders"
            raise ClientError(text, "model", config.model.model)
        self.params = params.clone()
        self.params.task = CLASSIFY if self._both else EMBED
        shorten = _Shortener(tokenizer, config.model.max_model_len, cut)
        if not self._both:
            self.prompts: list[Any] = [shorten(0, text) for text in a] + [shorten(1, text) for text in b]
            return
        pairs = [(shorten(0, x), shorten(1, y)) for x, y in self._pairs]
        if template is not None:
            kwargs = template_kwargs or {}
            self.prompts = [_rendered(tokenizer, template, pair, kwargs) for pair in pairs]
        elif pooling.pairs:
            most = _most(self.params, config.model.max_model_len)
            self.params.truncate_prompt_tokens = None  # done here, text by text
            if pooling.lower:
                pairs = [(x.lower(), y.lower()) for x, y in pairs]
            self.prompts = [_tokens(tokenizer, pair, most) for pair in pairs]
        else:
            self.prompts = [x + y for x, y in pairs]

    def scores(self, outputs: Sequence[Vector]) -> list[tuple[Vector, float]]:
        """(what tells of the pair's tokens, its score) of each pair."""
        if self._both:
            return [(output, float(output.outputs.data.reshape(-1)[0])) for output in outputs]
        count = len(self._pairs)
        left, right = outputs[:-count], outputs[-count:]
        left = [left[0]] * count if len(left) == 1 else left
        found: list[tuple[Vector, float]] = []
        for a, b in zip(left, right, strict=True):
            x, y = (np.asarray(v.outputs.data, np.float64) for v in (a, b))
            cosine = float(x @ y / max(float(np.linalg.norm(x) * np.linalg.norm(y)), 1e-12))
            told = PoolingRequestOutput(
                request_id=f"{a.request_id}_{b.request_id}",
                outputs=b.outputs,
                prompt_token_ids=[*a.prompt_token_ids, *b.prompt_token_ids],
                num_cached_tokens=(a.num_cached_tokens or 0) + (b.num_cached_tokens or 0),
                metrics=b.metrics,
            )
            found.append((told, cosine))
        return found


def texts_of(given: Any, name: str) -> list[str]:
    """One text or several: strings, or vLLM's `{"content": [parts]}` with parts of text. Errors: `ClientError`."""
    items: list[Any] = list(given) if isinstance(given, list | tuple) else [given]
    return [_text(item, name) for item in items]


def _text(item: Any, name: str) -> str:
    if isinstance(item, str):
        return item
    if isinstance(item, Mapping):
        if isinstance(item.get("text"), str):
            return item["text"]
        parts: Any = item.get("content")
        if isinstance(parts, str):
            return parts
        if isinstance(parts, list | tuple) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in parts):
            return "\n".join(_text(part, name) for part in parts)
    raise ClientError(f"{name} must be texts, got {item!r}", name, item)


class _Shortener:
    """Cuts first and second texts to so many tokens."""

    def __init__(self, tokenizer: Tokenizer, longest: int, cut: tuple[int, int]) -> None:
        self._tokenizer = tokenizer
        for most in cut:
            if most < 0 or most > longest:
                text = f"max_tokens_per_query and max_tokens_per_doc must be in [0, {longest}], got {most}"
                raise ClientError(text, "max_tokens_per_doc", most)
        self._cut = cut

    def __call__(self, side: int, text: str) -> str:
        most = self._cut[side]
        if not most:
            return text
        tokens = self._tokenizer.encode(text, add_special_tokens=False)
        return text if len(tokens) <= most else self._tokenizer.decode(tokens[:most])


def _most(params: PoolingParams, longest: int) -> int | None:
    keep = params.truncate_prompt_tokens
    return longest if keep == -1 else keep


def _tokens(tokenizer: Tokenizer, pair: tuple[str, str], most: int | None) -> dict[str, Any]:
    ids, types = tokenizer.encode_pair(*pair, most)
    return {"prompt_token_ids": ids, "token_type_ids": types}


def _rendered(tokenizer: Tokenizer, template: str, pair: tuple[str, str], kwargs: Mapping[str, Any]) -> str:
    messages = [{"role": "query", "content": pair[0]}, {"role": "document", "content": pair[1]}]
    return render_chat(tokenizer, messages, chat_template=template, add_generation_prompt=False, template_kwargs=kwargs)
