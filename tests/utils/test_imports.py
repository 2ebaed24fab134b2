"""Imports without the garbage collector: it rests meanwhile, and works as before afterwards."""

from __future__ import annotations

import subprocess
import sys


def test_the_collector_rests_while_torch_is_imported() -> None:
    code = """
import gc, sys
from quire.utils.imports import uncollected
before = gc.get_stats()[0]["collections"]
with uncollected("torch"):
    import torch
    assert not gc.isenabled()
assert gc.get_stats()[0]["collections"] <= before + 1, "the collector worked"
assert gc.isenabled() and gc.get_freeze_count() > 50_000
count = gc.get_freeze_count()
garbage = []
garbage.append(garbage)
del garbage
assert gc.collect() >= 1, "later garbage is found"
with uncollected("torch"):
    assert gc.isenabled(), "nothing to do the second time"
gc.disable()
with uncollected("no_such_package"):
    pass
assert not gc.isenabled(), "who had it off keeps it off"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
