"""The choice among implementations: priority, reasons, forcing."""

from __future__ import annotations

import pytest
import torch

from quire.ops import report
from quire.ops.dispatch import Binder, Case, Op
from quire.types.errors import ClientError

CPU = torch.device("cpu")


def only_wide(case: Case) -> str | None:
    return None if case.shapes.get("size", 0) >= 64 else "needs size >= 64"


@pytest.fixture
def op() -> Op:
    op = Op("double", lambda x: x + x)
    op.register("wide", lambda x: 2 * x, only_wide, priority=5)
    op.register("absent", "quire_no_such_module:double", lambda case: None, priority=9)
    return op


def test_the_first_that_supports_the_case_is_bound(op: Op) -> None:
    binder = Binder(CPU, torch.float32)
    assert binder.bind(op, size=64) is op.implementations[1].target
    assert binder.bind(op, size=8) is op.reference
    assert binder.bind(op, size=8) is op.reference
    wide, narrow = binder.report()
    assert (wide.chosen, narrow.chosen) == ("wide", "reference")
    reasons = dict(narrow.candidates)
    assert reasons["wide"] == "needs size >= 64"
    assert "cannot be imported" in str(reasons["absent"])
    assert reasons["reference"] is None


def test_a_forced_implementation_that_refuses_lists_the_candidates(op: Op) -> None:
    binder = Binder(CPU, torch.float32)
    binder._forced["double"] = "wide"
    with pytest.raises(ClientError, match=r"absent: cannot be imported.*wide: needs size >= 64; reference: supported"):
        binder.bind(op, size=8)
    assert binder.bind(op, size=100) is op.implementations[1].target


def test_names_are_checked(op: Op) -> None:
    with pytest.raises(ClientError, match="no op named 'atention'"):
        Binder(CPU, torch.float32, {"atention": "reference"})
    with pytest.raises(ClientError, match="already has"):
        op.register("wide", lambda x: x, only_wide)


def test_report_covers_every_built_in_op() -> None:
    chosen = {choice.op: choice.chosen for choice in report(CPU, torch.float32)}
    assert {"activation", "attention", "gated_activation", "heads", "layer_norm", "rms_norm"} <= set(chosen)
