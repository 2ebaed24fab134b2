"""quire's version. Owns the one place where it is written: pyproject.toml and `quire.__version__` read it from here."""

from __future__ import annotations

VERSION = "0.1.0"
