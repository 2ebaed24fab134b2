"""The worker's side of the protocol: one JSON object a line, requests in, timings out.

Owns: standard input and output of a runner's process. A runner imports its engine, then calls `serve(load)`; `load`
takes the options and answers an engine. Knows no engine. Lines, in order:

    out  {"event": "imported"}
    out  {"event": "ready", "settings": {...}}
    in   {"requests": [[[ids], output_tokens], ...]}
    out  {"event": "done", "timings": [[first, last, count], ...]}        as often as asked, until the input ends
    out  {"event": "refused", "reason": "..."}                            instead of any of them

Whatever the engine's libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from benchmarks.cpu.workloads import Request, Timing


@dataclass(frozen=True, slots=True)
class Options:
    """What a runner is told: the model in its engine's format, bf16 | int8 | int4, threads, longest sequence."""

    model: str
    precision: str
    threads: int
    max_model_len: int = 4096


class Refused(Exception):
    """The engine cannot do what is asked; the message says why."""


class Engine(Protocol):
    """An engine that a workload can be run on."""

    @property
    def settings(self) -> dict[str, Any]: ...
    def prepare(self, requests: list[Request]) -> None:
        """What depends on the size of the load; not timed."""
        ...

    def generate(self, requests: list[Request]) -> list[Timing]:
        """Submit all requests at once, run them to their ends; greedy, end tokens ignored."""
        ...


def serve(load: Callable[[Options], Engine]) -> None:
    """Answer until the input ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(event: str, **fields: Any) -> None:
        out.write(json.dumps({"event": event, **fields}) + "\n")
        out.flush()

    say("imported")
    try:
        engine = load(Options(**json.loads(sys.argv[1])))
        say("ready", settings=engine.settings)
        for line in sys.stdin:
            requests = [Request(prompt, output) for prompt, output in json.loads(line)["requests"]]
            engine.prepare(requests)
            timings = engine.generate(requests)
            say("done", timings=[[t.first, t.last, t.count] for t in timings])
    except Refused as error:
        say("refused", reason=str(error))
    # Some engines hang or crash while they are torn down; nothing of theirs is worth waiting for.
    sys.stderr.flush()
    os._exit(0)
