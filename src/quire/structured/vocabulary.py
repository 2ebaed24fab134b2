"""A checkpoint's tokens as llguidance sees them. Owns: reading them from tokenizer.json and the names beside it.

Knows no grammar. A tokenizer of 128k tokens takes about half a second to read, so this is done once an engine, when
the first constraint comes.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from quire.types.errors import ClientError


def read_tokenizer(folder: Path) -> str:
    """tokenizer.json of `folder` as text, with the special tokens that only tokenizer_config.json calls so.

    Raises `ClientError` where there is none.
    """
    file = folder / "tokenizer.json"
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as e:
        raise ClientError(
            f"structured_outputs need a tokenizer.json, and {folder} has none: save it there with Transformers' "
            "tokenizer.save_pretrained",
            "structured_outputs",
        ) from e
    settings_file = folder / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text(encoding="utf-8")) if settings_file.is_file() else {}
    special, listed = _special(settings), settings.get("added_tokens_decoder") or {}
    data = json.loads(text)
    added: list[dict[str, Any]] = data.get("added_tokens") or []
    known = {token["id"] for token in added}
    changed = False
    for key, entry in listed.items():
        if int(key) not in known:
            flags = {
                name: bool(entry.get(name)) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")
            }
            added.append({"id": int(key), "content": entry["content"], **flags})
            changed = True
    for token in added:
        if token["content"] in special and not token.get("special"):
            token["special"] = changed = True
    if not changed:
        return text
    data["added_tokens"] = sorted(added, key=lambda token: token["id"])
    return json.dumps(data)


def _special(settings: dict[str, Any]) -> set[str]:
    names = [settings.get(name) for name in settings if name.endswith("_token")]
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or ()
    names += list(extra.values()) if isinstance(extra, dict) else list(extra)
    names += [e for e in (settings.get("added_tokens_decoder") or {}).values() if e.get("special")]
    return {n["content"] if isinstance(n, dict) else n for n in names if isinstance(n, str | dict)}


def special_tokens(tokenizer: str) -> dict[str, int]:
    """Text and id of each special token of a tokenizer.json."""
    added = json.loads(tokenizer).get("added_tokens") or []
    return {token["content"]: token["id"] for token in added if token.get("special")}


def size_of(tokenizer: str) -> int:
    """One more than the largest token id of a tokenizer.json."""
    data = json.loads(tokenizer)
    vocab = (data.get("model") or {}).get("vocab") or {}
    ids = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
    added = [token["id"] for token in data.get("added_tokens") or []]
    return 1 + max(max(ids, default=-1), max(added, default=-1))


_LAZY = re.compile(r"\[lazy\](: \w+ <\[)")
_QUOTED = re.compile(r'"(?:[^"\\\n]|\\.)*"')


def name_special(grammar: str, special: dict[str, int]) -> str:
    """A grammar in Lark's notation in which a quoted string that is exactly a special token's text means that token."""

    def token(match: re.Match[str]) -> str:
        try:
            number = special.get(json.loads(match.group()))
        except ValueError:
            return match.group()
        return match.group() if number is None else f"<[{number}]>"

    # a token ends the text before it by itself, where a string needs a lazy terminal to
    return _LAZY.sub(r"\1", _QUOTED.sub(token, grammar))
