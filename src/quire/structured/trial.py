"""A process that tries grammars out before the engine's own process touches them.

Owns: what runs in that process. Compiling is native code that recurses and searches: a chain of ten thousand rules
overflows its stack, a short schema can keep it busy for minutes, and neither can be caught where it happens. Here it
can: the process has a smaller stack than those who compile afterwards, a limit of memory, and a timer that ends it.
"""

from __future__ import annotations

import random
import resource
import signal
import threading

import numpy as np

from quire.parallel.launch import Channel
from quire.structured.grammar import Grammar, make_tokenizer

STACK = 4 << 20  # bytes of stack for a trial
MEMORY = 1 << 30  # bytes beyond what the process has when it is ready
STEPS = 24  # random tokens that a grammar is followed for


def serve(channel: Channel, tokenizer: str, size: int, eos: tuple[int, ...], limit_s: float) -> None:
    """Answers each grammar that comes with "" or with what is wrong with it. Ends by SIGPROF where one takes more than
    `limit_s` seconds of CPU time."""
    made = make_tokenizer(tokenizer, size, eos)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    threading.stack_size(STACK)
    channel.send(b"ready")
    answer = [b""]

    def run(source: str) -> None:
        answer[0] = _try(source, made, size).encode()

    while True:
        source = channel.receive().decode()
        signal.setitimer(signal.ITIMER_PROF, limit_s)
        thread = threading.Thread(target=run, args=(source,))
        thread.start()
        thread.join()
        signal.setitimer(signal.ITIMER_PROF, 0)
        channel.send(answer[0])


def _try(source: str, tokenizer: object, size: int) -> str:
    """Compile a grammar and follow it for some tokens, drawn from those it allows."""
    try:
        matcher = Grammar(source, tokenizer).matcher()  # type: ignore[arg-type]
    except ValueError as e:
        return str(e) or "unknown error"
    draw = random.Random(0)
    words = np.zeros(-(-size // 32), np.int32)
    for _ in range(STEPS):
        matcher.fill(words)
        if matcher.error or matcher.stopped:
            break
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
        if not len(allowed) or not matcher.consume([int(draw.choice(allowed))]):
            break
    return matcher.error
