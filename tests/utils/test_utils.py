"""Devices, logging and optional packages, without any GPU and without torch."""

from __future__ import annotations

import json
import logging

import pytest

from quire.utils import devices, optional
from quire.utils.logging import JsonFormatter, fields, get_logger, level_name, setup_logging
from quire.utils.pages import untouched


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("1", [1]),
        ("2,0", [2, 0]),
        ("0,-1,2", [0]),
        ("0,9,1", [0]),
        ("GPU-aaaa,GPU-bbbb", [0, 1]),
    ],
)
def test_visible_devices(value: str | None, expected: list[int]) -> None:
    assert devices.visible_devices(value, 3) == expected


@pytest.mark.parametrize("size", [200 << 40, 1 << 70])
def test_memory_that_cannot_be_had_is_a_memory_error(size: int) -> None:
    with pytest.raises(MemoryError, match=f"{size} bytes cannot be had"):
        untouched(size)
    assert not untouched(5000).any()


def test_this_machine_is_described() -> None:
    machine = devices.probe()
    assert machine.cores >= 1
    assert machine.memory > 1 << 28
    assert machine.gpus or machine.no_gpu_reason
    assert devices.cpu_name()


def test_cuda_version_of_torch_is_read_without_importing_it() -> None:
    torch = pytest.importorskip("torch")
    assert devices.torch_cuda_version() == torch.version.cuda


def test_records_as_json() -> None:
    record = logging.LogRecord("quire.x", logging.WARNING, "", 1, "%d of %s", (3, "four\n"), None)
    record.__dict__.update(fields(request_id="id", status=200))
    found = json.loads(JsonFormatter().format(record))
    assert found.pop("time").endswith("+00:00") and found.pop("process")
    about = {"request_id": "id", "status": 200}
    assert found == {"level": "warning", "logger": "quire.x", "message": "3 of four\n", **about}


def test_level_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIRE_LOG_LEVEL", "DEBUG")
    assert level_name() == "debug"
    assert level_name("warning") == "warning"
    monkeypatch.setenv("QUIRE_LOG_LEVEL", "deafening")
    assert level_name() == "info"


def test_setup_adds_one_handler_and_only_if_the_program_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    logger, root = logging.getLogger("quire"), logging.getLogger()
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(root, "handlers", [])
    setup_logging("debug")
    setup_logging("warning")
    assert len(logger.handlers) == 1 and logger.level == logging.WARNING
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(root, "handlers", [logging.NullHandler()])
    setup_logging("info")
    assert logger.handlers == []
    assert get_logger("mine").name == "quire.mine"


def test_optional_packages() -> None:
    assert optional.available("json") and not optional.available("no_such_package_here")
    assert optional.version("pytest") is not None and optional.version("no-such-package-here") is None
    with pytest.raises(ImportError, match=r"drawing needs the package 'no_such_package_here': pip install nsph"):
        optional.require("no_such_package_here", "drawing", "nsph")
