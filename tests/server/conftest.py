"""One server for the tests that leave it as it was."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from servers import Server


@pytest.fixture(scope="session")
def shared() -> Iterator[Server]:
    server = Server("--max-request-bytes=100000", "--served-model-name=demo", "--served-model-name=other")
    yield server
    assert server.stop() == 0, "".join(server.log)


@pytest.fixture
def server(shared: Server) -> Iterator[Server]:
    yield shared
    shared.idle()
