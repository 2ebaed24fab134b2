"""A server whose model runs from its Transformers code, asked by the openai client as the articles ask it."""

from __future__ import annotations

from servers import Server


def ask(server: Server) -> str:
    client = server.client()
    completion = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": "What is 17 + 25?"}],
        temperature=0.0,
        max_tokens=24,
    )
    return completion.choices[0].message.content or ""


def test_a_served_model_from_transformers_code_answers_as_the_native_one(server: Server) -> None:
    wanted = ask(server)
    other = Server("--model_impl", "transformers")
    try:
        assert ask(other) == wanted
        assert any("Transformers' code" in line for line in other.log)
    finally:
        assert other.stop() == 0, "".join(other.log)
    assert wanted
