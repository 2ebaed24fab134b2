"""The workloads: token ids in, token counts out.

Owns: lengths, counts and ids of C1 to C5. A workload is a list of requests submitted at once, all greedy, none ended by
an end token. Ids are drawn from (workload, round): each engine sees the same prompts, and no round finds an earlier one
in its prefix cache. Lengths are the same in every round. Knows no engine and needs nothing but the standard library:
it is imported in each peer's virtual environment.

    C1  one request, 64 in, 64 out                                  latency
    C2  32 requests (m1b: 8), 32 to 256 in, 16 to 128 out           offline throughput
    C3  one request, 2048 in (m1b: 1024), 1 out                     prefill
    C4  16 requests, 512 shared and 16 own in, 16 out               shared prefix
    C5  a new process, one request, 64 in, 1 out                    start-up
"""

from __future__ import annotations

import random
from dataclasses import dataclass

# Plain tokens in the vocabularies of both models.
FIRST_ID, LAST_ID = 300, 19_999
NAMES = ("C1", "C2", "C3", "C4", "C5")
WARM_UP = -1


@dataclass(frozen=True, slots=True)
class Request:
    """What one request asks for."""

    prompt: list[int]
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Timing:
    """What one request got: seconds from the submission to its first and last token, and how many tokens."""

    first: float
    last: float
    count: int


def build(name: str, model: str, number: int) -> list[Request]:
    """The requests of workload `name` for `model`, in round `number`."""
    big = model == "m1b"
    # C5 is the first token of C1: its requests are drawn alike.
    draw = random.Random(f"{'C1' if name == 'C5' else name} {number}")

    def tokens(count: int) -> list[int]:
        return [draw.randint(FIRST_ID, LAST_ID) for _ in range(count)]

    match name:
        case "C1":
            return [Request(tokens(64), 64)]
        case "C2":
            lengths = random.Random(0)
            shapes = [(lengths.randint(32, 256), lengths.randint(16, 128)) for _ in range(8 if big else 32)]
            return [Request(tokens(inputs), outputs) for inputs, outputs in shapes]
        case "C3":
            return [Request(tokens(1024 if big else 2048), 1)]
        case "C4":
            prefix = tokens(512)
            return [Request(prefix + tokens(16), 16) for _ in range(16)]
        case "C5":
            return [Request(tokens(64), 1)]
        case _:
            raise ValueError(f"unknown workload {name!r}: choose from {', '.join(NAMES)}")


def computed_tokens(requests: list[Request]) -> int:
    """Tokens that the model must see at least once: what all prompts begin with counts once; last tokens do not."""
    shared = 0
    if len(requests) > 1:
        for column in zip(*(r.prompt for r in requests), strict=False):
            if len(set(column)) > 1:
                break
            shared += 1
    return shared + sum(len(r.prompt) - shared + r.output_tokens - 1 for r in requests)
