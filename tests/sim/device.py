"""A device that computes nothing and checks everything.

Each KV cell holds the name of the whole prefix up to its token, so reading a wrong, stale or overwritten cell is seen
at once; the next token is a function of that name, the seed, the sample index and the position. So every run of a
workload, however it was scheduled, must show the tokens that `Oracle` computes without an engine.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np

from quire.types.kv import KVGroup
from quire.types.plan import NewRow, Plan, StepResult, TokenLogprobs, decode, encode, ints

VOCAB = 11
EOS = 0


def digest(*parts: int) -> int:
    data = b"".join(part.to_bytes(8, "little") for part in parts)
    return int.from_bytes(hashlib.blake2b(data, digest_size=7).digest(), "little")


def draw(name: int, seed: int, sample: int, position: int) -> int:
    """The token sampled behind the prefix `name`."""
    return digest(name, seed, sample, position) % VOCAB


def ranking(name: int, k: int) -> tuple[list[int], list[float]]:
    """The k likeliest tokens behind a prefix and their logprobs, all different."""
    scores = {token: -1.0 - digest(name, token) % 10**6 / 10**5 for token in range(VOCAB)}
    order = sorted(scores, key=lambda token: -scores[token])[:k]
    return order, [float(np.float32(scores[token])) for token in order]


@dataclass
class Row:
    params: NewRow
    tables: list[dict[int, int]]
    length: int = 0
    last: int = -1
    sample: int = 0

    def copy(self, sample: int) -> Row:
        return Row(self.params, [dict(table) for table in self.tables], self.length, self.last, sample)


@dataclass
class SimDevice:
    groups: tuple[KVGroup, ...]
    block_size: int
    rows: dict[int, Row] = field(default_factory=dict)
    pages: dict[int, dict[int, int]] = field(default_factory=dict)
    host: dict[int, dict[int, int]] = field(default_factory=dict)
    names: dict[int, tuple[int, int, int]] = field(default_factory=dict)  # name -> (name before, token, position)
    computed: int = 0

    def forget(self) -> None:
        """The step failed: no page holds what anybody believes."""
        self.pages.clear()
        self.host.clear()

    def execute(self, plan: Plan) -> StepResult:
        plan = decode(encode(plan), Plan)  # what travels is all there is
        self._prepare(plan)
        written: dict[tuple[int, int], int] = {}
        ends: list[int] = []
        for i, row_id in enumerate(plan.rows.tolist()):
            ends.append(self._forward(plan, i, self.rows[row_id], written))
        for i, row_id in enumerate(plan.rows.tolist()):
            self._check_reads(self.rows[row_id], int(plan.starts[i]), ends[i])
        tokens, logprobs = [], []
        for s, row_id in zip(plan.sample_index.tolist(), plan.sample_rows.tolist(), strict=True):
            row = self.rows[row_id]
            row.length = self.rows[int(plan.rows[s])].length
            row.last = draw(ends[s], row.params.seed, row.sample, row.length)
            tokens.append(row.last)
            k = row.params.params.num_logprobs
            logprobs.append(None if k is None else self._logprobs(ends[s], row.last, k))
        return StepResult(plan.number, ints(tokens, (-1, 1)), np.ones(len(tokens), np.int32), logprobs=tuple(logprobs))

    def _logprobs(self, name: int, token: int, k: int) -> TokenLogprobs:
        order, values = ranking(name, VOCAB)
        at = order.index(token)
        ids = [token, *order[:k]]
        return TokenLogprobs(ints([ids]), np.array([[values[at], *values[:k]]], np.float32), ints([at + 1]))

    def _prepare(self, plan: Plan) -> None:
        for row in plan.retired.tolist():
            self.rows.pop(row, None)
        for new in plan.new_rows:
            assert new.row not in self.rows, "a new row overwrites a live one"
            self.rows[new.row] = Row(new, [{} for _ in self.groups], sample=new.sample_index)
        copies = {dst: self.rows[src].copy(sample) for src, dst, sample in plan.forks.tolist()}
        self.rows.update(copies)
        for g, delta in enumerate(plan.tables):
            for row, index, block in zip(delta.rows.tolist(), delta.index.tolist(), delta.blocks.tolist(), strict=True):
                self.rows[row].tables[g][index] = block
        for pairs, source, destination in (
            (plan.swap_out, self.pages, self.host),
            (plan.swap_in, self.host, self.pages),
            (plan.copies, self.pages, self.pages),
        ):
            assert len({dst for _, dst in pairs.tolist()}) == len(pairs), "two moves write one page"
            moved = {dst: dict(source.get(src, {})) for src, dst in pairs.tolist()}
            destination.update(moved)
        if len(plan.swap_in):
            assert plan.fence == plan.number, "a plan must wait for the pages that it brings back"

    def _cell(self, g: int, row: Row, position: int) -> int:
        page = row.tables[g].get(position // self.block_size)
        assert page is not None, f"group {self.groups[g]} reads position {position}, which has no page"
        slot = 0 if self.groups[g].kind == "state" else position % self.block_size
        name = self.pages[page].get(slot)
        assert name is not None, f"position {position} was never written"
        return name

    def _forward(self, plan: Plan, i: int, row: Row, written: dict[tuple[int, int], int]) -> int:
        start, count = int(plan.starts[i]), int(plan.counts[i])
        known = plan.tokens[plan.token_offsets[i] : plan.token_offsets[i + 1]].tolist()
        assert count - len(known) in (0, 1)
        if plan.upper[i]:
            assert row.length <= start
            start = row.length
        inputs = known if len(known) == count else [row.last, *known]
        see = [g for g, group in enumerate(self.groups) if group.window != 1]  # a window of 1 sees nothing before
        befores = {self._cell(g, row, start - 1) for g in see} if start else {0}
        assert len(befores) == 1, "the groups disagree about the prefix"
        name = befores.pop()
        for position, token in enumerate(inputs, start):
            before, name = name, digest(name, token + 1, position)
            self.names[name] = (before, token, position)
            for g, group in enumerate(self.groups):
                if group.kind != "state":
                    page = row.tables[g][position // self.block_size]
                    self._write(page, position % self.block_size, name, plan.rows[i], written)
        for g, group in enumerate(self.groups):
            if group.kind == "state":
                page = row.tables[g][(start + count - 1) // self.block_size]
                self._write(page, 0, name, plan.rows[i], written)
        row.length = start + count
        self.computed += count
        return name

    def _write(self, page: int, slot: int, name: int, row: int, written: dict[tuple[int, int], int]) -> None:
        assert written.setdefault((page, slot), row) == row, "two rows write one cell"
        self.pages.setdefault(page, {})[slot] = name

    def _check_reads(self, row: Row, start: int, end: int) -> None:
        """Every cell that the queries `start ..` may read names the prefix that it should."""
        for g, group in enumerate(self.groups):
            if group.kind == "state":
                continue
            first = 0 if group.window is None else max(0, start - group.window + 1)
            name = end
            for position in range(row.length - 1, first - 1, -1):
                assert self._cell(g, row, position) == name, f"wrong content at position {position} of group {g}"
                name = self.names[name][0]


def oracle(prompt: list[int], seed: int, sample: int, limit: int, eos: tuple[int, ...]) -> list[int]:
    """The output tokens of one sample, without an engine."""
    name = 0
    for position, token in enumerate(prompt):
        name = digest(name, token + 1, position)
    tokens: list[int] = []
    while len(prompt) + len(tokens) < limit:
        position = len(prompt) + len(tokens)
        tokens.append(draw(name, seed, sample, position))
        if tokens[-1] in eos:
            break
        name = digest(name, tokens[-1] + 1, position)
    return tokens


def beam_oracle(prompt: list[int], width: int, limit: int, eos: tuple[int, ...], penalty: float) -> list[list[int]]:
    """The output tokens of the best beams, by a plain loop."""
    beams: list[tuple[list[int], float]] = [([], 0.0)]
    done: list[tuple[float, list[int]]] = []

    def score(tokens: list[int], total: float, stopped: bool) -> float:
        return total / (len(prompt) + len(tokens) - stopped) ** penalty

    while beams and len(prompt) + len(beams[0][0]) < limit:
        options: list[tuple[list[int], float]] = []
        for tokens, total in beams:
            name = 0
            for position, token in enumerate([*prompt, *tokens]):
                name = digest(name, token + 1, position)
            for token, value in zip(*ranking(name, 2 * width), strict=True):
                if token in eos:
                    done.append((score([*tokens, token], total + value, True), [*tokens, token]))
                else:
                    options.append(([*tokens, token], total + value))
        beams = sorted(options, key=lambda option: -option[1])[:width]
    done += [(score(tokens, total, False), tokens) for tokens, total in beams]
    return [tokens for _, tokens in sorted(done, key=lambda item: -item[0])[:width]]
