"""OpenAI's own client, believing only what fits its types, against each endpoint of a real server."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from servers import Server

from quire.server.protocol import CompletionResponse

PROMPT = "The capital of France is"
MESSAGES: Any = [{"role": "user", "content": "What is the opposite of hot?"}]
DRAWN: dict[str, Any] = {"seed": 11, "temperature": 0.9, "max_tokens": 24}
IDS = {"return_token_ids": True, "ignore_eos": True}


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return server.client()


@pytest.fixture
def lax(server: Server) -> openai.OpenAI:
    """For completions' streams and echoes: the client's types allow no null there, which the interface itself sends as
    the finish reason of a stream's pieces and for the first token of a prompt. They are held against our own types."""
    return server.client(strict=False)


def checked(answer: Any) -> Any:
    CompletionResponse.model_validate(answer.model_dump(exclude_unset=True), extra="forbid")
    return answer


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo", "other"]
    assert client.models.retrieve("other").owned_by == "quire"
    with pytest.raises(openai.NotFoundError, match="nope"):
        client.models.retrieve("nope")


def test_completion(client: openai.OpenAI) -> None:
    done = client.completions.create(model="demo", prompt=PROMPT, max_tokens=4, temperature=0)
    assert done.choices[0].text.startswith(" Paris") and done.choices[0].finish_reason == "length"
    assert done.usage is not None and done.usage.completion_tokens == 4 and done.model == "demo"
    assert done.usage.total_tokens == done.usage.prompt_tokens + 4
    again = client.completions.create(model="other", prompt=PROMPT, max_tokens=4, temperature=0)
    assert again.choices[0].text == done.choices[0].text and again.model == "other"


def test_completion_stream_is_the_whole_in_pieces(client: openai.OpenAI, lax: openai.OpenAI) -> None:
    asked: dict[str, Any] = dict(model="demo", prompt=[PROMPT, "Once"], n=2, logprobs=2, extra_body=IDS, **DRAWN)
    whole = client.completions.create(**asked)
    options = {"include_usage": True}
    chunks = [checked(c) for c in lax.completions.create(stream=True, stream_options=options, **asked)]  # type: ignore
    usage = [chunk.usage for chunk in chunks if chunk.usage]
    assert len(usage) == 1 and usage[0] == whole.usage and usage[0].completion_tokens == 96
    assert chunks[-1].usage and not chunks[-1].choices and len(chunks) > 60
    for choice in whole.choices:
        pieces = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(c.text for c in pieces) == choice.text
        assert [t for c in pieces for t in c.token_ids] == choice.token_ids  # type: ignore[attr-defined]
        assert pieces[-1].finish_reason == choice.finish_reason == "length"
        assert choice.logprobs is not None
        for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
            joined = [x for c in pieces for x in getattr(c.logprobs, name)]
            assert joined == pytest.approx(getattr(choice.logprobs, name)) if name == "token_logprobs" else True
            assert len(joined) == 24
        assert "".join(choice.logprobs.tokens or ()) == choice.text
    assert len({choice.text for choice in whole.choices}) >= 3


def test_echo(server: Server, lax: openai.OpenAI) -> None:
    ids = server.post("/tokenize", {"prompt": PROMPT}).json()["tokens"]
    for prompt in (PROMPT, ids):
        done = lax.completions.create(model="demo", prompt=prompt, max_tokens=0, echo=True, logprobs=1)
        (choice,) = done.choices
        assert choice.text == PROMPT and choice.logprobs is not None and choice.logprobs.token_logprobs is not None
        assert len(choice.logprobs.token_logprobs) == len(ids) and choice.logprobs.token_logprobs[0] is None
        assert done.usage is not None and done.usage.completion_tokens == 0
    asked: dict[str, Any] = dict(model="demo", prompt=PROMPT, echo=True, n=2, logprobs=0, **DRAWN)
    whole = checked(lax.completions.create(**asked))
    chunks = [checked(chunk) for chunk in lax.completions.create(stream=True, **asked)]
    for choice in whole.choices:
        assert choice.text.startswith(PROMPT) and choice.logprobs is not None
        pieces = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(c.text for c in pieces) == choice.text
        tokens = [t for c in pieces if c.logprobs for t in c.logprobs.tokens or ()]
        assert tokens == choice.logprobs.tokens and "".join(tokens) == choice.text


def test_chat(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(model="demo", messages=MESSAGES, temperature=0, max_completion_tokens=40)
    choice = done.choices[0]
    assert choice.message.role == "assistant" and "cold" in (choice.message.content or "").lower()
    assert choice.finish_reason == "stop" and not choice.message.tool_calls


def test_chat_stream_is_the_whole_in_pieces(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = dict(
        model="demo", messages=MESSAGES, n=3, logprobs=True, top_logprobs=3, extra_body=IDS, **DRAWN
    )
    whole = client.chat.completions.create(**asked)
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(client.chat.completions.create(stream=True, stream_options=options, **asked))
    assert chunks[-1].usage == whole.usage and all(chunk.usage for chunk in chunks)
    for choice in whole.choices:
        pieces = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert pieces[0].delta.role == "assistant" and pieces[0].delta.content
        assert "".join(c.delta.content or "" for c in pieces) == choice.message.content
        assert [t for c in pieces for t in c.token_ids] == choice.token_ids  # type: ignore[attr-defined]
        assert choice.logprobs is not None and choice.logprobs.content is not None
        lines = [line for c in pieces if c.logprobs for line in c.logprobs.content or ()]
        assert len(lines) == 24
        for a, b in zip(lines, choice.logprobs.content, strict=True):
            assert a.token == b.token and a.logprob == pytest.approx(b.logprob) and len(b.top_logprobs) == 3
            assert bytes(b.bytes or ()).decode() == b.token
            values = [t.logprob for t in b.top_logprobs]
            assert values == sorted(values, reverse=True) and values[0] >= b.logprob


def test_stops(client: openai.OpenAI, lax: openai.OpenAI) -> None:
    asked: dict[str, Any] = dict(model="demo", prompt=PROMPT, temperature=0, max_tokens=30, stop=["Germany", "zzz"])
    whole = client.completions.create(**asked).choices[0]
    assert whole.text == " Paris. The capital of " and whole.finish_reason == "stop"
    assert whole.stop_reason == "Germany"  # type: ignore[attr-defined]
    chunks = list(lax.completions.create(stream=True, **asked))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text


def test_vllm_fields(client: openai.OpenAI) -> None:
    def text(**extra: Any) -> str:
        done = client.completions.create(model="demo", prompt=PROMPT, max_tokens=4, temperature=0, extra_body=extra)
        return done.choices[0].text

    plain = text()
    assert text(min_p=0.5, top_k=3, repetition_penalty=1.0, priority=3, cache_salt="x") == plain
    assert "Paris" not in text(bad_words=["Paris"])
    assert text(include_stop_str_in_output=True, stop="Paris") == " Paris"
    assert text(a_field_that_nobody_knows=1) == plain
    lines = client.completions.create(model="demo", prompt=PROMPT, max_tokens=1, extra_body={"prompt_logprobs": 1})
    found = lines.choices[0].prompt_logprobs  # type: ignore[attr-defined]
    assert found[0] is None and all(len(line) in (1, 2) for line in found[1:])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 3.0}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 2, "temperature": 0}, "n"),
        ({"top_p": 0}, "top_p"),
        ({"logprobs": 100}, "logprobs"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [99999]}, "prompt_token_ids"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"extra_body": {"use_beam_search": True}}, "use_beam_search"),
        ({"extra_body": {"length_penalty": 0}}, "length_penalty"),
        ({"extra_body": {"repetition_detection": {"max_pattern_size": 4}}}, "repetition_detection"),
        ({"extra_body": {"kv_transfer_params": {"do_remote_decode": True}}}, "kv_transfer_params"),
        ({"extra_body": {"watermarking": True}}, "watermarking"),
        ({"extra_body": {"truncation_side": "right"}}, "truncation_side"),
        ({"extra_body": {"top_k": 1 << 40}}, "top_k"),
        ({"seed": 1 << 70}, "seed"),
        ({"stop": [""]}, "stop"),
    ],
)
def test_bad_fields(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    asked: dict[str, Any] = {"model": "demo", "prompt": PROMPT, **fields}
    for stream in (False, True):
        if "stream_options" in fields and stream:
            continue
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(stream=stream, **asked)
        error: Any = caught.value
        assert error.param == param and error.type == "invalid_request_error" and error.code == "invalid_value"


def test_too_long_a_prompt(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="demo", prompt="word " * 2000)
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "prompt"


def test_what_a_chat_refuses(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="nope", messages=MESSAGES)
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="messages"):
        client.chat.completions.create(model="demo", messages=[])
    with pytest.raises(openai.BadRequestError, match="image_url"):
        parts: Any = [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]
        client.chat.completions.create(model="demo", messages=[{"role": "user", "content": parts}])
    with pytest.raises(openai.BadRequestError, match="trust-request-chat-template"):
        client.chat.completions.create(model="demo", messages=MESSAGES, extra_body={"chat_template": "{{ 1 }}"})
    with pytest.raises(openai.BadRequestError, match="top_logprobs"):
        client.chat.completions.create(model="demo", messages=MESSAGES, top_logprobs=3)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": "auto"}, "function_call"),
        ({"audio": {"voice": "alloy", "format": "wav"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"documents": [{"title": "x"}]}, "documents"),
    ],
)
def test_fields_that_nothing_here_implements(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError, match=f"{param} is not supported") as caught:
        client.chat.completions.create(model="demo", messages=MESSAGES, extra_body=fields)
    assert caught.value.param == param and caught.value.code == "invalid_value"


def test_fields_that_ask_for_nothing(client: openai.OpenAI) -> None:
    fields = {
        "length_penalty": 1, "watermarking": None, "functions": [], "function_call": "none", "audio": None,
        "modalities": ["text"], "documents": [], "kv_transfer_params": None, "x_of_another_server": True,
    }  # fmt: skip
    assert client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=1, extra_body=fields)
