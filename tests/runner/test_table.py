"""Device rows: a plan's changes of them, in the plan's order."""

from __future__ import annotations

import torch

from quire.runner.sampler import Sampler
from quire.runner.table import RequestTable
from quire.runner.upload import HostUpload
from quire.types.plan import Plan, ints

from .plans import V, entries, make_plan, new_row


def make(rows: int = 6, groups: int = 2) -> RequestTable:
    return RequestTable(rows, 32, 4, groups, Sampler(V, "cpu"), torch.device("cpu"))


def apply(table: RequestTable, plan: Plan) -> None:
    upload = HostUpload()
    table.stage(plan, upload)
    upload.send()
    table.apply(plan, upload)


def test_a_new_row_has_its_offset_and_its_pages() -> None:
    table = make()
    plan = make_plan(
        new_rows=(new_row(3, [5, 6, 7], offset=-2), new_row(1, [5], offset=4)),
        tables=(entries((3, 0, 10), (3, 1, 11), (1, 0, 12)), entries((3, 1, 20))),
    )
    apply(table, plan)
    assert table.offset_R.tolist() == [0, 4, 0, -2, 0, 0, 0]
    assert table.pages_RP[0][3].tolist() == [10, 11, *[-1] * 6] and table.pages_RP[0][1, 0] == 12
    assert table.pages_RP[1][3].tolist() == [-1, 20, *[-1] * 6] and (table.pages_RP[1][1] == -1).all()
    assert table.prompt_length[[3, 1]].tolist() == [3, 1]
    assert table.sampling.params[3] == plan.new_rows[0].params and table.sampling.params[0] is None


def test_retiring_comes_before_the_row_is_taken_again() -> None:
    """One plan retires a row, gives it to a new sequence, forks that one, and fills both tables."""
    table = make()
    apply(
        table, make_plan(new_rows=(new_row(0, [1] * 9, offset=5, logprobs=2),), tables=(entries((0, 0, 30)), entries()))
    )
    table.last_R[0], table.length_R[0] = 8, 9
    plan = make_plan(
        retired=ints([0]),
        new_rows=(new_row(0, [1, 2], offset=1, repetition_penalty=2.0),),
        forks=[(0, 4, 3)],
        tables=(entries((0, 0, 6), (4, 0, 6), (4, 1, 7)), entries((0, 0, 8))),
    )
    apply(table, plan)
    for row in (0, 4):
        assert table.offset_R[row] == 1 and table.prompt_length[row] == 2
        assert table.sampling.params[row] == plan.new_rows[0].params, "the old owner's parameters are gone"
        assert table.sampling.tokens(row) == ([1, 2], [])
    assert table.pages_RP[0][[0, 4], :2].tolist() == [[6, -1], [6, 7]]
    assert table.pages_RP[1][[0, 4], 0].tolist() == [8, -1], "table entries come after forks: they are the source's own"


def test_retired_rows_forget_their_parameters() -> None:
    table = make()
    apply(table, make_plan(new_rows=(new_row(0), new_row(1)), tables=(entries(), entries())))
    apply(table, make_plan(retired=ints([0]), tables=(entries(), entries())))
    assert table.sampling.params[0] is None and table.sampling.params[1] is not None


def test_forks_read_all_sources_before_they_write() -> None:
    """Rows change places, and a source is overwritten that another fork reads."""
    table = make(groups=1)
    rows = tuple(new_row(i, [1] * (i + 1), offset=10 * i) for i in range(4))
    apply(table, make_plan(new_rows=rows, tables=(entries(*((i, 0, 40 + i) for i in range(4))),)))
    table.last_R[:4] = torch.tensor([0, 1, 2, 3])
    table.length_R[:4] = torch.tensor([10, 11, 12, 13])
    apply(table, make_plan(forks=[(0, 1, 5), (1, 0, 6), (1, 2, 7), (2, 5, 8)], tables=(entries(),)))
    came_from = {0: 1, 1: 0, 2: 1, 3: 3, 5: 2}
    for row, source in came_from.items():
        assert table.last_R[row] == source and table.length_R[row] == 10 + source
        assert table.offset_R[row] == 10 * source and table.prompt_length[row] == source + 1
        assert table.pages_RP[0][row, 0] == 40 + source
        assert table.sampling.params[row] == rows[source].params


def test_the_row_for_padding_has_no_pages() -> None:
    table = make()
    assert table.padding_row == 6
    assert all((pages[table.padding_row] == -1).all() for pages in table.pages_RP)
