"""`quire complete --url`: a server's continuation of a prompt, streaming.

Owns: the terminal; the request is `remote`'s.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Mapping
from typing import Any

import click

from quire.cli import flags
from quire.cli.remote import Remote

# Sampling flags that go into a request's body as they are.
BODY = tuple(name for name in flags.SAMPLING if name not in ("logprobs", "n"))


@click.command(cls=flags.Command, context_settings=flags.CONTEXT)
@click.argument("prompt", required=False)
@click.option("--url", default="http://localhost:8000", show_default=True, help="Address of the server.")
@click.option("--api-key", help="Key to present.")
@click.option("--model", help="Name of the model; by default the server's first.")
@flags.sampling_options
def command(prompt: str | None, url: str, api_key: str | None, model: str | None, **values: Any) -> None:
    """Have a server continue PROMPT (or standard input)."""
    with flags.user_errors():
        remote = Remote(url, api_key)
        text = sys.stdin.read() if prompt is None else prompt
        body = {"model": model or remote.model(), "prompt": text, "stream": True, "max_tokens": 128} | fields(values)
        for event in remote.events("/v1/completions", body):
            for choice in event["choices"]:
                click.echo(choice["text"], nl=False)
                sys.stdout.flush()
    click.echo()


def fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling flags that were given, as a request's body has them."""
    found = {name: values[name] for name in BODY if values.get(name) not in (None, ())}
    if values.get("sampling_seed") is not None:
        found["seed"] = values["sampling_seed"]
    if "stop" in found:
        found["stop"] = list(found["stop"])
    return found


class RemoteConversation:
    """A conversation with a server's model; see `quire.cli.chat.Conversation`."""

    def __init__(self, remote: Remote, model: str, body: Mapping[str, Any], system: str | None = None) -> None:
        self._remote, self._model, self._body, self._system = remote, model, body, system
        self.clear()

    def clear(self) -> None:
        """Forget everything but the system message."""
        self.messages: list[dict[str, str]] = [{"role": "system", "content": self._system}] if self._system else []

    def say(self, text: str) -> Generator[str]:
        """The answer, piece by piece. Closing the generator ends the request; what was said till then stays."""
        self.messages.append({"role": "user", "content": text})
        body = {"model": self._model, "messages": self.messages, "stream": True, **self._body}
        said = ""
        try:
            for event in self._remote.events("/v1/chat/completions", body):
                for choice in event["choices"]:
                    piece = choice["delta"].get("content") or ""
                    said += piece
                    if piece:
                        yield piece
        finally:
            if said:
                self.messages.append({"role": "assistant", "content": said})
            else:
                self.messages.pop()
