"""Making a plan: who runs next, and how many tokens of each.

Owns the policy: decoding rows first, then prompts already begun, then the waiting ones in the order of their keys, all
under a budget of tokens and rows; the last in line is preempted when blocks run out. Steady decoding is vector
arithmetic over rows; only rows that need a block or are still computing known tokens are looked at one by one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from quire.core.moves import Moves
from quire.core.sequence import Sequence, Status
from quire.core.state import State
from quire.types.plan import Ints, NewRow, Plan, ints

DRAIN = 8
NO_FORKS = ints((), (0, 3))
EMPTY = ints()


@dataclass(slots=True)
class Draft:
    """A plan in the making. `rows` decode. `chunks`: (row, start, count) of rows that compute known tokens; `samples`:
    (index among the chunks, row that gets the token); `pools`: indices of the chunks that end a prompt to be pooled;
    `parents`: (prompt that forks now, its index among the chunks).
    """

    moves: Moves
    rows: NDArray[np.int64]
    chunks: list[tuple[int, int, int]] = field(default_factory=list[tuple[int, int, int]])
    tokens: list[int] = field(default_factory=list[int])
    samples: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    pools: list[int] = field(default_factory=list[int])
    new_rows: list[NewRow] = field(default_factory=list[NewRow])
    parents: list[tuple[Sequence, int]] = field(default_factory=list[tuple[Sequence, int]])


class Planner:
    """`beside`: tokens of prompts that a step may hold beside rows that decode, unless `DRAIN` such steps would not do
    for all that wait; None: as many as fit."""

    def __init__(self, state: State, max_tokens: int, stages: int, chunked: bool) -> None:
        self._state = state
        self._max_tokens = max_tokens
        self._stages = stages
        self._chunked = chunked
        self.beside: int | None = None
        self._number = 0
        self._blocked: tuple[tuple[int, int, int], int, int] | None = None
        self._ones = np.ones(state.rows.num_rows, np.int32)
        self._zeros = np.zeros(state.rows.num_rows + 1, np.int32)

    def plan(self) -> Plan | None:
        """The next step, or None if nothing can run now."""
        state = self._state
        if not (state.running or len(state.waiting)):
            return None
        state.kv.open()
        moves = Moves(self._number, len(state.kv.groups))
        draft = self._draft(moves)
        while not (len(draft.rows) or draft.chunks or moves.swap_out):
            # A beam that waits for siblings holds a row and blocks, perhaps the very ones that a sibling waits for.
            idle = next((seq for seq in reversed(state.running) if seq.candidates is not None), None)
            if idle is None or not len(state.waiting):
                return None
            state.preempt(idle, moves)
            draft = self._draft(moves)
        return self._finish(draft)

    def _draft(self, moves: Moves) -> Draft:
        state = self._state
        order = state.order()
        cap = -(-min(len(order) + len(state.waiting), state.rows.num_rows) // self._stages)
        preemptions = state.counters.preemptions
        draft, budget = self._continue(order, min(cap, self._max_tokens), moves)
        if state.counters.preemptions == preemptions:
            self._admit(draft, budget, cap - len(draft.rows) - len(draft.chunks))
        state.kv.close()
        return draft

    # -- rows that run already ---------------------------------------------------------------------------------------

    def _continue(self, order: NDArray[np.int64], cap: int, moves: Moves) -> tuple[Draft, int]:
        """Rows that go on: those that decode, and those in the middle of a prompt. Returns the draft and the tokens
        left of the budget."""
        preemptions = self._state.counters.preemptions
        rows = self._state.rows
        computed, length = rows.computed[order], rows.length[order]
        ready = (rows.pending[order] <= rows.lead[order]) & (computed < length) & (length < rows.limit[order])
        if not ready.all():
            order, computed, length = order[ready], computed[ready], length[ready]
        if len(order) > cap:  # those that waited longest go first
            pick = np.sort(np.argsort(rows.last_plan[order], kind="stable")[:cap])
            order, computed, length = order[pick], computed[pick], length[pick]
        steady = (length - computed == 1) & rows.on_device[order]
        draft = Draft(moves, order)
        decodes = int(np.count_nonzero(steady))
        budget = self._max_tokens - decodes
        if decodes and self.beside is not None:
            backlog = self._state.waiting.tokens + int((length - computed)[~steady].sum())
            budget = min(budget, max(self.beside, backlog // DRAIN))
        for i in np.flatnonzero(~steady | (computed >= rows.capacity[order])).tolist():
            seq = rows.owner(int(order[i]))
            if seq is None:  # preempted a moment ago
                continue
            start = int(computed[i])
            count = 1 if steady[i] else self._chunk(start, int(length[i]), budget)
            if count == 0 or not self._grow(seq, start, start + count, moves):
                continue
            if not steady[i]:
                budget -= count
                self._add_chunk(draft, seq, start, count)
        draft.rows = order[steady]
        if self._state.counters.preemptions != preemptions:
            draft.rows = ints([row for row in draft.rows.tolist() if rows.sequence[row] is not None]).astype(np.int64)
        self._fork(draft)
        return draft, budget

    def _grow(self, seq: Sequence, start: int, upto: int, moves: Moves) -> bool:
        """Blocks for a running sequence, if need be by preempting from the end of the line; False: it fell itself."""
        state = self._state
        while not (capacity := state.kv.grow(seq, start, upto, moves)):
            victim = next(s for s in reversed(state.running) if s.status is Status.RUNNING)
            assert victim is not seq or len(state.running) > 1, (
                "a pool that holds one longest sequence is never short for it"
            )
            state.preempt(victim, moves)
            if victim is seq:
                return False
        state.rows.capacity[seq.row] = capacity
        return True

    def _chunk(self, start: int, length: int, budget: int) -> int:
        """How many of the known tokens `start .. length-1` to compute under `budget`."""
        end = min(length, start + budget)
        if end < length and not self._chunked and start + self._max_tokens >= length:
            return 0
        kv = self._state.kv
        if kv.has_state and kv.prefix_caching:  # a state can be found again only where a step ended
            border = min(end, length - 1) // kv.block_size * kv.block_size
            if border > start:
                end = border
        return max(0, end - start)

    # -- waiting sequences -------------------------------------------------------------------------------------------

    def _admit(self, draft: Draft, budget: int, max_rows: int) -> None:
        state = self._state
        while budget > 0 and max_rows > 0 and state.rows.num_free and (seq := state.waiting.peek()) is not None:
            count = self._enter(seq, budget, draft)
            if count == 0:
                return
            budget -= count
            max_rows -= 1

    def _enter(self, seq: Sequence, budget: int, draft: Draft) -> int:
        """Let a waiting sequence in; returns the tokens it computes now, 0 if it must wait."""
        state, kv, rows = self._state, self._state.kv, self._state.rows
        situation = (seq.key, kv.pool.available, kv.pool.num_published)
        if situation == self._blocked:  # nothing has changed since it found no room
            return 0
        swapped = seq.host is not None
        hit = None if swapped else kv.lookup(seq)
        start = seq.swapped if hit is None else hit.tokens
        count = self._chunk(start, len(seq.tokens), budget)
        if count == 0:
            return 0
        row = state.enter(seq)
        capacity = kv.restore(seq, count, draft.moves) if hit is None else kv.admit(seq, hit, count, draft.moves)
        if not capacity:
            rows.drop(row)
            rows.free(row)
            if swapped and not state.running and not draft.chunks:
                kv.release(seq)  # alone and still no room beside its host copy's rounding: compute it again
                return self._enter(seq, budget, draft)
            self._blocked = situation
            return 0
        state.waiting.pop()
        state.run(seq)
        rows.computed[row], rows.length[row], rows.capacity[row] = start, len(seq.tokens), capacity
        rows.on_device[row] = False
        draft.new_rows.append(state.new_row(seq))
        if hit is not None and seq.job.cached_tokens is None:
            seq.job.cached_tokens = hit.tokens
            state.entered.append(seq.job.request.id)
            if kv.prefix_caching and not seq.job.skip_cache:
                state.counters.prefix_queries += len(seq.tokens)
                state.counters.prefix_hits += hit.tokens
        self._add_chunk(draft, seq, start, count)
        self._fork(draft)
        return count

    # -- what both do ------------------------------------------------------------------------------------------------

    def _add_chunk(self, draft: Draft, seq: Sequence, start: int, count: int) -> None:
        """Compute known tokens; with the last of them, sample or pool."""
        state, rows, row = self._state, self._state.rows, seq.row
        end = start + count
        index = len(draft.chunks)
        draft.chunks.append((row, start, count))
        draft.tokens += seq.tokens[start:end]
        assert end <= len(seq.tokens), "a token behind an unknown one would need an offset of its own"
        rows.computed[row] = end
        rows.last_plan[row] = self._number
        state.kv.publish(seq, end)
        if end < rows.length[row]:
            return
        if seq.job.decoding.pooled:
            draft.pools.append(index)
            state.sampled.append(seq.job.request.id)
            return
        self._sample(row)
        draft.samples.append((index, row))
        if not seq.job.forked:
            seq.job.forked = True
            state.sampled.append(seq.job.request.id)
            if seq.job.decoding.width > 1 and not seq.job.decoding.chooses:
                draft.parents.append((seq, index))

    def _fork(self, draft: Draft) -> None:
        """Prompts whose last chunk is in the plan fork into their samples (after all that may preempt is done)."""
        for parent, index in draft.parents:
            for sample in range(1, parent.job.decoding.width):
                self._fork_one(parent, sample, index, draft)
        draft.parents.clear()

    def _fork_one(self, seq: Sequence, sample: int, index: int, draft: Draft) -> None:
        """Another sample of the same prompt: it shares all blocks, and draws from the same hidden state."""
        state, rows = self._state, self._state.rows
        child = Sequence(seq.job, sample, list(seq.tokens), len(state.kv.groups))
        seq.job.live[sample] = child
        if not rows.num_free:
            state.waiting.push(child)
            return
        row = state.enter(child)
        state.run(child)
        state.kv.fork(seq, child)
        draft.moves.inherit(seq.row, row)
        rows.computed[row], rows.length[row] = rows.computed[seq.row], len(child.tokens)
        rows.capacity[row] = rows.capacity[seq.row] = rows.computed[row]
        rows.last_plan[row] = self._number
        state.forks.append((seq.row, row, sample))
        self._sample(row)
        draft.samples.append((index, row))

    def _sample(self, row: int) -> None:
        rows = self._state.rows
        rows.pending[row] += 1
        rows.length[row] += 1
        rows.on_device[row] = True

    def _finish(self, draft: Draft) -> Plan:
        """Advance the steady rows and put the plan together: decoding rows first, then chunks."""
        state, rows, moves = self._state, self._state.rows, draft.moves
        decode = draft.rows
        num, kv = len(decode), state.kv
        starts = rows.computed[decode]
        pending = rows.pending[decode]
        rows.computed[decode] = computed = starts + 1
        rows.pending[decode] = pending + 1
        rows.length[decode] += 1
        rows.last_plan[decode] = self._number
        if kv.prefix_caching:
            for row in decode[(computed % kv.block_size == 0) & (pending == 0)].tolist():
                (seq,) = rows.owners([row])
                kv.publish(seq, int(rows.computed[row]))
        index: Ints = np.arange(num, dtype=np.int32)
        plan_rows, plan_starts = decode.astype(np.int32), starts.astype(np.int32)
        counts, offsets, sample_rows = self._ones[:num], self._zeros[: num + 1], plan_rows
        upper = pending > 0
        if draft.chunks:
            chunk = np.array(draft.chunks, np.int32)
            plan_rows = np.concatenate([plan_rows, chunk[:, 0]])
            plan_starts = np.concatenate([plan_starts, chunk[:, 1]])
            counts = np.concatenate([counts, chunk[:, 2]])
            offsets = np.concatenate([offsets, np.cumsum(chunk[:, 2], dtype=np.int32)])
            upper = np.concatenate([upper, np.zeros(len(chunk), np.bool_)])
            samples = ints(draft.samples, (-1, 2))
            index = np.concatenate([index, samples[:, 0] + num])
            sample_rows = np.concatenate([sample_rows, samples[:, 1]])
        plan = Plan(
            number=self._number,
            rows=plan_rows,
            starts=plan_starts,
            counts=counts,
            upper=upper,
            token_offsets=offsets,
            tokens=ints(draft.tokens) if draft.tokens else EMPTY,
            sample_index=index,
            sample_rows=sample_rows,
            tables=moves.tables(),
            new_rows=tuple(draft.new_rows),
            retired=ints(state.retired) if state.retired else EMPTY,
            forks=ints(state.forks, (-1, 3)) if state.forks else NO_FORKS,
            copies=moves.pairs(moves.copies),
            swap_out=moves.pairs(moves.swap_out),
            swap_in=moves.pairs(moves.swap_in),
            fence=moves.fence,
            pool_index=ints(draft.pools) + num if draft.pools else EMPTY,
        )
        state.close_plan()
        self._number += 1
        return plan
