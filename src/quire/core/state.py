"""The mutable state of the core: jobs, queues, rows, blocks, and the few transitions of a sequence between them.

Owns every change of a sequence's status. Planning (`core.planner`) and committing (`core.commit`) decide; this keeps
the books straight: a sequence is in the waiting queue, or holds a row, or is parked, or is gone.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from operator import attrgetter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from quire.core.kvcache import KVCacheManager
from quire.core.moves import Moves
from quire.core.rows import Rows
from quire.core.sequence import Job, Sequence, Status
from quire.types.params import SamplingParams
from quire.types.plan import NewRow, ints
from quire.types.pooling import PoolingParams
from quire.types.request import Delta, FinishReason


class Waiting:
    """Waiting sequences by their key; those that left otherwise (abort) are skipped when they surface."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int, int], int, Sequence]] = []
        self._pushed = 0
        self._gone = 0
        self.tokens = 0  # known ones of all that wait

    def push(self, seq: Sequence) -> None:
        self._pushed += 1
        self.tokens += len(seq.tokens)
        heapq.heappush(self._heap, (seq.key, self._pushed, seq))

    def peek(self) -> Sequence | None:
        while self._heap and self._heap[0][2].status is not Status.WAITING:
            heapq.heappop(self._heap)
            self._gone -= 1
        return self._heap[0][2] if self._heap else None

    def pop(self) -> Sequence:
        seq = self.peek()
        assert seq is not None
        heapq.heappop(self._heap)
        self.tokens -= len(seq.tokens)
        return seq

    def forget(self, seq: Sequence) -> None:
        """One of the waiting sequences has changed its status."""
        self._gone += 1
        self.tokens -= len(seq.tokens)

    def __len__(self) -> int:
        return len(self._heap) - self._gone


class Counters:
    """Running totals since the start."""

    def __init__(self) -> None:
        self.preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.prompt_tokens = 0
        self.generation_tokens = 0


class Ended(NamedTuple):
    """What is left of a sequence whose stop string the output side may still find before its end."""

    prompt: int
    outputs: int
    hashes: list[bytes]


# Ended sequences with stop strings that are remembered: more than can be on their way to the output side.
REMEMBERED = 4096


class State:
    def __init__(self, rows: Rows, kv: KVCacheManager, max_length: int, histories: bool) -> None:
        self.rows = rows
        self.kv = kv
        self.max_length = max_length
        self._histories = histories
        self.jobs: dict[str, Job] = {}
        self.waiting = Waiting()
        self.running: list[Sequence] = []
        self.counters = Counters()
        self.outbox: list[Delta] = []
        self.entered: list[str] = []  # requests that were planned for the first time, till somebody asks
        self.sampled: list[str] = []  # requests whose first token was
        self.retired: list[int] = []  # rows for the next plan to retire
        self.forks: list[tuple[int, int, int]] = []  # rows for the next plan to fork
        self.ended: OrderedDict[tuple[str, int], Ended] = OrderedDict()
        self._held_rows: list[int] = []  # dead rows that the plan in the making still forks from
        self._order: NDArray[np.int64] = np.zeros(0, np.int64)
        self._stale = False

    @property
    def num_held_rows(self) -> int:
        return len(self._held_rows)

    def order(self) -> NDArray[np.int64]:
        """Rows of the running sequences, first come first."""
        if self._stale:
            self.running = sorted((s for s in self.running if s.status is Status.RUNNING), key=attrgetter("key"))
            self._order = np.fromiter((s.row for s in self.running), np.int64, len(self.running))
            self._stale = False
        return self._order

    # -- transitions -----------------------------------------------------------------------------------------------

    def enter(self, seq: Sequence) -> int:
        """A sequence gets a row, with the numbers that follow from its request; the caller sets the counts."""
        job, rows, row = seq.job, self.rows, self.rows.take(seq)
        params = job.decoding.row_params()
        ends = sorted(job.eos | job.stops)
        rows.look_up[row] = len(ends) > rows.ends.shape[1]
        rows.ends[row] = -1
        rows.ends[row, : len(ends)] = ends[: rows.ends.shape[1]]
        rows.plain[row] = not job.decoding.chooses and params.num_logprobs is None and params.prompt_logprobs is None
        rows.stream[row] = job.request.stream and not job.decoding.chooses
        rows.lead[row] = job.decoding.lead
        rows.limit[row] = job.limit
        rows.pending[row] = 0
        rows.last_plan[row] = -1
        return row

    def leave(self, seq: Sequence) -> None:
        """Give the row back (unless a fork of the plan in the making reads it: then with the next plan)."""
        row = seq.row
        self.rows.drop(row)
        self._stale = True
        if any(fork[0] == row for fork in self.forks):
            self._held_rows.append(row)
            return
        self.forks = [fork for fork in self.forks if fork[1] != row]
        self.retired.append(row)
        self.rows.free(row)

    def run(self, seq: Sequence) -> None:
        if seq.status is Status.WAITING:
            seq.status = Status.RUNNING
        self.running.append(seq)
        self._stale = True

    def close_plan(self) -> None:
        """A plan was made: what it retired and forked is done, rows that its forks read can go."""
        self.retired = self._held_rows
        for row in self._held_rows:
            self.rows.free(row)
        self._held_rows = []
        self.forks = []

    def preempt(self, seq: Sequence, moves: Moves) -> None:
        """Take row and blocks away. Nothing known is lost: blocks go to the host if there is room, else are computed
        again; tokens still in flight will be drawn again, alike."""
        row = seq.row
        known = len(seq.tokens)
        computed = int(self.rows.computed[row])
        keep = min(computed, known - 1)
        self.counters.preemptions += 1
        self.running.remove(seq)
        job = seq.job
        job.preemptions += 1
        # Prompt logprobs still in flight are dropped with the epoch, so that part of the prompt must be computed again.
        owed = job.whole or job.prompt_logprobs_end < min(computed + 1, job.prompt_length)
        if seq.candidates is not None or owed or not self.kv.swap_out(seq, keep, computed > keep, moves):
            self.kv.release(seq)
        self.leave(seq)
        seq.status = Status.PARKED if seq.candidates is not None else Status.WAITING
        if seq.status is Status.WAITING:
            self.waiting.push(seq)

    def restart(self, seq: Sequence) -> None:
        """Forget every block of the sequence, here and on the host: it computes its known tokens again."""
        self.kv.release(seq)
        if seq.status is Status.RUNNING:
            self.leave(seq)
            seq.status = Status.PARKED if seq.candidates is not None else Status.WAITING
            if seq.status is Status.WAITING:
                self.waiting.push(seq)

    def hold(self, seq: Sequence) -> None:
        """A sequence is not to be planned until it is released."""
        if seq.status is Status.RUNNING:
            self.restart(seq)
        if seq.status is Status.WAITING:
            seq.status = Status.PARKED
            self.waiting.forget(seq)

    def release(self, seq: Sequence) -> None:
        """The opposite of `hold`."""
        if seq.status is Status.PARKED and seq.candidates is None:
            seq.status = Status.WAITING
            self.waiting.push(seq)

    def finish(self, seq: Sequence) -> None:
        """The sequence is over, whatever it was doing."""
        if seq.status is Status.RUNNING:
            self.leave(seq)
        elif seq.status is Status.WAITING:
            self.waiting.forget(seq)
        seq.status = Status.FINISHED
        job = seq.job
        if isinstance(job.request.params, SamplingParams) and job.request.params.stop:
            self.ended[job.request.id, seq.index] = Ended(job.prompt_length, seq.num_outputs, seq.hashes)
            if len(self.ended) > REMEMBERED:
                self.ended.popitem(last=False)
        self.kv.release(seq)
        job.live.pop(seq.index, None)
        if not job.live:
            self.jobs.pop(job.request.id, None)

    # -- words for the runner and for the front ----------------------------------------------------------------------

    def new_row(self, seq: Sequence) -> NewRow:
        job = seq.job
        params = job.decoding.row_params()
        asked = job.request.params
        return NewRow(
            row=seq.row,
            params=params,
            seed=job.request.seed,
            sample_index=seq.index,
            prompt_length=job.prompt_length,
            length=len(seq.tokens),
            tokens=ints(seq.tokens) if self._histories or params.needs_history else ints(),
            eos_token_ids=() if params.ignore_eos else job.request.eos_token_ids,
            pooling=asked if isinstance(asked, PoolingParams) else None,
        )

    def delta(
        self, seq: Sequence, finish: FinishReason | None = None, stop_token: int | None = None, error: str | None = None
    ) -> Delta:
        """What became known of the sequence since its last delta."""
        job = seq.job
        delta = Delta(job.request.id, seq.index, seq.tokens[seq.sent :], finish, stop_token, error=error)
        if finish is not None:
            delta.preemptions = job.preemptions
        if seq.logprobs is not None:
            delta.logprobs, seq.logprobs = seq.logprobs, []
        if seq.sent == job.prompt_length:
            delta.cached_tokens = job.cached_tokens
        if seq.index == 0 and job.prompt_logprobs:
            delta.prompt_logprobs, job.prompt_logprobs = job.prompt_logprobs, []
        seq.sent = len(seq.tokens)
        return delta
