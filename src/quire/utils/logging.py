"""Logging: the standard library's, under the logger "quire".

Owns: the formats, and when a handler is attached. A program that sets up logging of its own is left alone: quire then
only emits records. What a record says in numbers and ids it also has as `fields`, by name: `extra=fields(...)`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime
from typing import Any

FORMAT = "%(levelname)s %(asctime)s %(name)s: %(message)s"


def get_logger(name: str) -> logging.Logger:
    """The logger of a module (`__name__`), below "quire"."""
    return logging.getLogger(name if name.startswith("quire") else f"quire.{name}")


def level_name(level: str | None = None) -> str:
    """`level`, else QUIRE_LOG_LEVEL, else "info"; a level that does not exist counts as "info"."""
    name = (level or os.environ.get("QUIRE_LOG_LEVEL", "info")).lower()
    return name if name.upper() in logging.getLevelNamesMapping() else "info"


def fields(**values: Any) -> dict[str, Any]:
    """The `extra` of a log call: what else a structured record has, by name."""
    return {"fields": values}


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON: time (UTC), level, logger, process, message, its fields, and a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": record.process,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def setup_logging(level: str | None = None, form: str = "text") -> None:
    """Set the level of quire's log and send it to standard error, unless the program has handlers of its own. `form`:
    "text" or "json".

    May be called again: level and form change, no second handler comes.
    """
    logger = logging.getLogger("quire")
    logger.setLevel(level_name(level).upper())
    if not logger.handlers and not logging.getLogger().handlers:
        logger.addHandler(_Standard(sys.stderr))
    for handler in logger.handlers:
        if isinstance(handler, _Standard):
            handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter(FORMAT, datefmt="%H:%M:%S"))


class _Standard(logging.StreamHandler[Any]):
    """Made here, and not by the program."""
