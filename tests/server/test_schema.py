"""What the OpenAPI document says is true, for whatever it lets a client send: no endpoint fails, every answer is as the
document has it, and the server answers as before afterwards."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings, strategies
from pydantic import ValidationError
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from servers import Server

from quire.server.protocol import Body, ChatRequest, CompletionRequest, DetokenizeRequest

CHECKS: list[Any] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
# For each endpoint with a body, and each mode.
EXAMPLES = 600 if settings.get_current_profile_name() == "soak" else 40
NEEDED = ("prompt", "messages", "tokens", "stream")
ASKED = {"prompt": "The capital of France is", "temperature": 0, "max_tokens": 8}


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_the_document_is_true_of_every_answer(server: Server, mode: GenerationMode) -> None:
    before = server.post("/v1/completions", ASKED).json()["choices"]
    document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    seen: dict[str, int] = {}
    for found in document.get_all_operations():
        operation = found.ok()
        if mode is GenerationMode.POSITIVE or operation.body:
            answer(operation, mode, seen)
    if mode is GenerationMode.POSITIVE:  # refusing everything would pass as well
        for path in ("/v1/completions", "/v1/chat/completions", "/generate", "/tokenize", "/detokenize"):
            assert seen[f"POST {path} 200"] >= EXAMPLES // 10, seen
    assert server.post("/v1/completions", ASKED).json()["choices"] == before
    assert server.get("/health").status_code == 200 and server.metric("quire:engine_restarts") == 0


Modest = Callable[[dict[str, Any], Random], None]


def answer(operation: Any, mode: GenerationMode, seen: dict[str, int], modest: Modest | None = None) -> None:
    """`modest`: changes a body so that it asks for little."""
    asks_little = modest or little_text

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode), lots=strategies.randoms(use_true_random=False))
    def one(case: Any, lots: Random) -> None:
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
            asks_little(case.body, lots)
        response = case.call(timeout=60)
        key = f"{operation.label} {response.status_code}"
        seen[key] = seen.get(key, 0) + 1
        case.validate_response(response, checks=CHECKS)

    one()


def little_text(body: dict[str, Any], lots: Random) -> None:
    """Ask for little work, and not for everything at once: most wild combinations of fields are only refused."""
    for name in [name for name in body if name not in NEEDED and lots.random() < 0.8]:
        del body[name]
    if "model" in body:
        body["model"] = "demo"
    for name, most in (("n", 3), ("max_tokens", 12), ("max_completion_tokens", 12)):
        if isinstance(body.get(name), int):
            body[name] = body[name] % most + 1
    body.setdefault("max_tokens", 3)
    for name in ("prompt", "tokens"):
        body.update({name: known(body[name])} if name in body else {})
    for message in body.get("messages") or ():
        if lots.random() < 0.8:
            message["content"] = "Hello"
        message.pop("tool_calls", None)


def known(value: Any) -> Any:
    """Token ids of the model's vocabulary, and texts that are not empty."""
    if isinstance(value, list):
        return [known(item) for item in value] or [5]
    return value % 3000 if isinstance(value, int) else value or "x"


MANY = 20_000
SAID = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (CompletionRequest, {"prompt": [[]] * MANY}),
        (CompletionRequest, {"prompt": [[[]]] * MANY}),
        (CompletionRequest, {"prompt": "x", "allowed_token_ids": [[]] * MANY}),
        (CompletionRequest, {"prompt": "x", "stop": [[]] * MANY}),
        (CompletionRequest, {"prompt": "x", "logit_bias": {str(i): [] for i in range(MANY)}}),
        (CompletionRequest, {"prompt": "x", "structured_outputs": {"choice": [[]] * MANY}}),
        (ChatRequest, {"messages": [{}] * MANY}),
        (ChatRequest, {"messages": SAID, "tools": [{}] * MANY}),
        (ChatRequest, {"messages": SAID, "tools": [{"function": {"name": "f"}}] * MANY}),
        (ChatRequest, {"messages": [{"role": "user", "content": [[]] * MANY}]}),
        (ChatRequest, {"messages": [{"role": "user", "content": [{}] * MANY}]}),
        (ChatRequest, {"messages": [{"role": "user", "tool_calls": [[]] * MANY}]}),
        (DetokenizeRequest, {"tokens": [[]] * MANY}),
    ],
)
def test_much_that_is_wrong_is_not_said_item_by_item(model: type[Body], body: dict[str, Any]) -> None:
    """Others wait while the errors of a body are found."""
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    assert 1 <= caught.value.error_count() <= 10
