"""The tokenizer without Transformers equals the one with it; chat templates render as Transformers renders them."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from fake_client import make_config
from tokenizer_zoo import CHAT, KINDS, TEXT, trained, write_folder

from quire.engine.chat import render_chat
from quire.engine.detokenizer import Detokenizer
from quire.engine.tokenizer import FastTokenizer, TransformersTokenizer, load_folder, load_tokenizer
from quire.types.errors import ClientError

TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "well "},
]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(k, {}) for k in KINDS]
    + [
        ("byte_level", {"add_bos_token": True}),  # tokenizer.json has the last word
        ("llama", {"add_bos_token": False}),
        ("byte_level", {"additional_special_tokens": ["<new>"]}),
        ("byte_level", {"added_tokens_decoder": {"500": {"content": "<late>", "special": True}}}),
    ],
)
def test_equals_transformers(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    write_folder(tmp_path, kind, **settings)
    ours, theirs = load_folder(tmp_path), load_folder(tmp_path).transformers()
    assert isinstance(ours, FastTokenizer)
    for text in [*TEXT[:5], "<s>hello<|end|> <tool>", "", "<new> <late>x"]:
        for special in (True, False):
            tokens = ours.encode(text, special)
            assert tokens == theirs.encode(text, add_special_tokens=special), text
            assert ours.encode_batch([text, text], special) == [tokens, tokens]
            for skip in (True, False):
                want = theirs.decode(tokens, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
                assert ours.decode(tokens, skip) == want
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.special_ids == set(theirs.all_special_ids) | ours.special_ids  # <unk> may be special in the file alone
    through = load_folder(tmp_path, mode="hf")
    assert isinstance(through, FastTokenizer) and through.encode(TEXT[0]) == ours.encode(TEXT[0])


def test_special_tokens_as_objects_and_in_their_own_file(tmp_path: Path) -> None:
    write_folder(tmp_path, bos_token={"content": "<s>", "special": True}, eos_token=None)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    t = load_folder(tmp_path)
    assert t.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"} and t.eos_token_id == 1


def test_python_tokenizer(tmp_path: Path) -> None:
    """Transformers' own Python tokenizers work through the same interface."""
    write_folder(tmp_path)

    class Slow:
        eos_token_id, all_special_ids, eos_token, chat_template = 1, [0, 1], "</s>", CHAT

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [ord(c) for c in text]

        def decode(self, ids: list[int], skip_special_tokens: bool = True, **kwargs: Any) -> str:
            return "".join(map(chr, ids)) + str(kwargs.get("spaces_between_special_tokens", ""))

        def convert_ids_to_tokens(self, token: int) -> str:
            return chr(token)

    t = TransformersTokenizer(Slow())
    assert t.encode_batch(["ab", "c"]) == [[97, 98], [99]] and t.decode([97]) == "a" and t.id_to_token(97) == "a"
    assert t.decode([97], spaces_between=False) == "aFalse"
    assert t.special_tokens == {"eos_token": "</s>"} and t.chat_templates == {"default": CHAT}


TEXTS = ["Hello, world", "größe\n ünïcode 你好 🙂", " two  spaces ", ""]


@pytest.mark.parametrize("mode", ["auto", "slow"])
def test_a_tokenizer_that_transformers_has_in_python_only(tmp_path: Path, mode: str) -> None:
    transformers.ByT5Tokenizer().save_pretrained(tmp_path)
    t = load_folder(tmp_path, mode)
    assert isinstance(t, TransformersTokenizer)
    hf = transformers.AutoTokenizer.from_pretrained(tmp_path)
    detokenizer = Detokenizer(t)
    for text in TEXTS:
        ids = t.encode(text)
        assert ids == hf.encode(text) and t.encode(text, False) == hf.encode(text, add_special_tokens=False)
        assert t.decode(ids) == hf.decode(ids, skip_special_tokens=True) == text
        stream, shown = detokenizer.stream([], True), ""
        for token in t.encode(text, False):
            shown += stream.push([token])
        assert shown + stream.finish() == text
    assert t.eos_token_id == hf.eos_token_id and t.special_tokens["eos_token"] == "</s>"


SENTENCE = "the quick brown fox jumps over the lazy dog while the engine counts its tokens and the dog counts the fox"


@pytest.mark.parametrize("mode", ["auto", "slow"])
def test_a_sentencepiece_model_without_tokenizer_json(tmp_path: Path, mode: str) -> None:
    spm = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    made = io.BytesIO()
    options: dict[str, Any] = {
        "vocab_size": 300,
        "byte_fallback": True,
        "unk_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "minloglevel": 2,
    }
    options |= {"sentence_iterator": iter([SENTENCE] * 20), "model_writer": made, "model_type": "bpe"}
    spm.SentencePieceTrainer.train(**options)
    (tmp_path / "tokenizer.model").write_bytes(made.getvalue())
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    t, judge = load_folder(tmp_path, mode), spm.SentencePieceProcessor(model_proto=made.getvalue())
    for text in ("the engine", "größe 你 🙂", SENTENCE):
        assert t.encode(text, add_special_tokens=False) == judge.encode(text)
        assert t.decode(judge.encode(text)) == text


def test_a_sentencepiece_model_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setattr("quire.engine.tokenizer.available", lambda name: name != "sentencepiece")
    with pytest.raises(ClientError, match="pip install sentencepiece protobuf") as e:
        load_folder(tmp_path)
    assert "\n" not in str(e.value)


CODE = """
from transformers import ByT5Tokenizer

class OwnTokenizer(ByT5Tokenizer):
    def _tokenize(self, text):
        return super()._tokenize(text[::-1])
"""


def test_a_tokenizer_whose_code_lies_in_the_checkpoint(tmp_path: Path) -> None:
    transformers.ByT5Tokenizer().save_pretrained(tmp_path)
    (tmp_path / "own_tokenizer.py").write_text(CODE)
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own_tokenizer.OwnTokenizer", None]}}
    file.write_text(json.dumps(settings))
    with pytest.raises(ClientError, match="trust_remote_code") as e:
        load_folder(tmp_path)
    assert "\n" not in str(e.value)
    plain = transformers.ByT5Tokenizer()
    assert load_folder(tmp_path, trust_remote_code=True).encode("abc", False) == plain.encode(
        "cba", add_special_tokens=False
    )


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "no tokenizer files"),
        ({"tokenizer.json": "{"}, "tokenizer.json is not a readable tokenizer"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": "{"}, "tokenizer_config.json is not valid JSON"),
    ],
)
def test_bad_folders(tmp_path: Path, files: dict[str, str], words: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ClientError, match=words) as e:
        load_folder(tmp_path)
    assert "\n" not in str(e.value)


TEMPLATES = [
    CHAT,
    "{%- for m in messages %}\n  {%- if loop.first %}{{ bos_token }}{% endif %}\n{{ m.role }}: {{ m.content | trim }}\n"
    "{% endfor %}",
    "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}[{{ m.content }}]{% endfor %}"
    "{{ eos_token }}",
    "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
    "{{ messages | tojson(indent=1) }}{{ tools | tojson if tools }}{{ extra }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_renders_as_transformers(tmp_path: Path, template: str) -> None:
    write_folder(tmp_path, chat_template=template)
    t = load_folder(tmp_path)
    hf = t.transformers()
    tools = [{"type": "function", "function": {"name": "größe", "parameters": {}}}]
    for kwargs in ({}, {"tools": tools}):
        ours = render_chat(t, TURNS, template_kwargs={"extra": "<é>"}, **kwargs)
        theirs = hf.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True, extra="<é>", **kwargs)
        assert ours == theirs
    if "messages | tojson" not in template:
        for last in ("well", "well "):
            turns = [*TURNS[:2], {"role": "assistant", "content": last}]
            options: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
            assert render_chat(t, turns, **options) == hf.apply_chat_template(turns, tokenize=False, **options)


def test_tools_given_as_functions() -> None:
    def add(a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: the first
            b: the second
        """
        return a + b

    assert '"name": "add"' in render_chat(trained(), TURNS, tools=[add])


def test_contents_as_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts}]
    assert "<user>a\nb<|end|>" in render_chat(trained(), messages)
    loop = "{% for m in messages %}{% for c in m['content'] %}({{ c['text'] }}){% endfor %}{% endfor %}"
    assert render_chat(trained(), messages, chat_template=loop) == "(a)(b)"
    named = "{% for m in messages %}{% set x = m.content %}{% for c in x %}({{ c.text }}){% endfor %}{% endfor %}"
    assert render_chat(trained(), [{"role": "user", "content": "ab"}], chat_template=named) == "(ab)"
    assert "<user>a\nb<|end|>" in render_chat(trained(), messages, content_format="string")


def test_arguments_of_tool_calls_become_objects() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    template = (
        "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.arguments.x + 1 }}{% endfor %}{% endfor %}"
    )
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    assert render_chat(trained(), messages, chat_template=template) == "2"


def test_template_from_a_file_and_by_name(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("file {{ messages[0].content }}")
    assert render_chat(trained(), TURNS, chat_template=str(tmp_path / "t.jinja")) == "file be brief"
    write_folder(
        tmp_path / "m", chat_template=[{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    )
    t = load_folder(tmp_path / "m")
    assert [render_chat(t, TURNS), render_chat(t, TURNS, tools=[{}])] == ["d", "t"]
    assert render_chat(t, TURNS, chat_template="tool_use") == "t"
    (tmp_path / "m" / "chat_template.jinja").write_text("beside")
    assert render_chat(load_folder(tmp_path / "m"), TURNS) == "beside"


@pytest.mark.parametrize(
    ("messages", "options", "words"),
    [
        ([], {}, "no messages"),
        (["hi"], {}, "role"),
        ([{"role": "user"}], {}, "needs 'content'"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], {}, "image_url.*not supported yet"),
        ([{"role": "user", "content": [{"type": "text"}]}], {}, "string 'text'"),
        (TURNS, {"chat_template": "{% for %}"}, "syntax error"),
        (TURNS, {"chat_template": "{{ raise_exception('no system') }}"}, "no system"),
        (TURNS, {"chat_template": "{{ messages[0].content + 1 }}"}, "failed"),
        (TURNS, {"chat_template": "{{ ''.__class__.__mro__ }}"}, "refused"),
        (TURNS, {"chat_template": "nowhere.jinja"}, "nowhere.jinja"),
        (TURNS, {"continue_final_message": True}, "add_generation_prompt=False"),
        (
            TURNS,
            {"continue_final_message": True, "add_generation_prompt": False, "chat_template": "{{ 'x' }}"},
            "does not show",
        ),
    ],
)
def test_bad_chats(messages: list[Any], options: dict[str, Any], words: str) -> None:
    with pytest.raises(ClientError, match=words):
        render_chat(trained(), messages, **options)


def test_no_template(tmp_path: Path) -> None:
    with pytest.raises(ClientError, match="no chat template"):
        render_chat(load_folder(write_folder(tmp_path, chat_template=None)), TURNS)


def test_a_missing_tokenizer_folder_is_named_as_one(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    config = replace(config, model=replace(config.model, tokenizer="/nowhere/tokenizer"))
    with pytest.raises(ClientError, match=r"^tokenizer='/nowhere/tokenizer'") as e:
        load_tokenizer(config)
    assert e.value.parameter == "tokenizer"
