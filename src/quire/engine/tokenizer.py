"""Text to token ids and back, with little to import.

Owns: loading a checkpoint's tokenizer and its special tokens and chat templates. `FastTokenizer` reads `tokenizer.json`
with the `tokenizers` library alone: Transformers takes longer to import than a small model to load, and is only needed
where a checkpoint has no such file or brings its own code, or where the user asks for its tokenizer object.
Knows nothing of requests; incremental decoding is in `detokenizer`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from quire.config.hub import tokenizer_folder
from quire.config.schema import Config
from quire.types.errors import ClientError
from quire.utils.logging import get_logger
from quire.utils.optional import available

log = get_logger(__name__)

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
NONE = "and this engine has none (skip_tokenizer_init, or a checkpoint without one)"  # what needs one says so
_MODES = ("auto", "hf", "slow")
_LONG = 2_000  # characters; a batch, even of one text, is tokenized without Python's lock, so that others go on
_FILES = ("tokenizer*", "vocab.*", "*.model", "*.tiktoken", "tekken.json")


class Tokenizer(Protocol):
    """What the engine needs of a tokenizer. `decoder` is the decoder section of tokenizer.json, where there is one;
    `special_tokens` maps names ("eos_token") to texts; `chat_templates` maps names ("default") to Jinja sources."""

    eos_token_id: int | None
    special_ids: frozenset[int]
    special_tokens: dict[str, str]
    chat_templates: dict[str, str]

    @property
    def decoder(self) -> dict[str, Any] | None: ...
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...
    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]: ...
    def encode_cut(self, text: str, add_special_tokens: bool, most: int, side: str) -> list[int]:
        """At most `most` tokens, special ones among them; `side` ("left", "right") is where the text is cut."""
        ...

    def encode_pair(self, first: str, second: str, most: int | None = None) -> tuple[list[int], list[int]]:
        """The tokens of two texts with what separates them, and of each token to which text it belongs. Beyond `most`
        tokens the longer text is cut at its end."""
        ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True, spaces_between: bool = True) -> str: ...
    def id_to_token(self, token_id: int) -> str | None: ...
    def transformers(self) -> Any: ...


class FastTokenizer:
    """A `tokenizers.Tokenizer` with the special tokens and templates that its folder names beside it."""

    def __init__(self, backend: Any, settings: dict[str, Any], hf: Callable[[], Any]) -> None:
        """`settings`: tokenizer_config.json with `chat_templates` resolved; `hf` makes Transformers' object."""
        self.backend = backend
        self._hf = hf
        backend.no_padding()
        backend.no_truncation()
        self.special_tokens: dict[str, str] = {n: t for n in _NAMED if (t := _text(settings.get(n)))}
        self.chat_templates: dict[str, str] = settings.get("chat_templates", {})
        self._add_special(settings)
        added: dict[int, Any] = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, t in added.items() if t.special)
        eos = self.special_tokens.get("eos_token")
        self.eos_token_id: int | None = None if eos is None else backend.token_to_id(eos)

    @property
    def decoder(self) -> dict[str, Any] | None:
        decoder = self.backend.decoder
        # the binding pickles a decoder as its JSON; serialising the whole tokenizer would write out the vocabulary
        return None if decoder is None else json.loads(decoder.__getstate__())

    def _add_special(self, settings: dict[str, Any]) -> None:
        """Make special what the settings call special, as Transformers does: some folders name tokens there only."""
        from tokenizers import AddedToken

        listed = settings.get("added_tokens_decoder") or {}
        known = self.backend.get_added_tokens_decoder()
        for key, entry in sorted(listed.items(), key=lambda item: int(item[0])):
            if int(key) not in known or known[int(key)].special != bool(entry.get("special")):
                flags = {k: bool(entry[k]) for k in ("lstrip", "rstrip", "single_word", "normalized") if k in entry}
                special = bool(entry.get("special"))
                add = self.backend.add_special_tokens if special else self.backend.add_tokens
                add([AddedToken(entry["content"], special=special, **flags)])
        extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or ()
        extra = list(extra.values()) if isinstance(extra, dict) else list(extra)
        texts = [*self.special_tokens.values(), *(t for e in extra if (t := _text(e)))]
        special = {t.content for t in self.backend.get_added_tokens_decoder().values() if t.special}
        self.backend.add_special_tokens([t for t in dict.fromkeys(texts) if t not in special])

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        if len(text) > _LONG:
            return self.encode_batch([text], add_special_tokens)[0]
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as e:
            raise _no_text(e) from e

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        try:
            return [e.ids for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)]
        except TypeError as e:
            raise _no_text(e) from e

    def encode_cut(self, text: str, add_special_tokens: bool, most: int, side: str) -> list[int]:
        found = self._bare(text)
        found.truncate(max(0, most - self._added(False, add_special_tokens)), direction=side)
        return self.backend.post_process(found, None, add_special_tokens).ids

    def encode_pair(self, first: str, second: str, most: int | None = None) -> tuple[list[int], list[int]]:
        a, b = self._bare(first), self._bare(second)
        if most is not None:
            left, right = _share(len(a.ids), len(b.ids), max(0, most - self._added(True, True)))
            a.truncate(left)
            b.truncate(right)
        whole = self.backend.post_process(a, b, True)
        return whole.ids, whole.type_ids

    def _bare(self, text: str) -> Any:
        try:
            if len(text) > _LONG:
                return self.backend.encode_batch([text], add_special_tokens=False)[0]
            return self.backend.encode(text, add_special_tokens=False)
        except TypeError as e:
            raise _no_text(e) from e

    def _added(self, pair: bool, special: bool) -> int:
        return self.backend.num_special_tokens_to_add(pair) if special else 0

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True, spaces_between: bool = True) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def id_to_token(self, token_id: int) -> str | None:
        return self.backend.id_to_token(token_id)

    def transformers(self) -> Any:
        return self._hf()


class TransformersTokenizer:
    """A tokenizer of Transformers that has no `tokenizers` object inside: one written in Python."""

    def __init__(self, hf: Any) -> None:
        self.hf = hf
        self.decoder: dict[str, Any] | None = None
        self.eos_token_id: int | None = hf.eos_token_id
        self.special_ids = frozenset(hf.all_special_ids)
        self.special_tokens: dict[str, str] = {n: str(t) for n in _NAMED if (t := getattr(hf, n, None))}
        self.chat_templates = _templates(getattr(hf, "chat_template", None))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.hf.encode(text, add_special_tokens=add_special_tokens)

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        return [self.encode(text, add_special_tokens) for text in texts]

    def encode_cut(self, text: str, add_special_tokens: bool, most: int, side: str) -> list[int]:
        bare = self.encode(text, False)
        room = max(0, most - (self.hf.num_special_tokens_to_add() if add_special_tokens else 0))
        cut = bare[:room] if side == "right" else bare[len(bare) - min(room, len(bare)) :]
        return self.hf.build_inputs_with_special_tokens(cut) if add_special_tokens else cut

    def encode_pair(self, first: str, second: str, most: int | None = None) -> tuple[list[int], list[int]]:
        a, b = self.encode(first, False), self.encode(second, False)
        if most is not None:
            left, right = _share(len(a), len(b), max(0, most - self.hf.num_special_tokens_to_add(pair=True)))
            a, b = a[:left], b[:right]
        types = self.hf.create_token_type_ids_from_sequences(a, b)
        return self.hf.build_inputs_with_special_tokens(a, b), types

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True, spaces_between: bool = True) -> str:
        kwargs = {} if spaces_between else {"spaces_between_special_tokens": False}
        return self.hf.decode(list(ids), skip_special_tokens=skip_special_tokens, **kwargs)

    def id_to_token(self, token_id: int) -> str | None:
        return self.hf.convert_ids_to_tokens(token_id)

    def transformers(self) -> Any:
        return self.hf


def load_tokenizer(config: Config) -> Tokenizer | None:
    """The tokenizer of `config`, None where it is switched off, or where the checkpoint has none and no other is named.

    Raises ClientError where the folder that is named holds none, or one that needs a library or a permission.
    """
    model = config.model
    if model.skip_tokenizer_init:
        return None
    if model.tokenizer_mode not in _MODES:
        text = f"tokenizer_mode must be one of {', '.join(_MODES)}, got {model.tokenizer_mode!r}"
        raise ClientError(text, "tokenizer_mode", model.tokenizer_mode)
    folder = tokenizer_folder(config)
    if folder == model.path and not _has_files(folder):
        log.warning("%s has no tokenizer files: token ids in, token ids out; tokenizer=... names another", folder)
        return None
    return load_folder(folder, model.tokenizer_mode, model.trust_remote_code)


def load_folder(folder: Path, mode: str = "auto", trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer in `folder`; see `load_tokenizer`."""

    def hf(use_fast: bool = True) -> Any:
        return _load_transformers(folder, use_fast, trust_remote_code)

    settings = _settings(folder)
    file = folder / "tokenizer.json"
    if mode == "auto" and file.is_file() and not (trust_remote_code and "auto_map" in settings):
        import tokenizers

        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as e:  # the library raises bare Exception
            raise ClientError(f"{file} is not a readable tokenizer: {_line(e)}", "tokenizer", str(folder)) from e
        return FastTokenizer(backend, settings, hf)
    if not _has_files(folder):
        text = f"no tokenizer files in {folder}; give tokenizer=..., or skip_tokenizer_init=True and token ids"
        raise ClientError(text, "tokenizer", str(folder))
    slow = hf(mode != "slow")
    backend = getattr(slow, "backend_tokenizer", None)
    if backend is None:
        return TransformersTokenizer(slow)
    named = {n: str(t) for n in _NAMED if (t := getattr(slow, n, None))}
    templates = _templates(getattr(slow, "chat_template", None))
    return FastTokenizer(backend, {**named, "chat_templates": templates}, lambda: slow)


def _has_files(folder: Path) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in _FILES)


def _load_transformers(folder: Path, use_fast: bool, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), use_fast=use_fast, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as e:
        if not trust_remote_code and "trust_remote_code" in str(e):
            text = f"the tokenizer in {folder} has Python code of its own: say trust_remote_code=True if you trust it"
            raise ClientError(f"{text}, or give another with tokenizer=...", "trust_remote_code", False) from e
        absent = [name for name in ("sentencepiece", "google.protobuf") if not _installed(name)]
        if absent and next(folder.glob("*.model"), None) and not (folder / "tokenizer.json").exists():
            text = (
                f"the tokenizer in {folder} is one of SentencePiece, without a tokenizer.json: to read it, pip install"
            )
            raise ClientError(f"{text} sentencepiece protobuf", "tokenizer", str(folder)) from e
        text = f"cannot load a tokenizer from {folder} ({_line(e)}); give tokenizer=..., or skip_tokenizer_init=True"
        raise ClientError(text, "tokenizer", str(folder)) from e


def _installed(package: str) -> bool:
    try:
        return available(package)
    except ModuleNotFoundError:  # the package that it would be in
        return False


def _settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, with what older and newer folders keep in files of their own."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            try:
                settings.update(json.loads((folder / name).read_text(encoding="utf-8")))
            except ValueError as e:
                raise ClientError(f"{folder / name} is not valid JSON: {_line(e)}", "tokenizer", str(folder)) from e
    templates = _templates(settings.get("chat_template"))
    more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    templates.update({file.stem: file.read_text(encoding="utf-8") for file in more})
    if (folder / "chat_template.jinja").is_file():
        templates["default"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return {**settings, "chat_templates": templates}


def _templates(given: Any) -> dict[str, str]:
    """A template, named templates in either of their two spellings, or nothing, as a dict."""
    if not given:
        return {}
    if isinstance(given, str):
        return {"default": given}
    return dict(given) if isinstance(given, dict) else {entry["name"]: entry["template"] for entry in given}


def _share(first: int, second: int, most: int) -> tuple[int, int]:
    """Lengths of a pair that are `most` together: the longer one gives way."""
    if first + second <= most:
        return first, second
    short = min(first, second, most // 2)
    return (short, most - short) if first <= second else (most - short, short)


def _text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _no_text(error: TypeError) -> ClientError:
    return ClientError(f"a text is not valid Unicode: it holds half of a surrogate pair ({error})", "prompt")


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
