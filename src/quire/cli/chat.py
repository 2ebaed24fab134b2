"""`quire chat`: a conversation in the terminal, answers streaming, the engine in this process or (`--url`) a server.

Owns: the conversation and the terminal. The engine is driven a step at a time, so Ctrl-C ends an answer, not the
program.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from quire.cli import flags
from quire.cli.complete import RemoteConversation, fields
from quire.cli.remote import Remote
from quire.config.args import EngineArgs
from quire.types.errors import ClientError
from quire.types.outputs import RequestOutput
from quire.utils.logging import setup_logging

if TYPE_CHECKING:
    from quire.engine.llm_engine import LLMEngine
    from quire.types.params import SamplingParams

HELP = "/clear forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C ends an answer"


@click.command(cls=flags.Command, context_settings=flags.CONTEXT)
@click.option("--system", help="System message that opens the conversation.")
@click.option("--url", help="Talk with the model of a server at this address, instead of one in this process.")
@click.option("--api-key", help="Key to present to the server.")
@click.option("--message", "messages", multiple=True, help="Say this and leave after the answer; may be repeated.")
@flags.sampling_options
@flags.options_of(EngineArgs)
def command(system: str | None, url: str | None, api_key: str | None, messages: tuple[str, ...], **values: Any) -> None:
    """Talk with a model. Answers stream as they are made."""
    if url is not None:
        with flags.user_errors():
            remote = Remote(url, api_key)
            model = values.get("model") or remote.model()
            converse(RemoteConversation(remote, model, {"max_tokens": 512} | fields(values), system), model, messages)
        return
    kwargs = flags.engine_kwargs(values, **flags.quiet())
    setup_logging(kwargs.get("log_level"))
    with flags.user_errors():
        from quire.config.resolve import resolve
        from quire.engine.llm_engine import LLMEngine
        from quire.types.params import RequestOutputKind, SamplingParams

        config = resolve(EngineArgs(**kwargs))
        defaults = SamplingParams(**config.model.generation_config)
        params = flags.sampling_params(values, defaults, max_tokens=512)
        if params.n != 1:
            raise click.UsageError("a conversation has one answer at a time: leave --n at 1")
        params.output_kind = RequestOutputKind.DELTA
        engine = LLMEngine(config)
        if engine.tokenizer is None:
            raise click.UsageError("a conversation needs a tokenizer: give one, or leave out --skip-tokenizer-init")
        try:
            converse(Conversation(engine, params, system), config.model.model, messages)
        finally:
            engine.shutdown()


def converse(chat: Conversation | RemoteConversation, model: str, messages: Sequence[str]) -> None:
    """Say `messages`, or what a person types."""
    for text in messages:
        click.echo(f"> {text}")
        answer(chat, text)
    if not messages:
        loop(chat, model)


class Conversation:
    """The messages so far. `say` adds the user's and streams the model's."""

    def __init__(self, engine: LLMEngine, params: SamplingParams, system: str | None = None) -> None:
        self._engine, self._params, self._system = engine, params, system
        self._count = 0
        self.clear()

    def clear(self) -> None:
        """Forget everything but the system message."""
        self.messages: list[dict[str, str]] = [{"role": "system", "content": self._system}] if self._system else []

    def say(self, text: str) -> Generator[str]:
        """The answer, piece by piece. Closing the iterator, or an exception in its consumer, ends the request; what
        was said till then stays in the conversation. Errors: `ClientError` where the conversation cannot be asked
        (too long, say): it is then as it was before."""
        from quire.engine.chat import render_chat

        engine = self._engine
        assert engine.tokenizer is not None
        self.messages.append({"role": "user", "content": text})
        self._count += 1
        request, said, done = f"chat-{self._count}", "", False
        try:
            prompt = render_chat(engine.tokenizer, self.messages, chat_template=engine.config.model.chat_template)
            ids = engine.tokenizer.encode(prompt, add_special_tokens=False)
            engine.add_request(request, {"prompt_token_ids": ids}, self._params)
        except ClientError:
            self.messages.pop()
            raise
        try:
            while not done:
                for output in engine.step():
                    assert isinstance(output, RequestOutput)
                    piece, done = output.outputs[0].text, output.finished
                    said += piece
                    if piece:
                        yield piece
        finally:
            if not done:
                engine.abort_request(request)
                engine.drain()
            self.messages.append({"role": "assistant", "content": said})


def answer(chat: Conversation | RemoteConversation, text: str) -> None:
    """Print the answer as it comes; Ctrl-C ends it."""
    stream = chat.say(text)
    with interrupts() as ended:
        for piece in stream:
            click.echo(piece, nl=False)
            sys.stdout.flush()
            if ended:
                click.echo(" [ended]", nl=False)
                break
        stream.close()
    click.echo()


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """A list that Ctrl-C adds to, so that it takes effect between two steps and never within one; the second Ctrl-C
    is the usual exception."""
    ended: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if ended:
            raise KeyboardInterrupt
        ended.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield ended
    finally:
        signal.signal(signal.SIGINT, before)


def loop(chat: Conversation | RemoteConversation, model: str) -> None:
    """Read, answer, until the input ends."""
    terminal = sys.stdin.isatty()
    if terminal:
        _line_editing()
        click.echo(f"{model}: {HELP}", err=True)
    while True:
        try:
            text = input("> " if terminal else "").strip()
        except EOFError:
            if terminal:
                click.echo()
            return
        except KeyboardInterrupt:
            click.echo()
            continue
        match text:
            case "":
                continue
            case "/exit" | "/quit":
                return
            case "/clear":
                chat.clear()
            case "/help":
                click.echo(HELP)
            case _:
                try:
                    answer(chat, text)
                except ClientError as e:
                    click.echo(f"{e} (/clear forgets the conversation)", err=True)


def _line_editing() -> None:
    """Arrow keys and history in `input`, where the platform has readline."""
    try:
        import readline  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError:
        return
