"""quire's environment variables. Owns the complete list, which may never hold more than five: everything else is an
argument. (`tests/utils` checks both against the source.)"""

from __future__ import annotations

from collections.abc import Mapping

ENVIRONMENT: Mapping[str, str] = {
    "QUIRE_LOG_LEVEL": "Level of the log where log_level is not given: debug, info, warning, error or critical.",
    "QUIRE_PLUGINS": "Names of the plugins (or of their packages) that may load, with commas between; none where it is "
    "empty. Not set: all that are installed (docs/plugins.md).",
}
