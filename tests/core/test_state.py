"""The waiting queue, and end tokens in the rows."""

from __future__ import annotations

import random

import pytest

from quire.core.decoding import Independent
from quire.core.kvcache import KVCacheManager
from quire.core.rows import Rows
from quire.core.sequence import Job, Sequence, Status
from quire.core.state import State, Waiting
from quire.types.kv import KVGroup
from quire.types.params import SamplingParams
from quire.types.request import Request


def sequence(arrival: int, priority: int = 0, index: int = 0, **options: object) -> Sequence:
    params = SamplingParams(**options)  # type: ignore[arg-type]
    request = Request(str(arrival), [1, 2], params, 0, (9,))
    return Sequence(Job(request, Independent(params, 0), arrival, 10, priority), index, [1, 2], 1)


def test_the_queue_is_in_order_of_priority_then_arrival_then_sample() -> None:
    queue = Waiting()
    keys = [(-1, 7, 0), (0, 1, 0), (0, 2, 0), (0, 2, 1), (0, 2, 10), (0, 10, 0), (3, 0, 0)]
    shuffled = keys[:]
    random.Random(0).shuffle(shuffled)
    for priority, arrival, index in shuffled:
        queue.push(sequence(arrival, priority, index))
    assert [queue.pop().key for _ in range(len(queue))] == keys
    assert len(queue) == 0 and queue.peek() is None
    with pytest.raises(AssertionError):
        queue.pop()


def test_who_was_preempted_waits_in_its_old_place() -> None:
    queue = Waiting()
    first, second, third = (sequence(i) for i in range(3))
    queue.push(second)
    queue.push(third)
    queue.push(first)
    assert queue.pop() is first
    queue.push(first)
    assert queue.peek() is first


def test_those_that_left_are_skipped_and_not_counted() -> None:
    queue = Waiting()
    sequences = [sequence(i) for i in range(5)]
    for seq in sequences:
        queue.push(seq)
    for i in (0, 3, 4):
        sequences[i].status = Status.FINISHED
        queue.forget(sequences[i])
    assert len(queue) == 2
    assert queue.peek() is sequences[1] and len(queue) == 2
    assert [queue.pop(), queue.pop()] == [sequences[1], sequences[2]]
    assert queue.peek() is None and len(queue) == 0 and queue.tokens == 0


def test_a_sequence_that_is_pushed_twice_with_one_key_is_no_error() -> None:
    """Two heap entries with equal keys are not compared further."""
    queue = Waiting()
    one, other = sequence(1), sequence(1)
    queue.push(one)
    queue.push(other)
    assert [queue.pop(), queue.pop()] == [one, other]


@pytest.mark.parametrize("count", range(7))
def test_a_row_holds_four_end_tokens_and_looks_up_more(count: int) -> None:
    rows = Rows(2)
    state = State(rows, KVCacheManager((KVGroup("full", (0,)),), 4, 4), 10, False)
    full = sequence(0, stop_token_ids=list(range(20, 26)))
    row = state.enter(full)
    assert rows.look_up[row]
    state.leave(full)
    ends = list(range(20, 20 + count))
    row = state.enter(sequence(1, stop_token_ids=ends, ignore_eos=True))
    assert rows.look_up[row] == (count > 4)
    assert [t for t in rows.ends[row].tolist() if t >= 0] == ends[:4], "nothing is left of the row's last owner"


def test_a_row_changes_hands_twice_between_two_owners() -> None:
    """So that results for nobody are dropped as well as those for the last owner."""
    rows = Rows(1)
    first, second = sequence(0), sequence(1)
    row = rows.take(first)
    epoch = int(rows.epoch[row])
    rows.drop(row)
    assert rows.epoch[row] != epoch and rows.owner(row) is None and first.row == -1 and rows.num_free == 0
    rows.free(row)
    assert rows.take(second) == row and int(rows.epoch[row]) > epoch + 1
