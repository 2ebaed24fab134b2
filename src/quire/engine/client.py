"""Ways to reach an engine core. In this process: function calls."""

from __future__ import annotations

from quire.config.schema import Config
from quire.engine.core import EngineCore
from quire.executor.local import make_executor


class InProcessClient(EngineCore):
    """The core itself, with the executor that the configuration asks for."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, make_executor(config))
