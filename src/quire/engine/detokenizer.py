"""Token ids to text, piece by piece, in constant time for each token.

Owns: what each token contributes to the text (`Detokenizer`, one for an engine) and where one sequence stands
(`TextStream`). Text once handed out is never taken back, and all of it together equals what the tokenizer's own decoder
makes of the whole sequence. Two decoders can be followed exactly, token by token, which covers nearly every checkpoint:

* byte-level: tokens are bytes, the text is their UTF-8 reading (a broken character becomes U+FFFD);
* pieces (SentencePiece): tokens are texts with a sign for the space. Byte tokens ("<0xE4>") stand for characters
  outside the vocabulary: a run of them is read as a whole, so it is held back until the run ends.

Others are decoded in windows of a few tokens, and compared with the whole at the end. An output continues its prompt:
the space that decoders drop at the beginning of a text is kept, unless the prompt has no text.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from quire.engine.tokenizer import Tokenizer

BROKEN = "\ufffd"
_CONTEXT = 6  # prompt tokens that a window begins with
_PATIENCE = 6  # tokens that may wait for the rest of a character; UTF-8 needs at most 4 bytes


class Detokenizer:
    """What the tokens of one tokenizer mean. Tables are filled as tokens appear; sharing one object is what makes
    them pay. Not for use by several threads at once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.special_ids = tokenizer.special_ids
        self._names: dict[int, str] = {}
        program = _program(tokenizer.decoder)
        self.bytes_table = _ByteTable(tokenizer) if program == "bytes" else None
        self.piece_table = _PieceTable(tokenizer, program) if isinstance(program, _Pieces) else None

    def stream(self, prompt: Sequence[int], skip_special: bool = True, spaces_between: bool = True) -> TextStream:
        """A stream for the tokens that follow `prompt`."""
        skip = self.special_ids if skip_special else frozenset[int]()
        if self.bytes_table is not None:
            return _ByteStream(self.bytes_table, skip)
        if self.piece_table is not None:
            fresh = all(t in skip for t in prompt)
            return _PieceStream(self.piece_table, skip, fresh)
        return _WindowStream(self.tokenizer, prompt[-_CONTEXT:], skip_special, spaces_between)

    def decode(self, prompt: Sequence[int], tokens: Sequence[int], skip_special: bool, spaces_between: bool) -> str:
        """The text of `tokens` after `prompt`, at once."""
        return self.stream(prompt, skip_special, spaces_between).whole(tokens)

    def name(self, token: int) -> str:
        """The text of one token alone, as it reads in the middle of a text; special tokens by their names."""
        name = self._names.get(token)
        if name is None:
            if self.bytes_table is not None:
                name = self.bytes_table[token].decode("utf-8", "replace")
            elif self.piece_table is not None:
                piece = self.piece_table[token]
                name = piece.decode("utf-8", "replace") if isinstance(piece, bytes) else piece or ""
            else:
                name = self.tokenizer.decode([token], skip_special_tokens=False)
            self._names[token] = name
        return name


class TextStream:
    """The text of one sequence as its tokens come. `push` answers what is certain now, `finish` the rest."""

    def push(self, tokens: Sequence[int]) -> str:
        raise NotImplementedError

    def finish(self) -> str:
        raise NotImplementedError

    def whole(self, tokens: Sequence[int]) -> str:
        """The text of all tokens at once, instead of `push` and `finish`."""
        return self.push(tokens) + self.finish()


class _ByteTable(dict[int, bytes]):
    """Token -> bytes, by the byte-level alphabet of GPT-2: 188 printable characters stand for themselves, the other
    bytes for the characters from U+0100 on."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        rest = [b for b in range(256) if b not in plain]
        self._alphabet = {chr(b): b for b in plain} | {chr(0x100 + i): b for i, b in enumerate(rest)}

    def __missing__(self, token: int) -> bytes:
        text = self._tokenizer.id_to_token(token) or ""
        try:
            data = bytes([self._alphabet[c] for c in text])
        except KeyError:  # an added token, written as it reads
            data = text.encode("utf-8")
        self[token] = data
        return data


class _ByteStream(TextStream):
    def __init__(self, table: _ByteTable, skip: frozenset[int]) -> None:
        self._table, self._skip = table, skip
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, tokens: Sequence[int]) -> str:
        table, skip = self._table, self._skip
        return self._decoder.decode(b"".join([table[t] for t in tokens if t not in skip]))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Pieces:
    """A decoder of the SentencePiece family: `replace` in each token, then perhaps bytes, then `strip` leading `char`s
    of the whole text. `first_sign`: a sign that is dropped throughout the first token."""

    def __init__(self) -> None:
        self.replace: list[tuple[str, str]] = []
        self.byte_fallback = False
        self.strip = 0
        self.char = " "
        self.first_sign: str | None = None


class _PieceTable(dict[int, str | bytes | None]):
    """Token -> its text inside a sequence, or one byte; None for ids that the tokenizer does not have."""

    def __init__(self, tokenizer: Tokenizer, pieces: _Pieces) -> None:
        super().__init__()
        self._tokenizer, self.pieces = tokenizer, pieces

    def __missing__(self, token: int) -> str | bytes | None:
        text = self._tokenizer.id_to_token(token)
        if text is None:
            return self.setdefault(token, None)
        for old, new in self.pieces.replace:
            text = text.replace(old, new)
        piece = (self.pieces.byte_fallback and _byte(text)) or text
        self[token] = piece
        return piece

    def first(self, token: int) -> str | bytes | None:
        """As at the very beginning of a text."""
        text = self._tokenizer.id_to_token(token)
        if self.pieces.first_sign is None or text is None:
            return self[token]
        return text.replace(self.pieces.first_sign, "")


class _PieceStream(TextStream):
    def __init__(self, table: _PieceTable, skip: frozenset[int], fresh: bool) -> None:
        self._table, self._skip, self._first = table, skip, fresh
        self._strip = table.pieces.strip if fresh else 0
        self._run = bytearray()

    def push(self, tokens: Sequence[int]) -> str:
        out: list[str] = []
        for token in tokens:
            if token in self._skip:
                continue
            piece = self._table.first(token) if self._first else self._table[token]
            if piece is None:
                continue
            self._first = False
            if isinstance(piece, bytes):
                self._run += piece
                continue
            if self._run:
                out.append(self._end_run())
            out.append(piece)
        text = "".join(out)
        return self._stripped(text) if self._strip else text

    def finish(self) -> str:
        return self._stripped(self._end_run())

    def _end_run(self) -> str:
        run = bytes(self._run)
        self._run.clear()
        try:
            return run.decode("utf-8")
        except UnicodeDecodeError:
            return BROKEN * len(run)

    def _stripped(self, text: str) -> str:
        char = self._table.pieces.char
        while self._strip and text:
            if not text.startswith(char):
                self._strip = 0
                break
            text = text[1:]
            self._strip -= 1
        return text


class _WindowStream(TextStream):
    """For decoders that are not known: a token's text is what the decoder adds when it sees it after its neighbours.
    A decoder that looks further than a window comes out differently; what was sent is then left as it is."""

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int], skip_special: bool, spaces_between: bool) -> None:
        self._tokenizer = tokenizer
        self._options = (skip_special, spaces_between)
        self._ids = list(context)
        self._context = len(self._ids)
        self._start, self._read = 0, len(self._ids)
        self._sent: list[str] = []

    def _decode(self, start: int, end: int | None = None) -> str:
        return self._tokenizer.decode(self._ids[start:end], *self._options)

    def push(self, tokens: Sequence[int]) -> str:
        out: list[str] = []
        for token in tokens:
            self._ids.append(token)
            old, new = self._decode(self._start, self._read), self._decode(self._start)
            waiting = len(self._ids) - self._read
            if len(new) <= len(old) or (new.endswith(BROKEN) and waiting < _PATIENCE):
                if waiting < 8 * _PATIENCE:
                    continue
                new = old  # tokens without text: let the window move on
            out.append(new[len(old) :])
            self._start, self._read = self._read, len(self._ids)
        self._sent += out
        return "".join(out)

    def finish(self) -> str:
        before, whole = self._decode(0, self._context), self._decode(0)
        sent = before + "".join(self._sent)
        if whole.startswith(sent):
            return whole[len(sent) :]
        return self._decode(self._start)[len(self._decode(self._start, self._read)) :]

    def whole(self, tokens: Sequence[int]) -> str:
        self._ids += tokens
        return self.finish()


def _byte(token: str) -> bytes | None:
    """The byte that a token like "<0x0A>" stands for."""
    if len(token) != 6 or not token.isascii() or not token.startswith("<0x") or not token.endswith(">"):
        return None
    try:
        return bytes([int(token[3:5], 16)])
    except ValueError:
        return None


def _program(decoder: dict[str, Any] | None) -> str | _Pieces | None:
    """What a decoder section does, if it is one that can be followed token by token: "bytes", or pieces."""
    if decoder is None:
        return None
    steps: list[dict[str, Any]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return "bytes"
    pieces = _Pieces()
    if kinds == ["Metaspace"]:
        sign = steps[0]["replacement"]
        pieces.replace = [(sign, " ")]
        pieces.first_sign = None if steps[0].get("prepend_scheme", "always") == "never" else sign
        return pieces
    order = {"Replace": 0, "ByteFallback": 1, "Fuse": 2, "Strip": 3}
    ranks = [order.get(kind, -1) for kind in kinds]
    if -1 in ranks or ranks != sorted(ranks) or any(ranks.count(r) > 1 for r in (1, 2, 3)):
        return None
    for step in steps:
        if step["type"] == "Replace":
            if "String" not in step["pattern"]:
                return None
            pieces.replace.append((step["pattern"]["String"], step["content"]))
        elif step["type"] == "ByteFallback":
            pieces.byte_fallback = True
        elif step["type"] == "Strip":
            if step["stop"] or "Fuse" not in kinds:  # unfused, it strips every token
                return None
            pieces.strip, pieces.char = step["start"], step["content"]
    return pieces
