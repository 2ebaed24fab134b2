"""A batch in the caller's own thread: the progress bar that it shows, and what Ctrl-C means meanwhile.

Owns: those two. Knows no engine.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from quire.engine.outputs import Output
from quire.types.outputs import RequestOutput

UseTqdm = bool | Callable[..., Any]


class Progress:
    """A bar that counts finished requests, with the rates of tokens in and out. Made by `use_tqdm`, if that is true."""

    def __init__(self, use_tqdm: UseTqdm, total: int) -> None:
        self._bar: Any = None
        self._begin, self._tokens_in, self._tokens_out = time.perf_counter(), 0, 0
        if not use_tqdm or not total:
            return
        if use_tqdm is True:
            from tqdm.auto import tqdm as use_tqdm
        text = "input: 0.00 toks/s, output: 0.00 toks/s"
        self._bar = use_tqdm(total=total, desc="Processed prompts", dynamic_ncols=True, postfix=text)

    def update(self, output: Output) -> None:
        if self._bar is None:
            return
        self._tokens_in += len(output.prompt_token_ids)
        if isinstance(output, RequestOutput):
            self._tokens_out += sum(len(o.token_ids) for o in output.outputs)
        seconds = max(time.perf_counter() - self._begin, 1e-9)
        rates = f"input: {self._tokens_in / seconds:.2f} toks/s, output: {self._tokens_out / seconds:.2f} toks/s"
        self._bar.set_postfix_str(rates, refresh=False)
        self._bar.update(1)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Interrupts:
    """While it is entered, the first Ctrl-C is only noted, so that it cannot tear a step apart; `check` raises it
    between steps. A second one interrupts at once. Does nothing outside the main thread, or where the program handles
    the signal itself."""

    def __init__(self) -> None:
        self._noted = False
        self._mine = False

    def __enter__(self) -> Interrupts:
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._note)
            self._mine = True
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        if self._mine:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if kind is None:
            self.check()

    def _note(self, number: int, frame: Any) -> None:
        if self._noted:
            raise KeyboardInterrupt
        self._noted = True

    def check(self) -> None:
        if self._noted:
            raise KeyboardInterrupt
