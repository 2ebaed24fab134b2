"""Plans and rows made by hand, for tests of the runner."""

from __future__ import annotations

from typing import Any

import numpy as np

from quire.config.arch import ModelArch, arch_from_hf
from quire.types.params import SamplingParams
from quire.types.plan import NewRow, Plan, TableDelta, ints

V = 24


def new_row(row: int, prompt: list[int] | None = None, offset: int = 0, **params: Any) -> NewRow:
    """A row that enters with its prompt; greedy unless told otherwise."""
    tokens, sampling = prompt or [1], SamplingParams(**{"temperature": 0.0, **params})
    kept = ints(tokens) if sampling.needs_history else ints()
    return NewRow(row, sampling, 7, 0, len(tokens), len(tokens), kept, (), offset)


def entries(*triples: tuple[int, int, int]) -> TableDelta:
    """(row, index, block)."""
    rows, index, blocks = np.array(triples, np.int32).reshape(-1, 3).T
    return TableDelta(ints(rows), ints(index), ints(blocks))


def make_plan(
    work: list[tuple[int, int, int, list[int], bool]] | None = None,
    samples: list[tuple[int, int]] | None = None,
    number: int = 0,
    **fields: Any,
) -> Plan:
    """`work`: (row, start, count, known tokens, upper); `samples`: (index among the work, row)."""
    work = work or []
    rows, starts, counts, known, upper = zip(*work, strict=True) if work else ((), (), (), (), ())
    offsets = np.cumsum([0, *map(len, known)])
    pairs = ints(samples or [], (-1, 2))
    shapes = {"forks": 3, "copies": 2, "swap_out": 2, "swap_in": 2}
    fields = {k: ints(v, (-1, shapes[k])) if k in shapes else v for k, v in fields.items()}
    return Plan(
        number, ints(rows), ints(starts), ints(counts), np.array(upper, np.bool_), ints(offsets),
        ints([t for tokens in known for t in tokens]), pairs[:, 0], pairs[:, 1],
        **{"tables": (), **fields},
    )  # fmt: skip


def tiny_arch(layers: int = 2) -> ModelArch:
    return arch_from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "num_hidden_layers": layers,
            "vocab_size": V,
            "max_position_embeddings": 64,
        }
    )
