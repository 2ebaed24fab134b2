"""Logging: the standard library's, under the logger "quire".

Owns: the format, and when a handler is attached. A program that sets up logging of its own is left alone: quire then
only emits records.
"""

from __future__ import annotations

import logging
import os
import sys

FORMAT = "%(levelname)s %(asctime)s %(name)s: %(message)s"


def get_logger(name: str) -> logging.Logger:
    """The logger of a module (`__name__`), below "quire"."""
    return logging.getLogger(name if name.startswith("quire") else f"quire.{name}")


def level_name(level: str | None = None) -> str:
    """`level`, else QUIRE_LOG_LEVEL, else "info"; a level that does not exist counts as "info"."""
    name = (level or os.environ.get("QUIRE_LOG_LEVEL", "info")).lower()
    return name if name.upper() in logging.getLevelNamesMapping() else "info"


def setup_logging(level: str | None = None) -> None:
    """Set the level of quire's log and send it to standard error, unless the program has handlers of its own.

    May be called again: the level changes, no second handler comes.
    """
    logger = logging.getLogger("quire")
    logger.setLevel(level_name(level).upper())
    if logger.handlers or logging.getLogger().handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(FORMAT, datefmt="%H:%M:%S"))
    logger.addHandler(handler)
