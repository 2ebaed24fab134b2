"""Grammars are compiled aside, under limits: hostile ones are refused in time and harm nobody."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from quire.config.hub import demo_model_path
from quire.structured.compiler import Compiler, compiled
from quire.structured.vocabulary import name_special, read_tokenizer, special_tokens
from quire.types.errors import BusyError, ClientError, EngineError
from quire.types.params import StructuredOutputsParams as S

LIMIT_S = 1.0
NULLS = {"type": "array", "items": {"type": "null"}}


@pytest.fixture(scope="module")
def compiler() -> Compiler:
    made = Compiler(demo_model_path(), 3072, (2, 0), LIMIT_S)
    made.compile(S(choice=["warm"]))
    return made


def accepts(compiler: Compiler, params: S, text: str) -> bool:
    """Whether a text may stand, as a whole."""
    matcher = compiler.compile(params).matcher()
    if not matcher.consume(compiler.tokenize(text.encode())):
        return False
    words = np.zeros(-(-compiler.size // 32), np.int32)
    matcher.fill(words)
    return bool(words[0] & (1 << 2)), matcher.error  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("params", "good", "bad"),
    [
        (S(regex=r"\d{3}-[a-c]+"), ["123-abc"], ["12-a", "123-", "x123-a"]),
        (S(regex=r"^yes$|^no$"), ["yes", "no"], ["y", "yesno"]),
        (S(choice=["a", "ab", 'say "hi"\n\\ .*é😀']), ["a", "ab", 'say "hi"\n\\ .*é😀'], ["b", "say"]),
        (S(grammar='start: "a" b\nb: "b" | "c" b'), ["ab", "accb"], ["a", "ac"]),
        (S(grammar='root ::= "a" b\nb ::= "b" | "c" b'), ["ab", "accb"], ["a", "ac"]),
        (S(json_object=True), ["{}", '{"a": [1, null]}', '{\n  "a": 1\n}'], ["[]", "1", '{"a"}']),
        (S(json={"type": "integer", "minimum": 3, "maximum": 12}), ["3", "12"], ["2", "13", "3.0"]),
        (S(json='{"enum": ["x", 1]}'), ['"x"', "1"], ["x", "2"]),
        (S(json=NULLS, disable_any_whitespace=True), ["[null,null]"], ["[null, null]"]),
        (S(json=NULLS, whitespace_pattern=r"\t"), ["[\tnull]"], ["[ null]"]),
        (S(json={}), ["{}", "[1, null]", '"x"', "3"], ["x", "[1"]),
        (S(json={"properties": {"a": {}}}, disable_additional_properties=True), ['{"a": 1}'], ['{"b": 1}']),
    ],
)  # fmt: skip
def test_kinds(compiler: Compiler, params: S, good: list[str], bad: list[str]) -> None:
    def whole(text: str) -> bool:
        result: Any = accepts(compiler, params, text)
        return result is not False and result[0]

    assert [text for text in good if not whole(text)] == []
    assert [text for text in bad if whole(text)] == []


def chain(n: int) -> dict[str, Any]:
    links = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}]} for i in range(n)}
    return {"$defs": {**links, f"d{n}": {"type": "string"}}, "$ref": "#/$defs/d0"}


def nested(n: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(n):
        schema = {"type": "array", "items": schema}
    return schema


HOSTILE: dict[str, S] = {
    "seconds of search": S(json={"type": "integer", "multipleOf": 9999991}),
    "overflows the stack": S(json=chain(3000)),
    "a chain of rules": S(grammar="start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(9000)) + '\nr9000: "a"'),
    "nested deeper than Python goes": S(json=nested(5000)),
    "nested deeper than JSON goes": S(json=nested(400)),
    "too long": S(regex="a" * 300_000),
    "a product of products": S(
        json={"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {}}} for j in range(4)]} for i in range(12)]}
    ),
    "doubles sixty times": S(
        grammar="start: R0\n" + "\n".join(f"R{i}: R{i + 1} R{i + 1}" for i in range(60)) + '\nR60: "a"'
    ),
    "long optional parts": S(regex="(ab|cd)?" * 30_000),
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_hostile_grammars_are_refused_in_time(compiler: Compiler, name: str) -> None:
    begin = time.process_time()
    with pytest.raises(ClientError, match=r"structured_outputs\.(json|regex|grammar) cannot be used") as e:
        compiler.compile(HOSTILE[name])
    assert time.process_time() - begin < LIMIT_S, "the cost is not this process's"
    assert len(str(e.value)) < 500
    begin = time.monotonic()
    with pytest.raises(ClientError):
        compiler.compile(HOSTILE[name])
    assert time.monotonic() - begin < 0.5, "the answer is remembered"
    compiler.compile(S(choice=["still", name]))


def test_others_do_not_wait_for_a_hostile_one(compiler: Compiler) -> None:
    slow = [compiler.submit(S(json={"type": "integer", "multipleOf": 9999973}))]
    begin = time.monotonic()
    compiler.compile(S(regex="quick[0-9]"))
    assert not slow[0].done(), "this test needs a grammar that takes long"
    assert time.monotonic() - begin < 30
    with pytest.raises(ClientError, match="takes more than 1 s"):
        slow[0].result()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (S(json={"type": "bogus"}), "bogus"),
        (S(json="{not json"), "Expecting"),
        (S(json=""), "structured_outputs.json cannot be used"),
        (S(json="3"), "a JSON schema is an object"),
        (S(json={"$ref": "http://example.com/schema"}), "does not fetch"),
        (S(regex="(ab"), "unclosed group"),
        (S(grammar="start: nowhere"), "unknown name"),
        (S(grammar="start ::= ("), "grammar cannot be used"),
    ],
)
def test_wrong_grammars(compiler: Compiler, params: S, message: str) -> None:
    with pytest.raises(ClientError, match=message) as e:
        compiler.compile(params)
    assert e.value.parameter == "structured_outputs" and "\n" not in str(e.value)


def test_too_many_new_ones_are_refused() -> None:
    compiler = Compiler(demo_model_path(), 3072, (2,), LIMIT_S)
    compiler.compile(S(regex="known"))
    slow = [compiler.submit(S(json={"type": "integer", "multipleOf": 9999973 + i}), 3) for i in range(3)]
    with pytest.raises(BusyError, match="3 grammars are waiting"):
        for i in range(3):
            slow.append(compiler.submit(S(regex=f"new{i}"), 3))
    assert compiler.submit(S(regex="known"), 3).done()
    assert not slow[0].cancel(), "who leaves takes it from nobody else"


def test_what_cannot_be_started_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Compiler(demo_model_path(), 3072, (2,), LIMIT_S)
    with monkeypatch.context() as patch:

        def refuse(work: Any) -> None:
            raise RuntimeError("can't start new thread")

        patch.setattr("quire.structured.compiler._start", refuse)
        with pytest.raises(RuntimeError, match="new thread"):
            compiler.compile(S(regex="late"))
    assert compiler.compile(S(regex="late"))
    with pytest.raises(EngineError, match="not compiled in time"):
        compiled(Future(), 0.01)


def test_grammars_are_kept() -> None:
    before = {c.pid for c in psutil.Process().children()}
    compiler = Compiler(demo_model_path(), 3072, (2,), LIMIT_S)
    first = compiler.compile(S(regex="kept"))
    assert compiler.compile(S(regex="kept")) is first
    assert compiler.trusted(compiler.source(S(regex="kept"))) is first
    threads = [threading.Thread(target=compiler.compile, args=(S(regex="kept[0-9]"),)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    children = {c.pid for c in psutil.Process().children()} - before
    assert 1 <= len(children) <= 2, "a process for each thread, and no more"


def test_long_grammars_are_not_all_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire.structured.compiler.KEPT_LENGTH", 1000)
    compiler = Compiler(demo_model_path(), 3072, (2,), LIMIT_S)

    def kept(*params: S) -> list[bool]:
        return [compiler.knows(compiler.source(one)) for one in params]

    small, middle, large = (S(choice=[c * n]) for c, n in (("a", 100), ("b", 500), ("c", 3000)))
    compiler.compile(small)
    compiler.compile(middle)
    assert kept(small, middle) == [True, True]
    compiler.compile(small)  # used again: the other one goes first
    compiler.compile(S(choice=["d" * 500]))
    assert kept(small, middle) == [True, False]
    compiler.compile(large)
    assert kept(small, middle, large) == [False, False, True], "the newest is kept, whatever its length"
    compiler.compile(middle)
    compiler.compile(small)
    assert kept(small, middle, large) == [True, True, False]


def test_special_tokens_by_their_text(compiler: Compiler) -> None:
    params = S(grammar='start: "x" "<|im_start|>" "y"')
    assert "<[1]>" in compiler.source(params)
    matcher = compiler.compile(params).matcher()
    assert matcher.consume([*compiler.tokenize(b"x"), 1, *compiler.tokenize(b"y")]), matcher.error
    assert name_special('t[lazy]: TEXT "<a>"', {"<a>": 7}) == "t: TEXT <[7]>"


def test_tokens_special_by_configuration(tmp_path: Path) -> None:
    source = demo_model_path() / "tokenizer.json"
    data = json.loads(source.read_text())
    for token in data["added_tokens"]:
        token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    extra = {"3072": {"content": "<tool>", "special": True}}
    settings = {"eos_token": "<|im_end|>", "extra_special_tokens": ["<|im_start|>"], "added_tokens_decoder": extra}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    found = special_tokens(read_tokenizer(tmp_path))
    assert found == {"<|im_start|>": 1, "<|im_end|>": 2, "<tool>": 3072}


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ClientError, match=r"need a tokenizer\.json"):
        Compiler(tmp_path, 10, (2,), 1.0)
    with pytest.raises(ClientError, match="need an end token"):
        Compiler(demo_model_path(), 3072, (), 1.0)
    made = Compiler(demo_model_path(), 3072, (2,), 1.0)
    with pytest.raises(ClientError, match="structural_tag is not supported"):
        made.compile(S(structural_tag="{}"))
