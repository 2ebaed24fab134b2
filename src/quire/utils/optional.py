"""Optional packages. Owns: the one way to ask for a package that quire can do without."""

from __future__ import annotations

import importlib
import importlib.util
from importlib import metadata
from types import ModuleType


def available(package: str) -> bool:
    """Whether a top-level package is installed. It is not imported."""
    return importlib.util.find_spec(package) is not None


def version(distribution: str) -> str | None:
    """The installed version of a distribution, None where there is none."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def require(package: str, what: str, install: str | None = None) -> ModuleType:
    """Import `package`. Errors: `ImportError` that says what needs it and how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError as e:
        raise ImportError(f"{what} needs the package {package!r}: pip install {install or package}") from e
