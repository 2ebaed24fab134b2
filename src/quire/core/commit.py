"""Taking a step's result in: tokens become known, sequences end, beams fork, deltas go out.

Results of rows that changed hands since (preempted, ended, aborted: another epoch) are dropped. Rows that need nothing
but their token are taken in by vector arithmetic; those with logprobs, beams or failures one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quire.core.decoding import Beam, Child
from quire.core.sequence import Job, Sequence, Status
from quire.core.state import State
from quire.types.plan import Ints, Plan, PromptLogprobs, StepResult, TokenLogprobs
from quire.types.request import Delta, FinishReason


@dataclass(frozen=True, slots=True)
class InFlight:
    """A plan handed out, with the epochs of its rows and of its sampled rows at that time."""

    plan: Plan
    row_epochs: NDArray[np.int64]
    sample_epochs: NDArray[np.int64]


def commit(state: State, flight: InFlight, result: StepResult) -> list[Delta]:
    """Returns what became known."""
    rows, plan = state.rows, flight.plan
    assert result.number == plan.number, "results come in the order of the plans"
    for item in result.prompt_logprobs:
        at = int(np.flatnonzero(plan.rows == item.row)[0])
        seq = rows.owner(item.row)
        if seq is not None and rows.epoch[item.row] == flight.row_epochs[at]:
            _take_prompt_logprobs(seq.job, item)
    deltas = _take_pooled(state, flight, result) if len(plan.pool_index) else []
    drawn, tokens = plan.sample_rows, result.tokens[:, 0]
    assert (result.accepted == 1).all(), "speculation is not there yet"
    valid = rows.epoch[drawn] == flight.sample_epochs
    special = valid & ~rows.plain[drawn]
    for i, _ in result.failed:
        special[i] = valid[i]
    plain = valid & ~special
    if not plain.all():
        drawn, tokens = drawn[plain], tokens[plain]
    deltas += _take_plain(state, drawn, tokens)
    if special.any():
        deltas += _take_special(state, plan, result, np.flatnonzero(special).tolist())
    return deltas


def _take_pooled(state: State, flight: InFlight, result: StepResult) -> list[Delta]:
    """Prompts that are complete: their jobs end."""
    deltas = list[Delta]()
    for i, vectors in zip(flight.plan.pool_index.tolist(), result.pooled, strict=True):
        row = int(flight.plan.rows[i])
        seq = state.rows.owner(row)
        if seq is not None and state.rows.epoch[row] == flight.row_epochs[i]:
            delta = state.delta(seq, FinishReason.STOP)
            delta.pooled = vectors
            deltas.append(delta)
            state.finish(seq)
    return deltas


def _take_plain(state: State, drawn: Ints, tokens: Ints) -> list[Delta]:
    rows = state.rows
    sequences = rows.owners(drawn.tolist())
    for seq, token in zip(sequences, tokens.tolist(), strict=True):
        seq.tokens.append(token)
    pending = rows.pending[drawn] - 1
    rows.pending[drawn] = pending
    known = rows.length[drawn] - pending
    state.counters.generation_tokens += len(drawn)
    kv = state.kv
    if kv.prefix_caching:
        for i in np.flatnonzero((known % kv.block_size == 0) & (rows.computed[drawn] >= known)).tolist():
            kv.publish(sequences[i], int(known[i]))
    ended = (tokens[:, None] == rows.ends[drawn]).any(1) | (known >= rows.limit[drawn]) | rows.look_up[drawn]
    ends: dict[int, Delta] = {}
    for i in np.flatnonzero(ended).tolist():
        if (end := _end_of(state, sequences[i])) is not None:
            ends[i] = end
    stream = rows.stream[drawn]
    deltas = list[Delta]()
    for i in np.flatnonzero(stream).tolist() if stream.any() else ():
        seq = sequences[i]
        if i in ends:
            deltas.append(ends[i])
        elif seq.sent > seq.job.prompt_length:  # nothing but the token is new
            deltas.append(Delta(seq.job.request.id, seq.index, seq.tokens[seq.sent :]))
            seq.sent = len(seq.tokens)
        else:
            deltas.append(state.delta(seq))
    for i, end in ends.items():
        if not stream[i]:
            deltas.append(end)
        state.finish(sequences[i])
    return deltas


def _take_special(state: State, plan: Plan, result: StepResult, indices: list[int]) -> list[Delta]:
    """Rows whose results are more than a token: logprobs, beams' candidates, failures."""
    rows, deltas = state.rows, list[Delta]()
    failed = dict(result.failed)
    jobs: dict[int, Job] = {}
    for i in indices:
        row = int(plan.sample_rows[i])
        seq = rows.owner(row)
        if seq is None:  # it fell with a sibling beam that failed
            continue
        rows.pending[row] -= 1
        job = seq.job
        if i in failed:
            for other in list(job.live.values()) if job.decoding.chooses else [seq]:
                state.kv.truncate(other, job.cached_tokens or 0)  # what its work left behind may be the trouble
                deltas.append(state.delta(other, FinishReason.ERROR, error=failed[i]))
                state.finish(other)
            jobs.pop(id(job), None)
            continue
        line = result.logprobs[i] if result.logprobs is not None else None
        if job.decoding.chooses:
            seq.candidates = line
            rows.lead[row] = -1  # not to be planned until its siblings are as far
            jobs[id(job)] = job
            continue
        seq.tokens.append(int(result.tokens[i, 0]))
        state.counters.generation_tokens += 1
        if line is not None:
            if seq.logprobs is None:
                seq.logprobs = []
            seq.logprobs.append(line)
        known = len(seq.tokens)
        if known % state.kv.block_size == 0 and rows.computed[row] >= known:
            state.kv.publish(seq, known)
        end = _end_of(state, seq)
        if end is not None:
            deltas.append(end)
            state.finish(seq)
        elif rows.stream[row]:
            deltas.append(state.delta(seq))
    for job in jobs.values():
        if all(beam.candidates is not None for beam in job.live.values()):
            deltas += _advance(state, job)
    return deltas


def _end_of(state: State, seq: Sequence) -> Delta | None:
    """The last delta of a sequence that its newest token or its length ends; None if it goes on."""
    job, token = seq.job, seq.tokens[-1]
    # before min_tokens the sampler draws none of these, unless nothing else may be drawn
    if token in job.eos and seq.num_outputs >= job.min_tokens:
        return state.delta(seq, FinishReason.STOP)
    if token in job.stops and seq.num_outputs >= job.decoding.row_params().min_tokens:
        return state.delta(seq, FinishReason.STOP, stop_token=token)
    if len(seq.tokens) >= job.limit:
        return state.delta(seq, FinishReason.LENGTH)
    return None


def _take_prompt_logprobs(job: Job, item: PromptLogprobs) -> None:
    """Each prompt position counts once, however often preemption has it computed."""
    assert item.start <= job.prompt_logprobs_end, "some of the prompt's logprobs were lost"
    skip = max(0, job.prompt_logprobs_end - item.start)
    lines = item.logprobs
    if skip < len(lines.ranks):
        rest = TokenLogprobs(lines.ids[skip:], lines.values[skip:], lines.ranks[skip:])
        job.prompt_logprobs.append(PromptLogprobs(item.row, item.start + skip, rest))
        job.prompt_logprobs_end = item.start + len(lines.ranks)


# -- beams -----------------------------------------------------------------------------------------------------------


def _advance(state: State, job: Job) -> list[Delta]:
    """All beams of a job have their candidates: choose the next ones, or end."""
    beam = job.decoding
    assert isinstance(beam, Beam)
    beams = list(job.live.values())
    children = beam.advance(beams, job.limit)
    if children is None:
        for seq in beams:
            state.finish(seq)
        best = beam.best()
        state.counters.generation_tokens += sum(len(ended.tokens) for ended in best)
        return [
            Delta(
                job.request.id,
                i,
                ended.tokens,
                FinishReason.STOP if ended.stopped else FinishReason.LENGTH,
                cumulative_logprob=ended.cumulative_logprob,
                cached_tokens=job.cached_tokens,
            )
            for i, ended in enumerate(best)
        ]
    first: dict[int, Child] = {}
    extra: list[Child] = []
    for child in children:
        if id(child.parent) in first:
            extra.append(child)
        else:
            first[id(child.parent)] = child
    for seq in beams:
        if id(seq) not in first:
            state.finish(seq)
    free = (i for i in range(beam.width) if i not in job.live)
    for child, index in zip(extra, list(free), strict=False):
        _fork_beam(state, child, index)
    for child in first.values():
        _continue_beam(state, child)
    return []


def _continue_beam(state: State, child: Child) -> None:
    """A parent's best child is the parent itself, one token on."""
    seq, rows = child.parent, state.rows
    seq.tokens.append(child.token)
    seq.cumulative_logprob = child.cumulative_logprob
    seq.candidates = None
    if seq.status is Status.RUNNING:
        rows.lead[seq.row] = 0
        rows.on_device[seq.row] = False  # the device drew another token: this one is sent
    else:
        seq.status = Status.WAITING
        state.waiting.push(seq)


def _fork_beam(state: State, child: Child, index: int) -> None:
    """A parent's other children share its blocks, or, where it was preempted, start over from their tokens."""
    parent, rows = child.parent, state.rows
    seq = Sequence(parent.job, index, [*parent.tokens, child.token], len(state.kv.groups))
    seq.cumulative_logprob = child.cumulative_logprob
    parent.job.live[index] = seq
    if parent.status is not Status.RUNNING or not rows.num_free:
        state.waiting.push(seq)
        return
    row = state.enter(seq)
    state.run(seq)
    state.kv.fork(parent, seq)
    rows.computed[row], rows.length[row] = rows.computed[parent.row], len(seq.tokens)
    rows.capacity[row] = rows.capacity[parent.row] = rows.computed[row]
    rows.on_device[row] = False
    state.forks.append((parent.row, row, index))
