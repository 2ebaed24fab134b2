"""Incremental decoding equals the tokenizer's own decoding of the whole, for every kind of decoder."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_zoo import KINDS, TEXT, trained

from quire.engine.detokenizer import BROKEN, Detokenizer

EXACT = ("byte_level", "llama", "metaspace")


def pushed(detokenizer: Detokenizer, prompt: list[int], ids: list[int], skip: bool, cut: int = 1) -> str:
    stream = detokenizer.stream(prompt, skip)
    parts = [stream.push(ids[i : i + cut]) for i in range(0, len(ids), cut)]
    return "".join(parts) + stream.finish()


@pytest.mark.parametrize("kind", EXACT)
@given(data=st.data(), skip=st.booleans(), cut=st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_any_ids_decode_as_the_whole(kind: str, data: st.DataObject, skip: bool, cut: int) -> None:
    """Random ids: broken characters, byte tokens that fit nothing, special tokens, ids beyond the vocabulary."""
    tokenizer = trained(kind)
    size = tokenizer.backend.get_vocab_size()
    ids = data.draw(st.lists(st.integers(0, size + 2), max_size=40))
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    detokenizer = Detokenizer(tokenizer)
    assert pushed(detokenizer, [], ids, skip, cut) == whole
    assert detokenizer.decode([], ids, skip, True) == whole


@pytest.mark.parametrize("kind", EXACT)
@given(text=st.text(max_size=30))
@settings(max_examples=100, deadline=None)
def test_any_text_comes_back(kind: str, text: str) -> None:
    tokenizer = trained(kind)
    ids = tokenizer.encode(text)
    assert pushed(Detokenizer(tokenizer), [], ids, True) == tokenizer.decode(ids)
    special = tokenizer.backend.get_added_tokens_decoder().keys() & set(ids)  # the text of one is left out
    if kind != "metaspace" and not special:  # whose vocabulary does not hold all characters
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), split=st.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_output_continues_the_prompt(kind: str, data: st.DataObject, split: int) -> None:
    """Prompt's text + output's text = the text of both, spaces between them included."""
    tokenizer = trained(kind)
    words = data.draw(st.lists(st.sampled_from(" ".join(t for t in TEXT if t.isascii()).split()), min_size=2))
    ids = tokenizer.encode(" ".join(words), add_special_tokens=True)
    split = min(1 + split, len(ids) - 1)
    prompt, rest = ids[:split], ids[split:]
    if not tokenizer.decode(prompt):
        return
    whole = tokenizer.decode(ids)
    detokenizer = Detokenizer(tokenizer)
    head = pushed(detokenizer, [], prompt, True)
    assert head + pushed(detokenizer, prompt, rest, True) == whole
    assert head + detokenizer.decode(prompt, rest, True, True) == whole


def test_nothing_is_taken_back() -> None:
    """A character over several tokens appears when it is complete, and not a broken one before."""
    tokenizer = trained("byte_level")
    ids = tokenizer.encode("x🙂y")
    stream = Detokenizer(tokenizer).stream([])
    parts = [stream.push([t]) for t in ids]
    assert "".join(parts) == "x🙂y" and BROKEN not in "".join(parts)
    half = tokenizer.encode("🙂")[:-1]
    stream = Detokenizer(tokenizer).stream([])
    assert stream.push(half) == "" and stream.finish() == BROKEN


def test_byte_run_is_read_as_a_whole() -> None:
    """Llama's decoder makes one broken character of each byte of a run that is not UTF-8, valid beginnings included."""
    tokenizer = trained("llama")
    a = [tokenizer.backend.token_to_id(f"<0x{b:02X}>") for b in "é".encode()]
    bad = tokenizer.backend.token_to_id("<0xFF>")
    stop = tokenizer.backend.token_to_id("a")
    assert pushed(Detokenizer(tokenizer), [], [*a, stop], True) == "éa"
    assert pushed(Detokenizer(tokenizer), [], [*a, bad, stop], True) == BROKEN * 3 + "a"


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_tokens(kind: str) -> None:
    """A token's name keeps the space before it, and special tokens have one."""
    tokenizer = trained(kind)
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.name(tokenizer.backend.token_to_id("</s>")) == "</s>"
    if kind in EXACT:
        ids = tokenizer.encode("The capital of", add_special_tokens=False)
        assert "".join(map(detokenizer.name, ids)).lstrip() == "The capital of"


@pytest.mark.parametrize("kind", KINDS)
def test_time_for_each_token_is_constant(kind: str) -> None:
    """Ten times the tokens take about ten times as long (a quadratic decoder would take a hundred times)."""
    tokenizer = trained(kind)
    ids = tokenizer.encode(TEXT[0], add_special_tokens=False)

    def seconds(n: int) -> float:
        best = 1e9
        for _ in range(3):
            stream = Detokenizer(tokenizer).stream([])
            many = (ids * (n // len(ids) + 1))[:n]
            begin = time.process_time()
            for token in many:
                stream.push([token])
            best = min(best, time.process_time() - begin)
        return best

    seconds(100)
    assert seconds(4000) < 30 * seconds(400) + 0.005


class Unknown:
    """A tokenizer whose decoder cannot be followed token by token."""

    def __init__(self, kind: str) -> None:
        self.__dict__.update(vars(trained(kind)))
        self.decode = trained(kind).decode
        self.decoder = None


@pytest.mark.parametrize("kind", EXACT)
@given(text=st.text(max_size=30), cut=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_windows(kind: str, text: str, cut: int) -> None:
    """Decoding in windows finds the same text, and waits for the rest of a character."""
    tokenizer = trained(kind)
    ids = tokenizer.encode(text)
    want = tokenizer.decode(ids)
    stream = Detokenizer(Unknown(kind)).stream([])  # type: ignore[arg-type]
    parts = [stream.push(ids[i : i + cut]) for i in range(0, len(ids), cut)]
    assert "".join(parts) + stream.finish() == want
    if BROKEN not in want:
        assert not any(BROKEN in part for part in parts)
