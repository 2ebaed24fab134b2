"""What a front end and a core in another process say to each other, as msgpack.

Owns: the messages and their encoding. A front end sends `ToCore`, the core answers with `FromCore`. Nothing on the wire
can carry code: no pickles.
"""

from __future__ import annotations

from typing import Any

import msgspec

from quire.types.plan import decode, encode
from quire.types.request import Delta, Request
from quire.types.stats import EngineStats


class Add(msgspec.Struct, tag=True):
    request: Request


class Abort(msgspec.Struct, tag=True):
    request_ids: list[str]


class End(msgspec.Struct, tag=True):
    """A stop string ended a sequence at its output token number `at`."""

    request_id: str
    index: int
    at: int


class Call(msgspec.Struct, tag=True):
    """Wants a `Reply` of this number: `method` is one of `CALLS`."""

    number: int
    method: str
    arguments: list[Any] = []


class Stop(msgspec.Struct, tag=True):
    """Finish: the core's process ends."""


CALLS = ("hello", "block_map", "reset_prefix_cache", "start_profile", "stop_profile")
ToCore = Add | Abort | End | Call | Stop


class Step(msgspec.Struct, tag=True):
    """What a step brought to one front end. `tokens`: how many it computed, of all requests."""

    deltas: list[Delta]
    stats: EngineStats
    tokens: int = 0


class Reply(msgspec.Struct, tag=True):
    """`refused`: the error is the caller's."""

    number: int
    value: Any = None
    error: str | None = None
    refused: bool = False


FromCore = Step | Reply


class Ready(msgspec.Struct, tag=True):
    """The core's first word: it can take requests. `seconds`: what its start was made of."""

    stats: EngineStats
    seconds: dict[str, float]


class Refused(msgspec.Struct, tag=True):
    """The other first word: the caller must mend the configuration."""

    text: str
    parameter: str | None


__all__ = ["CALLS", "Abort", "Add", "Call", "End", "FromCore", "Ready", "Refused", "Reply", "Step", "Stop", "ToCore"]
__all__ += ["decode", "encode"]
