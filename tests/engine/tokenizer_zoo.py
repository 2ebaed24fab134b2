"""Tiny tokenizers that the tests train themselves: the kinds that checkpoints have."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from quire.engine.tokenizer import FastTokenizer

TEXT = [
    "The capital of France is Paris. The capital of Italy is Rome.",
    "one two three four five six seven eight nine ten",
    "Größe, Übung, naïve café, señor, 你好世界, 日本語, 🙂👍🏽, ไทย",
    "def f(x):\n    return x + 1\r\n\tprint('a', \"b\")",
    "aaa aab aba abb baa bab bba bbb stop ###",
] * 3
SPECIAL = ["<s>", "</s>", "<|end|>"]
KINDS = ("byte_level", "llama", "metaspace", "wordpiece", "suffix")
CHAT = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def _byte_level() -> Tokenizer:
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return t


def _llama() -> Tokenizer:
    """SentencePiece BPE with byte fallback, as Llama's."""
    pieces = [f"<0x{b:02X}>" for b in range(256)]
    t = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    ascii_only = [line for line in TEXT if line.isascii()]
    t.train_from_iterator(
        ascii_only,
        trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", *SPECIAL, *pieces], show_progress=False),
    )
    spec = json.loads(t.to_str())
    spec["added_tokens"] = [a for a in spec["added_tokens"] if a["content"] not in pieces]
    return Tokenizer.from_str(json.dumps(spec))


def _metaspace() -> Tokenizer:
    t = Tokenizer(models.Unigram())
    t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    t.decoder = decoders.Metaspace(prepend_scheme="always")
    t.train_from_iterator(
        TEXT,
        trainers.UnigramTrainer(
            vocab_size=150, special_tokens=["<unk>", *SPECIAL], unk_token="<unk>", show_progress=False
        ),
    )
    return t


def _wordpiece() -> Tokenizer:
    """Not followed token by token: a decoder that joins words and mends the spaces before punctuation."""
    t = Tokenizer(models.WordPiece(unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    t.decoder = decoders.WordPiece()
    t.train_from_iterator(
        TEXT, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["<unk>", *SPECIAL], show_progress=False)
    )
    return t


def _suffix() -> Tokenizer:
    """A BPE that marks the ends of words, as the first GPT's."""
    t = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    t.decoder = decoders.BPEDecoder(suffix="</w>")
    t.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<unk>", *SPECIAL], end_of_word_suffix="</w>", show_progress=False
        ),
    )
    return t


@cache
def backend_json(kind: str) -> str:
    t = {
        "byte_level": _byte_level,
        "llama": _llama,
        "metaspace": _metaspace,
        "wordpiece": _wordpiece,
        "suffix": _suffix,
    }[kind]()
    t.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    bos = t.token_to_id("<s>")
    if kind != "byte_level":
        t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return t.to_str()


def write_folder(folder: Path, kind: str = "byte_level", **settings: object) -> Path:
    """A checkpoint's tokenizer files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(backend_json(kind), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "additional_special_tokens": ["<|end|>"],
        "chat_template": CHAT,
        "model_max_length": 1000,
        **settings,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@cache
def trained(kind: str = "byte_level") -> FastTokenizer:
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_templates": {"default": CHAT}}
    return FastTokenizer(Tokenizer.from_str(backend_json(kind)), settings, lambda: None)
