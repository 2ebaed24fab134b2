"""The shapes a prompt may have. Owns: the dict forms and the union of all forms; checks nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NotRequired, Required, TypeAlias, TypedDict


class TextPrompt(TypedDict):
    """A prompt as text. `cache_salt` keeps its prefix-cache entries apart from those of other salts."""

    prompt: Required[str]
    multi_modal_data: NotRequired[Mapping[str, Any] | None]
    mm_processor_kwargs: NotRequired[dict[str, Any] | None]
    multi_modal_uuids: NotRequired[Mapping[str, Any] | None]
    cache_salt: NotRequired[str]


class TokensPrompt(TypedDict):
    """A prompt as token ids; `prompt`, if given, is only reported back. `token_type_ids`: of a pair of texts."""

    prompt_token_ids: Required[list[int]]
    token_type_ids: NotRequired[list[int]]
    prompt: NotRequired[str]
    multi_modal_data: NotRequired[Mapping[str, Any] | None]
    mm_processor_kwargs: NotRequired[dict[str, Any] | None]
    multi_modal_uuids: NotRequired[Mapping[str, Any] | None]
    cache_salt: NotRequired[str]


PromptType: TypeAlias = str | list[int] | TextPrompt | TokensPrompt
