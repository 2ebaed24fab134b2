"""The endpoints that pool, on servers of an embedder and of a classifier of pairs, both made of the demo model's body;
what they must answer is computed by Transformers from the same weights."""

from __future__ import annotations

import base64
import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import openai
import pytest
import schemathesis
import torch
import transformers
from schemathesis import GenerationMode
from servers import Server, until
from test_schema import EXAMPLES, answer, known

from quire.config.hub import demo_model_path

TEXTS = ["The capital of France is Paris.", "Paris", "What is 17 + 25?"]
NEAR = {"rel": 1e-3, "abs": 1e-4}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(demo_model_path())


@pytest.fixture(scope="module")
def body() -> Any:
    return transformers.AutoModel.from_pretrained(demo_model_path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def embedder() -> Iterator[Server]:
    server = Server("--runner=pooling", "--max-request-bytes=200000", '--hf-overrides={"is_matryoshka": true}')
    yield server
    assert server.stop() == 0, "".join(server.log)


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Any]]:
    """And the model of Transformers with its weights."""
    folder: Path = tmp_path_factory.mktemp("scorer")
    torch.manual_seed(2)
    model = transformers.LlamaForSequenceClassification.from_pretrained(
        demo_model_path(), num_labels=1, dtype=torch.float32
    )
    with torch.no_grad():
        model.score.weight.normal_(0, 0.3)
    model.save_pretrained(folder)
    for file in demo_model_path().glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    server = Server(f"--model={folder}", "--served-model-name=scorer")
    yield server, model.eval()
    assert server.stop() == 0, "".join(server.log)


@pytest.fixture
def embed(embedder: Server) -> Iterator[Server]:
    yield embedder
    embedder.idle()


@torch.no_grad()
def hidden(body: Any, ids: list[int]) -> torch.Tensor:
    return body(torch.tensor([ids])).last_hidden_state[0]


def vectors(body: Any, tokenizer: Any, texts: list[str]) -> list[np.ndarray]:
    return [torch.nn.functional.normalize(hidden(body, tokenizer(t).input_ids)[-1], dim=-1).numpy() for t in texts]


def test_openai_client(embed: Server, body: Any, tokenizer: Any) -> None:
    expected = vectors(body, tokenizer, TEXTS)
    ids = [tokenizer(text).input_ids for text in TEXTS]
    strict, lax = embed.client(), embed.client(strict=False)  # by default the client asks for base64
    for given in (TEXTS, ids):
        for client, how in ((lax, {}), (strict, {"encoding_format": "float"})):
            done = client.embeddings.create(model="demo", input=given, **how)  # type: ignore[arg-type]
            assert [item.index for item in done.data] == [0, 1, 2]
            assert np.abs(np.array([item.embedding for item in done.data]) - expected).max() < 1e-4
            assert done.usage.prompt_tokens == done.usage.total_tokens == sum(map(len, ids))
    for one in (TEXTS[0], ids[0]):
        (found,) = strict.embeddings.create(model="demo", input=one, encoding_format="float").data
        assert np.abs(np.array(found.embedding) - expected[0]).max() < 1e-4
    (small,) = strict.embeddings.create(model="demo", input=TEXTS[0], dimensions=10, encoding_format="float").data
    cut = hidden(body, ids[0])[-1][:10]
    assert small.embedding == pytest.approx((cut / cut.norm()).tolist(), **NEAR)


def test_encodings(embed: Server) -> None:
    def data(**fields: Any) -> Any:
        answer = embed.post("/v1/embeddings", {"input": TEXTS[0], **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()["data"][0]["embedding"]

    plain = np.array(data())
    for endianness, sign in (("little", "<"), ("big", ">"), ("native", "=")):
        raw = base64.b64decode(data(encoding_format="base64", endianness=endianness))
        assert np.frombuffer(raw, f"{sign}f4") == pytest.approx(plain)
        half = base64.b64decode(data(encoding_format="base64", endianness=endianness, embed_dtype="float16"))
        assert np.frombuffer(half, f"{sign}f2").astype(np.float64) == pytest.approx(plain, rel=1e-3, abs=1e-6)
        brain = base64.b64decode(data(encoding_format="base64", endianness=endianness, embed_dtype="bfloat16"))
        words = np.frombuffer(brain, f"{sign}u2").astype("=u2")
        expected = torch.tensor(plain, dtype=torch.float32).bfloat16().view(torch.int16).numpy().view(np.uint16)
        assert (words == expected).all()
    assert np.linalg.norm(np.array(data(use_activation=False))) > 2


def test_truncation(embed: Server, tokenizer: Any) -> None:
    text = " ".join(TEXTS)
    ids = tokenizer(text).input_ids

    def vector(given: Any, **fields: Any) -> np.ndarray:
        found = embed.post("/v1/embeddings", {"input": given, **fields}).json()
        assert found["usage"]["prompt_tokens"] == len(given if isinstance(given, list) else ids[:5])
        return np.array(found["data"][0]["embedding"])

    for side, kept in ((None, ids[:5]), ("right", ids[:5]), ("left", ids[-5:])):
        fields = {"truncate_prompt_tokens": 5, "truncation_side": side}
        assert vector(text, **fields) == pytest.approx(vector(kept), **NEAR)
    whole = embed.post("/v1/embeddings", {"input": [ids * 40], "truncate_prompt_tokens": -1}).json()
    assert whole["usage"]["prompt_tokens"] == 512
    late = embed.post("/v1/embeddings", {"input": [ids * 40]})
    assert late.status_code == 400 and late.json()["error"]["code"] == "context_length_exceeded"


def test_conversations(embed: Server, tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=False)["input_ids"]
    said, plain = (embed.post("/v1/embeddings", b).json() for b in ({"messages": messages}, {"input": ids}))
    assert said["usage"]["prompt_tokens"] == len(ids)
    assert said["data"][0]["embedding"] == pytest.approx(plain["data"][0]["embedding"], **NEAR)


def test_tokens(embed: Server, body: Any, tokenizer: Any) -> None:
    done = embed.post("/pooling", {"input": TEXTS, "use_activation": False}).json()
    for item, text in zip(done["data"], TEXTS, strict=True):
        expected = hidden(body, tokenizer(text).input_ids).numpy()
        assert np.abs(np.array(item["data"]) - expected).max() < 1e-3
    one = embed.post("/pooling", {"input": TEXTS, "task": "embed"}).json()
    assert np.abs(np.array([d["data"] for d in one["data"]]) - vectors(body, tokenizer, TEXTS)).max() < 1e-4


def test_cosines(embed: Server, body: Any, tokenizer: Any) -> None:
    a, b, c = vectors(body, tokenizer, TEXTS)
    for path in ("/score", "/v1/score"):
        done = embed.post(path, {"text_1": TEXTS[0], "text_2": TEXTS[1:]}).json()
        assert [d["score"] for d in done["data"]] == pytest.approx([float(a @ b), float(a @ c)], **NEAR)
    each = embed.post("/score", {"queries": TEXTS[:2], "documents": [TEXTS[2]] * 2}).json()
    assert [d["score"] for d in each["data"]] == pytest.approx([float(a @ c), float(b @ c)], **NEAR)
    assert each["usage"]["prompt_tokens"] == sum(len(tokenizer(t).input_ids) for t in [*TEXTS[:2], *[TEXTS[2]] * 2])


def pair_score(model: Any, tokenizer: Any, first: str, second: str, cut: int | None = None) -> float:
    ids = tokenizer(first, second).input_ids
    if cut:
        ids = tokenizer(first, second, truncation="longest_first", max_length=cut).input_ids
    with torch.no_grad():
        return float(model(torch.tensor([ids])).logits[0].sigmoid())


def test_pairs(scorer: tuple[Server, Any], tokenizer: Any) -> None:
    server, model = scorer
    expected = [pair_score(model, tokenizer, TEXTS[0], text) for text in TEXTS[1:]]
    assert abs(expected[0] - expected[1]) > 0.01
    done = server.post("/v1/score", {"model": "scorer", "data_1": TEXTS[0], "data_2": TEXTS[1:]}).json()
    assert [d["score"] for d in done["data"]] == pytest.approx(expected, **NEAR)
    cut = server.post("/score", {"text_1": " ".join(TEXTS), "text_2": TEXTS[0], "truncate_prompt_tokens": 9}).json()
    assert cut["usage"]["prompt_tokens"] == 9
    assert cut["data"][0]["score"] == pytest.approx(pair_score(model, tokenizer, " ".join(TEXTS), TEXTS[0], 9), **NEAR)
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        documents: list[Any] = [TEXTS[1], {"text": TEXTS[2]}]
        done = server.post(path, {"query": TEXTS[0], "documents": documents, "top_n": 5}).json()
        best = max(range(2), key=lambda i: expected[i])
        assert [r["index"] for r in done["results"]] == [best, 1 - best]
        assert done["results"][0]["relevance_score"] == pytest.approx(expected[best], **NEAR)
        assert done["results"][0]["document"] == {"text": TEXTS[1:][best]}
        assert done["usage"]["total_tokens"] > 0
    bare = {"query": TEXTS[0], "documents": documents, "top_n": 1, "return_documents": False}
    (only,) = server.post("/rerank", bare).json()["results"]
    assert only["index"] == best and "document" not in only


def test_classes(scorer: tuple[Server, Any], tokenizer: Any) -> None:
    server, model = scorer
    done = server.post("/classify", {"input": TEXTS}).json()
    for item, text in zip(done["data"], TEXTS, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([tokenizer(text).input_ids])).logits[0].sigmoid().tolist()
        assert item["probs"] == pytest.approx(expected, **NEAR)
        assert item["label"] == "LABEL_0" and item["num_classes"] == 1


def test_an_encoder_that_classifies_is_asked_without_a_task(tmp_path: Path) -> None:
    sizes = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=199, max_position_embeddings=64, num_labels=3, **sizes)
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    server = Server(f"--model={tmp_path}", "--max-model-len=64", "--max-num-batched-tokens=64")
    try:
        done = server.post("/pooling", {"input": [5, 6, 7]})
        assert done.status_code == 200, done.text
        with torch.no_grad():
            expected = model(torch.tensor([[5, 6, 7]])).logits[0].softmax(-1).tolist()
        assert done.json()["data"][0]["data"] == pytest.approx(expected, **NEAR)
    finally:
        assert server.stop() == 0, "".join(server.log)


def test_a_small_body_is_no_long_work(scorer: tuple[Server, Any]) -> None:
    """Its first text stands in every pair."""
    server, _ = scorer
    body = {"text_1": "word " * 4000, "text_2": ["x"] * 1000}
    assert len(json.dumps(body)) < 100_000
    answer = server.post("/score", body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == "data_2" and "20001000 characters" in error["message"]
    few = server.post("/score", {**body, "text_2": ["x"] * 3, "truncate_prompt_tokens": -1})
    assert few.status_code == 200 and few.json()["usage"]["prompt_tokens"] == 3 * 512, few.text


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/embeddings", {"input": []}, "input"),
        ("/v1/embeddings", {"input": ""}, "prompt"),
        ("/v1/embeddings", {"input": [[]]}, "prompt"),
        ("/v1/embeddings", {"input": [99999]}, "prompt_token_ids"),
        ("/v1/embeddings", {}, "input"),
        ("/v1/embeddings", {"input": "x", "messages": [{"role": "user", "content": "x"}]}, "input"),
        ("/v1/embeddings", {"input": "x", "dimensions": 10_000}, "dimensions"),
        ("/v1/embeddings", {"input": "x", "encoding_format": "bytes"}, "encoding_format"),
        ("/v1/embeddings", {"input": "x", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ("/v1/embeddings", {"input": "x", "truncate_prompt_tokens": 10_000}, "truncate_prompt_tokens"),
        ("/v1/embeddings", {"input": "x", "padding": "max_length"}, "padding"),
        ("/pooling", {"input": "x", "task": "token_classify"}, "task"),
        ("/pooling", {"input": "x", "task": "write"}, "task"),
        ("/score", {"text_1": "x"}, "text_1"),
        ("/score", {"text_1": "x", "text_2": "y", "data_1": "x", "data_2": "y"}, "data_2"),
        ("/score", {"text_1": ["x", "y"], "text_2": ["x", "y", "z"]}, "data_2"),
        ("/score", {"text_1": {"content": [{"type": "image_url"}]}, "text_2": "x"}, "text_1"),
        ("/rerank", {"query": "x", "documents": []}, "documents"),
        ("/rerank", {"query": {"title": "x"}, "documents": ["y"]}, "query"),
        ("/rerank", {"query": "x", "documents": [{"title": "y"}]}, "documents"),
        ("/classify", {"input": "x"}, "model"),
        ("/v1/completions", {"prompt": "x"}, "model"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}, "model"),
        ("/generate", {"prompt": "x"}, "model"),
    ],
)
def test_refusals(embed: Server, path: str, fields: dict[str, Any], param: str) -> None:
    answer = embed.post(path, fields)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param and error["type"] == "invalid_request_error", error
    assert "\n" not in error["message"]


def test_a_limit_is_named_where_several_types_are_allowed(embed: Server) -> None:
    many, negative = "input: List should have at most 2048 items", "input.0: Input should be"
    for given, told in ((["x"] * 2049, many), ([-1], negative)):
        error = embed.post("/v1/embeddings", {"input": given}).json()["error"]
        assert error["message"].startswith(told) and error["param"] == "input", error


def test_a_model_that_generates_embeds_nothing(server: Server) -> None:
    for path, fields in (
        ("/v1/embeddings", {"input": "x"}),
        ("/pooling", {"input": "x"}),
        ("/classify", {"input": "x"}),
        ("/score", {"text_1": "x", "text_2": "y"}),
        ("/rerank", {"query": "x", "documents": ["y"]}),
    ):
        answer = server.post(path, fields)
        assert answer.status_code == 400 and "--runner pooling" in answer.json()["error"]["message"]
    with pytest.raises(openai.BadRequestError, match="generates text"):
        server.client().embeddings.create(model="demo", input="x")


def test_limits_and_metrics(embed: Server) -> None:
    before = embed.metric("vllm:request_success_total", finished_reason="stop")
    prompts = embed.metric("vllm:prompt_tokens_total")
    done = embed.post("/v1/embeddings", {"input": TEXTS}).json()
    until(lambda: embed.metric("vllm:request_success_total", finished_reason="stop") == before + 3, 5)
    assert embed.metric("vllm:prompt_tokens_total") == prompts + done["usage"]["prompt_tokens"]
    assert embed.metric("vllm:generation_tokens_total") == 0
    late = embed.post("/v1/embeddings", {"input": ["x" * 100] * 2049})
    assert late.status_code in (400, 413)


def test_keys_limits_and_a_drain() -> None:
    limits = ("--max-prompt-tokens=300", "--max-num-queued-tokens=2000", "--max-num-seqs=2")
    server = Server("--runner=pooling", "--api-key=secret", *limits)
    head = {"authorization": "Bearer secret"}
    assert server.post("/v1/embeddings", {"input": "x"}).status_code == 401
    assert server.post("/v1/embeddings", {"input": [5] * 301}, headers=head).status_code == 400
    full = server.post("/v1/embeddings", {"input": [[5 + i % 90] * 300 for i in range(40)]}, headers=head)
    assert full.status_code in (200, 429)
    statuses: list[int] = []

    def work() -> None:
        for i in range(200):
            try:
                body = {"input": [[7 + i % 90] * 200] * 4}
                statuses.append(server.post("/v1/embeddings", body, headers=head).status_code)
            except Exception:
                return

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: len(statuses) > 8, 30)
    assert server.stop(signal.SIGTERM) == 0, "".join(server.log)
    for thread in threads:
        thread.join()
    assert set(statuses) <= {200, 429, 503} and 200 in statuses


def test_an_engine_that_is_lost_is_replaced_and_its_prompts_pooled(embed: Server) -> None:
    asked = {"input": [[5 + i] * 400 for i in range(60)]}
    expected = embed.post("/v1/embeddings", asked).json()["data"]
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(embed.post("/v1/embeddings", asked)))
    restarts = embed.metric("quire:engine_restarts")
    thread.start()
    until(lambda: embed.metric("vllm:num_requests_running") > 0 or not thread.is_alive(), 10)
    embed.engine().kill()
    thread.join()
    assert found[0].status_code == 200
    for one, other in zip(found[0].json()["data"], expected, strict=True):
        assert one["embedding"] == pytest.approx(other["embedding"], **NEAR)
    assert embed.metric("quire:engine_restarts") == restarts + 1


def little_to_pool(body: dict[str, Any], lots: Random) -> None:
    """One way of asking, and few other fields."""
    needed = ("query", "documents", "prompt")
    if "query" not in body and "prompt" not in body:
        pairs = [("text_1", "text_2"), ("data_1", "data_2"), ("queries", "documents"), ("queries", "items")]
        needed = next((way for way in [("messages",), *pairs] if all(body.get(name) for name in way)), ())
        if not needed:  # the others ignore what is not theirs
            needed = ("input", "text_1", "text_2")
            body |= {"input": known(body.get("input") or "x"), "text_1": "x", "text_2": ["y", "z"]}
    for name in [name for name in body if name not in needed and (lots.random() < 0.9 or name in CLASHING)]:
        del body[name]
    for name in needed:
        if isinstance(body.get(name), list) and name != "messages":
            body[name] = body[name][:3] if lots.random() < 0.5 else body[name][:1]
    for message in body.get("messages") or ():
        message["content"] = "Hello"


CLASHING = "input messages text_1 text_2 data_1 data_2 queries items documents model".split()


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_the_document_is_true_of_what_pools(embed: Server, mode: GenerationMode) -> None:
    document = schemathesis.openapi.from_url(f"{embed.url}/openapi.json")
    seen: dict[str, int] = {}
    for found in document.get_all_operations():
        operation = found.ok()
        if operation.path in ("/v1/embeddings", "/pooling", "/classify", "/score", "/v2/rerank", "/v1/completions"):
            answer(operation, mode, seen, little_to_pool)
    if mode is GenerationMode.POSITIVE:
        for path in ("/v1/embeddings", "/pooling", "/score", "/v2/rerank"):
            assert seen.get(f"POST {path} 200", 0) >= EXAMPLES // 10, seen
    assert embed.get("/health").status_code == 200


def test_the_lists_are_bounded() -> None:
    from pydantic import ValidationError

    from quire.server.protocol_pooling import EmbeddingRequest, RerankRequest, ScoreRequest

    many = 20_000
    wrong: list[tuple[Any, dict[str, Any]]] = [
        (EmbeddingRequest, {"input": [[]] * many}),
        (EmbeddingRequest, {"input": [{}] * many}),
        (ScoreRequest, {"text_1": "x", "text_2": [[]] * many}),
        (RerankRequest, {"query": "x", "documents": [[]] * many}),
    ]
    for model, body in wrong:
        with pytest.raises(ValidationError) as caught:
            model.model_validate(json.loads(json.dumps(body)))
        assert 1 <= caught.value.error_count() <= 12
