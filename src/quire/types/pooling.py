"""How a request wants its prompt pooled: `PoolingParams`, and the tasks.

Owns: the fields (vLLM's names and defaults) and what follows from them alone. Which tasks a model has, and what they
mean for it, is the engine's configuration (`config/pooling.py`).
"""

from __future__ import annotations

import copy
from typing import Any

import msgspec

from quire.types.errors import ClientError
from quire.types.params import Named, RequestOutputKind, flag, integer

EMBED, CLASSIFY, TOKEN_EMBED, TOKEN_CLASSIFY = "embed", "classify", "token_embed", "token_classify"
TASKS = (EMBED, CLASSIFY, TOKEN_EMBED, TOKEN_CLASSIFY)
_NOT_YET = ("late_interaction_params", "late_chunking_params", "step_tag_id", "returned_token_ids")


class PoolingParams(msgspec.Struct, metaclass=Named, omit_defaults=True, tag=True):
    """Pooling of one request, with vLLM's fields and defaults.

    Args:
        use_activation: normalise an embedding, turn logits into probabilities; None: what the model says (mostly yes).
            `normalize` is an older name.
        dimensions: cut an embedding to so many numbers, where the model was trained for it.
        task: "embed" (one vector), "classify" (one line of scores), "token_embed", "token_classify" (one for each
            token); the methods and endpoints of one task set it.
        truncate_prompt_tokens: keep at most so many prompt tokens (-1: as many as the model's length allows), from the
            side that `truncation_side` ("right", the default, keeps the first ones) says.
        skip_reading_prefix_cache: compute the whole prompt; set by the engine where every position is needed.
        second_segment: filled by the engine: the token at which the second text of a pair begins.

    Raises:
        ClientError: a value is out of its range, or belongs to something that quire does not have yet.
    """

    use_activation: bool | None = None
    dimensions: int | None = None
    step_tag_id: int | None = None
    returned_token_ids: list[int] | None = None
    task: str | None = None
    requires_token_ids: bool = False
    skip_reading_prefix_cache: bool | None = None
    late_interaction_params: Any = None
    extra_kwargs: dict[str, Any] | None = None
    output_kind: RequestOutputKind = RequestOutputKind.FINAL_ONLY
    late_chunking_params: Any = None
    truncate_prompt_tokens: int | None = None
    truncation_side: str | None = None
    normalize: bool | None = None
    second_segment: int | None = None

    def __post_init__(self) -> None:
        self.verify()

    def verify(self) -> None:
        """Check every field. Doing it twice changes nothing, so that it can be repeated after the user assigned to
        fields."""
        for name in _NOT_YET:
            if (value := getattr(self, name)) is not None:
                raise ClientError(f"{name} is not supported yet; leave it out", name, value)
        for name in ("use_activation", "normalize", "skip_reading_prefix_cache"):
            if getattr(self, name) is not None:
                flag(name, getattr(self, name))
        if self.normalize is not None:
            if self.use_activation not in (None, self.normalize):
                raise ClientError("normalize and use_activation are one thing: give one of them", "normalize")
            self.use_activation = self.normalize
        if self.dimensions is not None:
            self.dimensions = integer("dimensions", self.dimensions, 1)
        if self.task is not None and self.task not in TASKS:
            raise ClientError(f"task must be one of {', '.join(TASKS)}, got {self.task!r}", "task", self.task)
        if self.truncate_prompt_tokens is not None:
            value = integer("truncate_prompt_tokens", self.truncate_prompt_tokens, -1)
            if value == 0:
                raise ClientError("truncate_prompt_tokens must be -1 or at least 1, got 0", "truncate_prompt_tokens", 0)
            self.truncate_prompt_tokens = value
        if self.truncation_side not in (None, "left", "right"):
            text = f"truncation_side must be left or right, got {self.truncation_side!r}"
            raise ClientError(text, "truncation_side", self.truncation_side)

    def clone(self) -> PoolingParams:
        return copy.copy(self)
