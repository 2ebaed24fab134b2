"""The core's face: requests in, plans out, results in, deltas out. Arithmetic on integers; no torch, no I/O, no clock.

Plans are made ahead: up to the engine's depth they may be in flight, and each sequence may be planned again while
`lead` of its sampled tokens are unknown here. Results come back in the order of the plans.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

from quire.core.blockmap import MAX_CELLS, block_map
from quire.core.commit import InFlight, commit
from quire.core.decoding import decoding_of
from quire.core.kvcache import KVCacheManager
from quire.core.planner import Planner
from quire.core.rows import Rows
from quire.core.sequence import Job, Sequence, Status
from quire.core.state import State
from quire.types.errors import ClientError
from quire.types.kv import KVGroup, pages_needed
from quire.types.plan import Plan, StepResult
from quire.types.pooling import PoolingParams
from quire.types.request import Delta, FinishReason, Request
from quire.types.stats import BlockMap, EngineStats

FIRST_TOKENS = 8192  # what a growing pool of pages holds from the beginning


class Scheduler:
    """Args: `num_blocks` pages on the device and `num_host_blocks` on the host, of `block_size` tokens each; at most
    `max_num_seqs` rows; `max_num_batched_tokens` a step; sequences of at most `max_model_len` tokens; `stages` of a
    pipeline, each of which wants a plan of its own; `lead` as in the module's text; `policy` "fcfs" or "priority";
    `histories`: every row comes with its tokens, since code of the engine reads them; `grows`: pages beyond those of
    the longest sequence (or of `FIRST_TOKENS`) are used only once all others are held, rather than to remember more
    prefixes.

    Raises `ValueError` if the pool cannot hold one sequence of `max_model_len` tokens.
    """

    def __init__(
        self,
        groups: tuple[KVGroup, ...],
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        num_host_blocks: int = 0,
        prefix_caching: bool = True,
        chunked_prefill: bool = True,
        policy: str = "fcfs",
        stages: int = 1,
        lead: int = 0,
        histories: bool = False,
        grows: bool = False,
    ) -> None:
        need = pages_needed(groups, max_model_len, max_num_batched_tokens, block_size)
        at_once = max(need, FIRST_TOKENS // block_size) if grows else None
        kv = KVCacheManager(groups, num_blocks, block_size, num_host_blocks, prefix_caching, at_once)
        if need > num_blocks:
            raise ClientError(
                f"the KV cache has {num_blocks} blocks of {block_size} tokens, but one sequence of max_model_len="
                f"{max_model_len} needs {need}: lower max_model_len or give the cache more memory"
            )
        self._state = State(Rows(max_num_seqs), kv, max_model_len, histories)
        self._planner = Planner(self._state, max_num_batched_tokens, stages, chunked_prefill)
        self._lead = lead
        self._by_priority = policy == "priority"
        self._arrivals = 0
        self._flights: deque[InFlight] = deque()

    # -- requests ----------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Raises `ClientError` if the request can never run here."""
        state, prompt = self._state, request.prompt_token_ids
        if request.id in state.jobs:
            raise ClientError(f"request id {request.id!r} is in use", "request_id", request.id)
        if not prompt:
            raise ClientError("the prompt is empty: give at least one token", "prompt")
        decoding = decoding_of(request, self._lead)
        if len(prompt) + (not decoding.pooled) > state.max_length:
            room = "is less" if decoding.pooled else "leaves no room for a new one"
            raise ClientError(
                f"the prompt has {len(prompt)} tokens, max_model_len={state.max_length} {room}: "
                "shorten the prompt or raise max_model_len",
                "prompt",
            )
        limit = len(prompt) + 1  # of what is pooled: its rows are never that long
        if not isinstance(request.params, PoolingParams):
            most = request.params.max_tokens
            limit = state.max_length if most is None else min(state.max_length, len(prompt) + most)
        priority = request.priority if self._by_priority else 0
        job = Job(request, decoding, self._arrivals, limit, priority)
        self._arrivals += 1
        job.forked = bool(request.resume)
        for index, known in enumerate(request.resume or ([],)):
            if known is not None:
                job.live[index] = seq = Sequence(job, index, prompt + known, len(state.kv.groups))
                state.waiting.push(seq)
        state.jobs[request.id] = job
        if not request.resume:
            state.counters.prompt_tokens += len(prompt)

    def abort(self, request_id: str) -> list[Delta]:
        """End a request at once; unknown ids (ended long ago) are ignored."""
        return self._end_job(request_id, FinishReason.ABORT, None)

    def fail(self, request_id: str, message: str) -> list[Delta]:
        """End a request with an error of its own."""
        return self._end_job(request_id, FinishReason.ERROR, message)

    def _end_job(self, request_id: str, reason: FinishReason, error: str | None) -> list[Delta]:
        job = self._state.jobs.get(request_id)
        deltas: list[Delta] = []
        for seq in list(job.live.values()) if job is not None else ():
            deltas.append(self._state.delta(seq, reason, error=error))
            self._state.finish(seq)
        return deltas

    def end(self, request_id: str, index: int, at: int) -> None:
        """The output side found that a sequence ended with its output token number `at` (a stop string): later tokens
        never were. Unknown sequences are ignored."""
        state = self._state
        job = state.jobs.get(request_id)
        seq = job.live.get(index) if job is not None else None
        if seq is None:  # it came to its end meanwhile
            if (ended := state.ended.pop((request_id, index), None)) is not None and ended.outputs > at:
                state.counters.generation_tokens -= ended.outputs - at
                state.kv.forget(ended.hashes[(ended.prompt + at) // state.kv.block_size :])
            return
        over = seq.num_outputs - at
        if over > 0:
            state.counters.generation_tokens -= over
            if seq.status is Status.WAITING:
                state.waiting.tokens -= over
            del seq.tokens[len(seq.tokens) - over :]
            state.kv.truncate(seq, len(seq.tokens))
        state.finish(seq)
        state.ended.pop((request_id, index), None)

    # -- steps -------------------------------------------------------------------------------------------------------

    def schedule(self) -> Plan | None:
        """The next plan, or None if nothing can run before a result comes in (or at all)."""
        plan = self._planner.plan()
        if plan is not None:
            epoch = self._state.rows.epoch
            self._flights.append(InFlight(plan, epoch[plan.rows], epoch[plan.sample_rows]))
        return plan

    def limit_prompts(self, tokens: int) -> None:
        """From now on so many tokens of prompts in a step, at most, while other rows decode. Prompts must come in
        chunks."""
        self._planner.beside = tokens

    def commit(self, plan: Plan, result: StepResult) -> list[Delta]:
        """Take in the result of the oldest plan in flight."""
        flight = self._flights[0]
        assert flight.plan is plan, "results come in the order of the plans"
        deltas = commit(self._state, flight, result)
        self._flights.popleft()  # only now: if this fails, `discard` must know whose work it was
        return deltas

    def discard(self) -> dict[str, int]:
        """A step failed: drop all plans in flight and have every sequence start over from its known tokens; no block is
        trusted any more. Returns the requests that the oldest plan ran, each with how far it was to come (in tokens).
        """
        state = self._state
        suspects: dict[str, int] = {}
        for plan, epochs in [(flight.plan, flight.row_epochs) for flight in list(self._flights)[:1]]:
            ends = (plan.starts + plan.counts).tolist()
            for row, epoch, end in zip(plan.rows.tolist(), epochs.tolist(), ends, strict=True):
                seq = state.rows.owner(row)
                if seq is not None and state.rows.epoch[row] == epoch:
                    name = seq.job.request.id
                    suspects[name] = max(end, suspects.get(name, 0))
        self._flights.clear()
        state.kv.clear()  # what the plans in flight were to write, copy or swap is not to be found, here or on the host
        for seq in [seq for job in state.jobs.values() for seq in job.live.values()]:
            state.restart(seq)
        return suspects

    def only(self, request_ids: Collection[str] | None) -> None:
        """After `discard`, or when no plan is in flight: plan only these requests until told otherwise; None: all."""
        state = self._state
        for seq in [seq for job in state.jobs.values() for seq in job.live.values()]:
            if request_ids is None or seq.job.request.id in request_ids:
                state.release(seq)
            else:
                state.hold(seq)

    def reached(self, request_id: str) -> int | None:
        """How many tokens of a request have been planned; None if it has ended."""
        job, rows = self._state.jobs.get(request_id), self._state.rows
        if job is None:
            return None
        return max((int(rows.computed[seq.row]) for seq in job.live.values() if seq.row >= 0), default=0)

    def firsts(self) -> tuple[list[str], list[str]]:
        """Requests that were planned for the first time since the last call, and those whose first token was."""
        state = self._state
        entered, state.entered = state.entered, []
        sampled, state.sampled = state.sampled, []
        return entered, sampled

    @property
    def has_work(self) -> bool:
        return bool(self._state.jobs) or bool(self._flights)

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes (running sequences keep their blocks). Always succeeds."""
        self._state.kv.clear()
        return True

    def stats(self) -> EngineStats:
        state, kv, count = self._state, self._state.kv, self._state.counters
        pool = kv.pool
        return EngineStats(
            blocks_total=pool.num_blocks,
            blocks_used=pool.held,
            blocks_free=pool.available - pool.cached,
            blocks_cached=pool.cached,
            host_blocks_total=kv.host.num_blocks,
            host_blocks_used=kv.host.num_blocks - kv.host.available + kv.host.cached,
            running=state.rows.num_rows - state.rows.num_free - state.num_held_rows,
            waiting=len(state.waiting),
            preemptions=count.preemptions,
            prefix_queries=count.prefix_queries,
            prefix_hits=count.prefix_hits,
            prompt_tokens=count.prompt_tokens,
            generation_tokens=count.generation_tokens,
            block_size=kv.block_size,
            waiting_tokens=state.waiting.tokens,
        )

    def block_map(self, first: int = 0, count: int = 0, cells: int = MAX_CELLS) -> BlockMap:
        """Who holds the blocks `first .. first+count-1` (count 0: all from `first` on), in at most `cells` cells."""
        return block_map(self._state, first, count, cells)

    def check(self) -> None:
        """Assert every invariant that the books must keep, between two calls."""
        state, rows = self._state, self._state.rows
        sequences = [seq for job in state.jobs.values() for seq in job.live.values()]
        state.kv.check(sequences)
        used = [seq.row for seq in sequences if seq.status is Status.RUNNING]
        assert len(used) == len(set(used)) and all(rows.sequence[row] is not None for row in used)
        assert len(used) + rows.num_free + state.num_held_rows == rows.num_rows, "rows are lost"
        for seq in sequences:
            assert seq.status is not Status.FINISHED
            if seq.status is Status.RUNNING:
                row = seq.row
                assert rows.sequence[row] is seq
                known = len(seq.tokens) + (seq.candidates is not None)
                assert known == rows.known(row), f"{known} tokens are known, the row says {rows.known(row)}"
                assert rows.computed[row] <= rows.length[row] <= max(rows.limit[row], len(seq.tokens))
        waiting = sum(seq.status is Status.WAITING for seq in sequences)
        assert waiting == len(state.waiting), "the queue and the sequences disagree"
        assert state.waiting.tokens == sum(len(seq.tokens) for seq in sequences if seq.status is Status.WAITING)
