"""Importing much at once. Owns: keeping the garbage collector out of it."""

from __future__ import annotations

import gc
import sys
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def uncollected(package: str) -> Generator[None]:
    """Around imports that bring `package`. Modules make hundreds of thousands of objects that stay for good; looking
    for garbage among them again and again is a fifth of the time that torch's import takes, and looking at them once
    more later would hold up a step. So the collector rests, and what is there then is never looked at again
    (`gc.unfreeze` undoes that). Does nothing where the package was imported before."""
    if package in sys.modules:
        yield
        return
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
