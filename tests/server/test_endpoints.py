"""The endpoints beside OpenAI's, what is answered to bad requests, and the document that describes it all."""

from __future__ import annotations

import json
import socket
import time
from itertools import pairwise
from typing import Any

from servers import Server, until

from quire import __version__

MESSAGES = [{"role": "user", "content": "Hello"}]
JSON = {"content-type": "application/json"}
BROKEN = (b"{", b"\xff\xfe", b"", b'"x"', b'{"prompt": "\\ud800"}', b"[" * 50_000, b'{"prompt": "x", "n": NaN}')
HOSTILE = {  # each once ended the engine for everyone, held it up, or was answered with 500
    "half a surrogate pair": b'{"prompt": "x", "vllm_xargs": {"a": "\\ud800"}}',
    "an integer that no wire can carry": {"prompt": "x", "vllm_xargs": {"a": 1 << 70}},
    "a header in an id": {"prompt": "x", "request_id": "a\r\nx-injected: yes"},
    "an id that no header can carry": {"prompt": "x", "request_id": "\u6f22", "stream": True},
    "too many prompts": {"prompt": ["x"] * 20_000},
    "too many samples": {"prompt": "x", "n": 1 << 30},
    "too many of both": {"prompt": ["x"] * 100, "n": 1000},
    "a text that cannot fit": {"prompt": "x " * 49_000 * 2, "truncate_prompt_tokens": 5},
    "too many stop strings": {"prompt": "x", "stop": [f"{i}" for i in range(5000)]},
}


def test_tokens_and_back(server: Server) -> None:
    text = "Ein schöner Tag, 3 x 4 = 12 🙂"
    found = server.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"]) and found["max_model_len"] == 512
    assert server.post("/detokenize", {"tokens": found["tokens"]}).json() == {"prompt": text}
    chat = server.post("/tokenize", {"messages": MESSAGES}).json()
    assert "Hello" in server.post("/detokenize", {"tokens": chat["tokens"]}).json()["prompt"]
    for path, body in (
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "x", "messages": MESSAGES}),
        ("/tokenize", {"prompt": "x", "model": "nope"}),
        ("/detokenize", {"tokens": [1 << 30]}),
        ("/detokenize", {"tokens": [-1]}),
    ):
        assert server.post(path, body).status_code in (400, 404), body


def test_generate(server: Server) -> None:
    body = {"prompt": "The capital of France is", "temperature": 0, "max_tokens": 4}
    whole = server.post("/generate", body).json()
    assert whole["text"][0].startswith("The capital of France is Paris")
    lines = server.post("/generate", {**body, "stream": True}).text.strip().splitlines()
    texts = [json.loads(line)["text"][0] for line in lines]
    assert 1 <= len(lines) <= 4, "a slow reader gets several tokens at once"
    assert all(later.startswith(text) for text, later in pairwise(texts))
    assert json.loads(lines[-1]) == whole


def test_operation(server: Server) -> None:
    assert server.get("/version").json() == {"version": __version__}
    for path in ("/health", "/ready", "/ping"):
        assert (server.get(path).status_code, server.get(path).json()) == (200, {"status": "ok"})
    assert server.post("/ping").status_code == 200
    assert server.get("/load").json() == {"server_load": 0}
    assert server.post("/start_profile").json()["error"]["code"] == "profiler_disabled"


def test_every_error_has_openai_s_shape(server: Server) -> None:
    cases: list[tuple[int, Any]] = [
        (404, server.get("/nothing")),
        (405, server.get("/v1/completions")),
        *((400, server.post("/v1/completions", content=data, headers=JSON)) for data in BROKEN),
        (400, server.post("/v1/completions", {"prompt": {"a": 1}})),
        (413, server.post("/v1/completions", {"prompt": "x" * 200_000})),
        (413, server.post("/v1/completions", content=iter([b"x" * 60_000] * 3))),
    ]  # fmt: skip
    for status, answer in cases:
        assert answer.status_code == status, answer.text
        error = answer.json()["error"]
        assert (
            set(error) == {"message", "type", "param", "code"} and error["message"] and answer.headers["x-request-id"]
        )


def test_a_body_harms_nobody_else(server: Server) -> None:
    for name, body in HOSTILE.items():
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        for path in ("/v1/completions", "/generate") if b"vllm_xargs" in data else ("/v1/completions",):
            begin = time.monotonic()
            answer = server.post(path, content=data, headers=JSON)
            assert answer.status_code in (400, 413), (name, answer.text)
            assert "x-injected" not in answer.headers and time.monotonic() - begin < 2, name
            assert server.get("/health").status_code == 200 and server.get("/load").json() == {"server_load": 0}, name
    parts: dict[str, Any] = {"messages": [{"role": "user", "content": [{"type": ["text"], "text": "x"}]}]}
    assert server.post("/v1/chat/completions", parts).status_code == 400
    answer = server.post("/v1/completions", content=b'{"prompt": "x"}')
    assert answer.json()["error"]["code"] == "invalid_content_type"


def test_logprobs_of_named_tokens(server: Server) -> None:
    body = {"messages": MESSAGES, "max_tokens": 1, "logprobs": True, "logprob_token_ids": [5, 6, 7]}
    (line,) = server.post("/v1/chat/completions", body).json()["choices"][0]["logprobs"]["content"]
    assert len(line["top_logprobs"]) == 3


def test_request_ids(server: Server) -> None:
    body = {"prompt": "x", "max_tokens": 1}
    answer = server.post("/v1/completions", body, headers={"x-request-id": "mine"})
    assert answer.headers["x-request-id"] == "cmpl-mine" == answer.json()["id"]
    assert server.get("/version", headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"
    assert any("request mine" in line for line in server.log)


def test_a_client_that_leaves_frees_its_blocks(server: Server) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    before = server.metric("vllm:request_success_total", finished_reason="abort")
    host, port = server.url.removeprefix("http://").split(":")
    for stream in (True, False):
        with socket.create_connection((host, int(port))) as connection:
            data = body if stream else body.replace(b'"stream": true', b'"stream": null')
            connection.sendall(head % len(data) + data)
            if stream:
                assert connection.recv(1000)
            else:
                until(lambda: server.metric("vllm:num_requests_running") == 1, 10)
    server.idle()
    assert server.metric("vllm:request_success_total", finished_reason="abort") == before + 2


def test_a_half_sent_body_holds_up_nobody(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 1}).status_code == 200


def test_a_head_has_an_end(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nx: " + b"a" * 70_000)
        assert connection.recv(100).startswith(b"HTTP/1.1 431")


def test_metrics(server: Server) -> None:
    made = server.metric("vllm:generation_tokens_total")
    body = {"prompt": "The capital of France is", "max_tokens": 7, "ignore_eos": True, "stream": True}
    server.post("/v1/completions", body)
    server.post("/v1/completions", {**body, "stream": False})
    assert server.metric("vllm:generation_tokens_total") == made + 14
    text = server.get("/metrics").text
    for name in METRICS:
        assert f"\n{name}" in text, name
    assert 'vllm:num_requests_running{engine="0",model_name="demo"} 0.0' in text
    count = server.metric("vllm:time_to_first_token_seconds_count")
    assert 2 <= count <= server.metric("vllm:e2e_request_latency_seconds_count")
    whole = server.metric("vllm:e2e_request_latency_seconds_sum")
    parts = sum(server.metric(f"vllm:request_{x}_time_seconds_sum") for x in ("queue", "prefill", "decode"))
    assert 0 < parts <= whole + 1e-6
    assert server.metric("quire:startup_seconds", phase="model") > 0


METRICS = """vllm:num_requests_running vllm:num_requests_waiting vllm:num_requests_waiting_by_reason
vllm:kv_cache_usage_perc vllm:gpu_cache_usage_perc vllm:gpu_prefix_cache_hit_rate vllm:gpu_prefix_cache_hits_total
vllm:gpu_prefix_cache_queries_total vllm:prefix_cache_hits_total vllm:prefix_cache_queries_total
vllm:prompt_tokens_total vllm:generation_tokens_total vllm:num_preemptions_total vllm:request_success_total
vllm:prompt_tokens_by_source_total vllm:prompt_tokens_cached_total vllm:cache_config_info
vllm:time_to_first_token_seconds_bucket vllm:inter_token_latency_seconds_bucket vllm:e2e_request_latency_seconds_bucket
vllm:request_time_per_output_token_seconds_bucket vllm:request_queue_time_seconds_bucket
vllm:request_inference_time_seconds_bucket vllm:request_prefill_time_seconds_bucket
vllm:request_decode_time_seconds_bucket vllm:request_prompt_tokens_bucket vllm:request_generation_tokens_bucket
vllm:request_max_num_generation_tokens_bucket vllm:request_params_n_bucket vllm:request_params_max_tokens_bucket
vllm:request_prefill_kv_computed_tokens_bucket vllm:request_num_preemptions_bucket
vllm:iteration_tokens_total_bucket http_requests_total""".split()


def test_the_document_is_true(server: Server) -> None:
    document = server.get("/openapi.json").json()
    paths = document["paths"]
    assert set(paths) >= {
        "/v1/completions", "/v1/chat/completions", "/v1/models", "/tokenize", "/detokenize", "/health", "/ready",
        "/ping", "/version", "/load", "/metrics", "/start_profile", "/stop_profile", "/generate",
    }  # fmt: skip
    for path, methods in paths.items():
        for method, operation in methods.items():
            answers = operation["responses"]
            assert "422" not in answers and ("4XX" in answers), (path, method)
            assert answers["200"]["content"], (path, method)
    lines, events = "application/x-ndjson", "text/event-stream"
    for path, stream in (("/v1/completions", events), ("/v1/chat/completions", events), ("/generate", lines)):
        content = paths[path]["post"]["responses"]["200"]["content"]
        assert set(content) == {"application/json", stream}
