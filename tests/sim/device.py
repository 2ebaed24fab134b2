"""A device that computes nothing and checks everything.

Each KV cell holds the name of the whole prefix up to its token, so reading a wrong, stale or overwritten cell is seen
at once; the next token is a function of that name, the seed, the sample index and the position. So every run of a
workload, however it was scheduled, must show the tokens that `oracle` computes without an engine.

It is as late as a plan allows: pages are swapped out only when a fence demands it, and whoever writes them before that
is caught.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from quire.types.kv import KVGroup
from quire.types.plan import NewRow, Plan, PromptLogprobs, StepResult, TokenLogprobs, decode, encode, ints

VOCAB = 11
EOS = 0


def digest(*parts: int) -> int:
    data = b"".join(part.to_bytes(8, "little") for part in parts)
    return int.from_bytes(hashlib.blake2b(data, digest_size=7).digest(), "little")


def draw(name: int, seed: int, sample: int, position: int, forbidden: frozenset[int] = frozenset()) -> int:
    """The token sampled behind the prefix `name`; `forbidden` ones (ends, before
    `min_tokens`) make way for the next."""
    token = digest(name, seed, sample, position) % VOCAB
    while token in forbidden:
        token = (token + 1) % VOCAB
    return token


def ranking(name: int, k: int) -> tuple[list[int], list[float]]:
    """The k likeliest tokens behind a prefix and their logprobs, all different."""
    scores = {token: -1.0 - digest(name, token) % 10**6 / 10**5 for token in range(VOCAB)}
    order = sorted(scores, key=lambda token: -scores[token])[:k]
    return order, [float(np.float32(scores[token])) for token in order]


def logprobs_of(names: list[int], tokens: list[int], k: int) -> TokenLogprobs:
    """Lines of logprobs: `tokens[i]` behind the prefix `names[i]`."""
    ids, values, ranks = list[list[int]](), list[list[float]](), list[int]()
    for name, token in zip(names, tokens, strict=True):
        order, scores = ranking(name, VOCAB)
        at = order.index(token)
        ids.append([token, *order[:k]])
        values.append([scores[at], *scores[:k]])
        ranks.append(at + 1)
    return TokenLogprobs(ints(ids, (-1, k + 1)), np.array(values, np.float32).reshape(-1, k + 1), ints(ranks))


@dataclass
class Row:
    params: NewRow
    tables: list[dict[int, int]]
    length: int = 0
    last: int = -1
    sample: int = 0

    def copy(self, sample: int) -> Row:
        return Row(self.params, [dict(table) for table in self.tables], self.length, self.last, sample)


def names_of(tokens: list[int]) -> list[int]:
    """The names of all prefixes, from that of the first token alone."""
    names, name = list[int](), 0
    for position, token in enumerate(tokens):
        name = digest(name, token + 1, position)
        names.append(name)
    return names


def nothing(*_: object) -> None:
    pass


@dataclass
class SimDevice:
    """`on_new` looks at each row that enters; `fails` (row's parameters, sample, number of outputs before) says what
    goes wrong with a draw, if anything does."""

    groups: tuple[KVGroup, ...]
    block_size: int
    on_new: Callable[[NewRow], None] = nothing
    fails: Callable[[NewRow, int, int], str | None] = nothing
    rows: dict[int, Row] = field(default_factory=dict)
    pages: dict[int, dict[int, int]] = field(default_factory=dict)
    host: dict[int, dict[int, int]] = field(default_factory=dict)
    names: dict[int, tuple[int, int, int]] = field(default_factory=dict)  # name -> (name before, token, position)
    swapping: dict[int, list[tuple[int, int]]] = field(default_factory=dict)  # device page -> (plan, host page)
    computed: int = 0

    def forget(self) -> None:
        """The step failed: no page holds what anybody believes."""
        self.pages.clear()
        self.host.clear()
        self.swapping.clear()

    def execute(self, plan: Plan) -> StepResult:
        plan = decode(encode(plan), Plan)  # what travels is all there is
        self._prepare(plan)
        written: dict[tuple[int, int], int] = {}
        ends: list[int] = []
        prompts: list[PromptLogprobs] = []
        for i, row_id in enumerate(plan.rows.tolist()):
            names = self._forward(plan, i, self.rows[row_id], written)
            ends.append(names[-1])
            prompts += self._prompt_logprobs(self.rows[row_id].params, row_id, int(plan.starts[i]), names)
        for i, row_id in enumerate(plan.rows.tolist()):
            self._check_reads(self.rows[row_id], int(plan.starts[i]), ends[i])
        tokens, logprobs, failed = [], [], []
        for i, (s, row_id) in enumerate(zip(plan.sample_index.tolist(), plan.sample_rows.tolist(), strict=True)):
            row = self.rows[row_id]
            row.length = self.rows[int(plan.rows[s])].length
            new, outputs = row.params, row.length - row.params.prompt_length
            forbidden = {*new.eos_token_ids, *(new.params.stop_token_ids or ())}
            early = frozenset(forbidden if outputs < new.params.min_tokens else ())
            row.last = draw(ends[s], new.seed, row.sample, row.length, early)
            tokens.append(row.last)
            k = new.params.num_logprobs
            logprobs.append(None if k is None else logprobs_of([ends[s]], [row.last], k))
            if (message := self.fails(new, row.sample, outputs)) is not None:
                failed.append((i, message))
        ones = np.ones(len(tokens), np.int32)
        lines = tuple(logprobs)
        # A prompt's name stands for its vector.
        pooled = tuple(np.array([ends[i] % 2**24], np.float32) for i in plan.pool_index.tolist())
        return StepResult(plan.number, ints(tokens, (-1, 1)), ones, lines, tuple(prompts), tuple(failed), pooled)

    def _prompt_logprobs(self, new: NewRow, row: int, start: int, names: list[int]) -> list[PromptLogprobs]:
        """Each position of a chunk gives those of the prompt token after it; some at a time, as the runner does."""
        k = new.params.prompt_logprobs
        if k is None:
            return []
        out = list[PromptLogprobs]()
        end = min(start + len(names), new.prompt_length - 1)
        for first in range(start, end, 3):
            last = min(end, first + 3)
            tokens = new.tokens[first + 1 : last + 1].tolist()
            out.append(PromptLogprobs(row, first + 1, logprobs_of(names[first - start : last - start], tokens, k)))
        return out

    def _finish_swaps(self, upto: int) -> None:
        """Swap-outs of plans up to `upto` are done now, and not a step sooner."""
        for page, swaps in list(self.swapping.items()):
            for number, host_page in swaps:
                if number <= upto:
                    self.host[host_page] = dict(self.pages.get(page, {}))
            if not (later := [swap for swap in swaps if swap[0] > upto]):
                del self.swapping[page]
            else:
                self.swapping[page] = later

    def _prepare(self, plan: Plan) -> None:
        self._finish_swaps(plan.fence)
        for row in plan.retired.tolist():
            self.rows.pop(row, None)
        for new in plan.new_rows:
            assert new.row not in self.rows, "a new row overwrites a live one"
            self.on_new(new)
            self.rows[new.row] = Row(new, [{} for _ in self.groups], sample=new.sample_index)
        copies = {dst: self.rows[src].copy(sample) for src, dst, sample in plan.forks.tolist()}
        self.rows.update(copies)
        for g, delta in enumerate(plan.tables):
            for row, index, block in zip(delta.rows.tolist(), delta.index.tolist(), delta.blocks.tolist(), strict=True):
                self.rows[row].tables[g][index] = block
        for pairs in (plan.swap_out, plan.swap_in, plan.copies):
            assert len({dst for _, dst in pairs.tolist()}) == len(pairs), "two moves write one page"
        for page, host_page in plan.swap_out.tolist():
            self.swapping.setdefault(page, []).append((plan.number, host_page))
        self._finish_swaps(plan.fence)
        for pairs, source in ((plan.swap_in, self.host), (plan.copies, self.pages)):
            moved = {dst: dict(source.get(src, {})) for src, dst in pairs.tolist()}
            assert not self.swapping.keys() & moved.keys(), "a page is overwritten that is still being swapped out"
            self.pages.update(moved)
        if len(plan.swap_in):
            assert plan.fence == plan.number, "a plan must wait for the pages that it brings back"

    def _cell(self, g: int, row: Row, position: int) -> int:
        page = row.tables[g].get(position // self.block_size)
        assert page is not None, f"group {self.groups[g]} reads position {position}, which has no page"
        slot = 0 if self.groups[g].kind == "state" else position % self.block_size
        name = self.pages[page].get(slot)
        assert name is not None, f"position {position} was never written"
        return name

    def _forward(self, plan: Plan, i: int, row: Row, written: dict[tuple[int, int], int]) -> list[int]:
        """Returns the names of the prefixes up to each of the row's tokens."""
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
        names = list[int]()
        for position, token in enumerate(inputs, start):
            before, name = name, digest(name, token + 1, position)
            names.append(name)
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
        return names

    def _write(self, page: int, slot: int, name: int, row: int, written: dict[tuple[int, int], int]) -> None:
        assert written.setdefault((page, slot), row) == row, "two rows write one cell"
        assert page not in self.swapping, "a page is written that is still being swapped out"
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


def oracle(
    prompt: list[int], seed: int, sample: int, limit: int, ends: tuple[int, ...], min_tokens: int = 0
) -> list[int]:
    """The output tokens of one sample, without an engine."""
    name = names_of(prompt)[-1]
    tokens: list[int] = []
    while len(prompt) + len(tokens) < limit:
        position = len(prompt) + len(tokens)
        early = len(tokens) < min_tokens
        tokens.append(draw(name, seed, sample, position, frozenset(ends if early else ())))
        if tokens[-1] in ends:
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
