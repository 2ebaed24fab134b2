"""A step from plan to result, on a model that is a formula: the next token follows from the last and its position."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from quire.runner import model_runner
from quire.runner.kv_store import KVStore
from quire.runner.model_runner import ModelRunner
from quire.runner.replay import NoReplay
from quire.runner.sampler import Sampler
from quire.runner.table import RequestTable
from quire.types.kv import KVGroup
from quire.types.plan import Plan, StepResult, ints

from .plans import V, entries, make_plan, new_row, tiny_arch

GROUPS = (KVGroup("full", (0, 1)),)


def follows(token: int, position: int) -> int:
    return (3 * token + position + 1) % V


class Formula:
    """Hidden states are (token, position); the logits of one are highest at `follows`, and all different."""

    def __init__(self) -> None:
        self.seen = list[tuple[list[int], list[int]]]()
        self.logits_of = list[int]()

    def __call__(self, tokens_T: torch.Tensor, positions_T: torch.Tensor, step: Any) -> torch.Tensor:
        self.seen.append((tokens_T.tolist(), positions_T.tolist()))
        return torch.stack((tokens_T, positions_T), 1).float()

    def compute_logits(self, hidden_SD: torch.Tensor, dtype: object = None) -> torch.Tensor:
        self.logits_of.append(len(hidden_SD))
        best_S = (3 * hidden_SD[:, 0] + hidden_SD[:, 1] + 1) % V
        return -((torch.arange(V) - best_S.unsqueeze(1) + 0.1).abs())


class Rig:
    def __init__(self) -> None:
        device, sampler = torch.device("cpu"), Sampler(V, "cpu")
        self.model = Formula()
        self.store = KVStore(tiny_arch(2), GROUPS, 8, 4, 4, torch.float32, device)
        self.table = RequestTable(5, 32, 4, 1, sampler, device)
        model: Any = self.model
        self.runner = ModelRunner(model, self.store, self.table, sampler, NoReplay(), device, 2)

    def run(self, plan: Plan) -> StepResult:
        return self.runner.submit(plan).result()


def test_a_row_computes_its_prompt_in_chunks_and_goes_on_from_its_own_tokens() -> None:
    rig = Rig()
    prompt = [5, 9, 2, 7, 1]
    first = make_plan([(2, 0, 3, prompt[:3], False)], new_rows=(new_row(2, prompt, offset=2),))
    result = rig.run(first)
    assert result.tokens.shape == (0, 1) and result.number == 0
    result = rig.run(make_plan([(2, 3, 2, prompt[3:], False)], [(0, 2)], number=1))
    token, expected = prompt[-1], list[int]()
    for index in range(4, 9):
        token = follows(token, index + 2)
        expected.append(token)
    got = result.tokens[0].tolist()
    for number, (start, upper) in enumerate([(5, False), (8, True), (7, False), (9, True)], 2):
        got += rig.run(make_plan([(2, start, 1, [], upper)], [(0, 2)], number=number)).tokens[0].tolist()
    assert got == expected
    assert rig.model.seen[-1] == ([expected[-2]], [10]), "where the host knew a bound, the device's length counts"
    assert rig.table.length_R[2] == 9 and rig.table.last_R[2] == expected[-1]


def test_a_step_on_a_gpu_that_samples_nothing_is_waited_for_too() -> None:
    """Else chunks of a prompt would seem to take no time, and be submitted all at once."""
    rig, asked = Rig(), list[str]()
    runner: Any = rig.runner
    event: Any = Mock()
    event.record.side_effect = lambda: asked.append(f"recorded behind {len(rig.model.seen)} steps")
    event.query.side_effect = [False, True]
    runner._event = lambda: event
    chunk = make_plan([(2, 0, 3, [5, 9, 2], False)], new_rows=(new_row(2, [5, 9, 2, 7], offset=2),))
    pending = rig.runner.submit(chunk)
    assert asked == ["recorded behind 1 steps"]
    assert [pending.done(), pending.done()] == [False, True]
    assert pending.result().tokens.shape == (0, 1)
    event.synchronize.assert_called_once_with()
    sampling = rig.runner.submit(make_plan([(2, 3, 1, [7], False)], [(0, 2)], number=1))
    assert sampling.end is None and sampling.result().tokens.shape == (1, 1), "the tokens' own event says when"


def test_samples_of_a_prompt_draw_from_one_hidden_state_and_go_their_ways() -> None:
    """A plan with one row and three sampled ones; the draws are recorded in the forks' own rows."""
    rig = Rig()
    row = new_row(0, [4, 6], temperature=1.0, logprobs=1, max_tokens=9)
    plan = make_plan(
        [(0, 0, 2, [4, 6], False)], [(0, 0), (0, 1), (0, 3)], new_rows=(row,), forks=[(0, 1, 1), (0, 3, 2)],
        tables=(entries((0, 0, 5), (1, 0, 5), (3, 0, 5)),),
    )  # fmt: skip
    result = rig.run(plan)
    tokens = result.tokens[:, 0].tolist()
    assert result.accepted.tolist() == [1, 1, 1] and len(tokens) == 3
    assert result.logprobs is not None and len({line.ids[0, 1] for line in result.logprobs if line is not None}) == 1
    assert rig.table.last_R[[0, 1, 3]].tolist() == tokens
    assert rig.table.length_R[[0, 1, 3]].tolist() == [2, 2, 2]
    rig.run(make_plan([(r, 2, 1, [], False) for r in (0, 1, 3)], [(0, 0), (1, 1), (2, 3)], number=1))
    assert rig.model.seen[-1] == (tokens, [2, 2, 2])
    assert rig.model.logits_of == [3, 3]


def test_rows_of_a_step_keep_apart() -> None:
    """One decodes, one samples at its prompt's end, one is in the middle of its own."""
    rig = Rig()
    rig.run(make_plan([(0, 0, 2, [3, 4], False)], [(0, 0)], new_rows=(new_row(0, [3, 4]),)))
    plan = make_plan(
        [(0, 2, 1, [], False), (1, 0, 2, [8, 9], False), (4, 0, 3, [1, 2, 3], False)], [(0, 0), (1, 1)],
        number=1, new_rows=(new_row(1, [8, 9]), new_row(4, [1, 2, 3, 4])),
    )  # fmt: skip
    second = follows(follows(4, 1), 2)
    assert rig.run(plan).tokens[:, 0].tolist() == [second, follows(9, 1)]
    assert rig.table.length_R[[0, 1, 4]].tolist() == [3, 2, 3]
    assert rig.model.logits_of == [1, 2]


def test_a_known_token_behind_the_drawn_one() -> None:
    """A row of which the host says that something else follows what the device drew."""
    rig = Rig()
    drawn = int(rig.run(make_plan([(0, 0, 1, [3], False)], [(0, 0)], new_rows=(new_row(0, [3]),))).tokens[0, 0])
    result = rig.run(make_plan([(0, 1, 3, [11, 12], False)], [(0, 0)], number=1))
    assert rig.model.seen[-1] == ([drawn, 11, 12], [1, 2, 3])
    assert result.tokens[0, 0] == follows(12, 3)


def test_a_plan_without_rows_moves_pages_all_the_same() -> None:
    rig = Rig()
    rig.store.tensors[0][:, 3] = 7.0
    result = rig.run(make_plan(swap_out=[(3, 1)], number=4))
    assert (result.number, len(result.tokens), len(result.accepted)) == (4, 0, 0) and not rig.model.seen
    rig.run(make_plan(swap_in=[(1, 0)], number=5))
    assert (rig.store.tensors[0][:, 0] == 7.0).all()


def test_pages_have_moved_when_the_model_runs() -> None:
    rig = Rig()
    rig.store.tensors[1][:, 2] = 5.0
    seen = list[float]()
    run = rig.model.__call__

    def look(*args: Any) -> torch.Tensor:
        seen.append(float(rig.store.tensors[1][0, 6].sum()))
        return run(*args)

    rig.runner._model = look  # type: ignore[assignment]
    rig.runner.submit(make_plan([(0, 0, 1, [1], False)], copies=[(2, 6)], new_rows=(new_row(0),)))
    assert seen and seen[0] > 0


@pytest.mark.parametrize("at_once", [1, 2, 3, 100])
def test_prompt_logprobs_come_for_every_position_but_the_first(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """In chunks, beside rows that ask for none; tokens behind the prompt have none either."""
    monkeypatch.setattr(model_runner, "LOGITS_AT_ONCE", at_once)
    rig = Rig()
    prompt = [3, 14, 1, 5, 9, 2, 6, 5]
    rows = (new_row(1, [8, 9, 10]), new_row(3, prompt, prompt_logprobs=2, max_tokens=4))
    work = [
        [(1, 0, 2, [8, 9], False), (3, 0, 3, prompt[:3], False)],
        [(1, 2, 1, [10], False), (3, 3, 4, prompt[3:7], False)],
        [(1, 3, 1, [], False), (3, 7, 1, prompt[7:], False)],
        [(1, 4, 1, [], False), (3, 8, 1, [], False)],
        [(3, 0, 9, [*prompt, 4], False)],  # computed again, with a token of its own behind the prompt
    ]
    items = list[Any]()
    for number, each in enumerate(work):
        result = rig.run(make_plan(each, number=number, new_rows=rows if number == 0 else ()))
        if number == 3:
            assert not result.prompt_logprobs
        if number == 4:
            assert sum(len(item.logprobs.ranks) for item in result.prompt_logprobs) == 7
        else:
            items += result.prompt_logprobs
    assert all(item.row == 3 and len(item.logprobs.ranks) <= at_once for item in items)
    assert [i for item in items for i in range(item.start, item.start + len(item.logprobs.ranks))] == list(range(1, 8))
    ids, values, ranks = (np.concatenate([getattr(i.logprobs, f) for i in items]) for f in ("ids", "values", "ranks"))
    for at, token in enumerate(prompt[1:]):
        logits_V = rig.model.compute_logits(torch.tensor([[prompt[at], at]], dtype=torch.float32))[0]
        right_V = torch.log_softmax(logits_V, -1)
        order = right_V.argsort(descending=True).tolist()
        assert ids[at].tolist() == [token, *order[:2]]
        assert ranks[at] == order.index(token) + 1
        torch.testing.assert_close(torch.from_numpy(values[at]), right_V[ids[at]].float(), rtol=1e-5, atol=1e-5)


def test_a_retired_rows_wishes_are_not_its_successors() -> None:
    rig = Rig()
    rig.run(make_plan([(0, 0, 3, [1, 2, 3], False)], new_rows=(new_row(0, [1, 2, 3], prompt_logprobs=0),)))
    plan = make_plan([(0, 0, 2, [4, 5], False)], [(0, 0)], retired=ints([0]), new_rows=(new_row(0, [4, 5]),), number=1)
    result = rig.run(plan)
    assert not result.prompt_logprobs and result.tokens[0, 0] == follows(5, 1)
