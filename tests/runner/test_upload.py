"""One copy a step: what was added comes back by name, and no buffer is written while the device may read it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from quire.runner import upload as uploads
from quire.runner.upload import DeviceUpload, HostUpload, Upload, make_upload


class Event:
    """A CUDA event that logs. `done`: the device has come so far."""

    def __init__(self) -> None:
        self.done = False
        self.waits = 0

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        self.waits += 1
        self.done = True


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """A `torch` whose pinned memory is plain memory and whose copies to the device never take place: what was sent is
    read from the host's own buffer, as late as may be."""
    events = list[Event]()

    def event() -> Event:
        events.append(Event())
        return events[-1]

    def empty(n: int, dtype: torch.dtype, pin_memory: bool = False) -> torch.Tensor:
        return torch.full((n,), -99, dtype=dtype)

    cuda = SimpleNamespace(Event=event)
    fake = SimpleNamespace(empty=empty, int64=torch.int64, from_numpy=torch.from_numpy, cuda=cuda)
    monkeypatch.setattr(uploads, "torch", fake)
    return events


def send(upload: Upload, **values: Any) -> dict[str, torch.Tensor]:
    for name, value in values.items():
        upload.add(name, value)
    upload.send()
    return {name: upload[name] for name in values}


def check_names(upload: Upload) -> None:
    upload.add("a", [3, 1, 2])
    upload.add("pairs", [(1, 2), (3, 4), (5, 6)], (-1, 2))
    upload.add("none", [], (-1, 2))
    upload.add("lines", (np.array([1, 2], np.int32), np.array([3, 4], np.int32), np.array([5, 6], np.int32)))
    upload.add("turned", np.array([[1, 2], [3, 4], [5, 6]], np.int32).T)
    upload.add("flags", np.array([True, False]))
    upload.send()
    assert upload["a"].tolist() == [3, 1, 2]
    assert upload["pairs"].tolist() == [[1, 2], [3, 4], [5, 6]]
    assert tuple(upload["none"].shape) == (0, 2)
    assert upload["lines"].tolist() == [[1, 2], [3, 4], [5, 6]]
    assert upload["turned"].tolist() == [[1, 3, 5], [2, 4, 6]]
    assert upload["flags"].tolist() == [1, 0]
    assert {upload[name].dtype for name in ("a", "none", "flags")} == {torch.int64}


def test_what_is_added_comes_back_by_name() -> None:
    check_names(HostUpload())


def test_a_device_gives_the_same(fake_cuda: list[Event]) -> None:
    check_names(DeviceUpload(torch.device("cpu"), 2))


@pytest.mark.gpu
def test_a_real_device_gives_the_same() -> None:
    upload = make_upload(torch.device("cuda"), 2)
    assert isinstance(upload, DeviceUpload)
    check_names(upload)
    sent = [send(upload, a=np.full(1 + 1000 * i, i))["a"] for i in range(20)]
    assert all(bool((tensor == i).all()) for i, tensor in enumerate(sent))


def test_a_cpu_has_nothing_to_copy() -> None:
    assert isinstance(make_upload(torch.device("cpu"), 4), HostUpload)


@pytest.mark.parametrize("kind", ["host", "device"])
def test_what_was_sent_stays_while_the_next_is_collected(kind: str, fake_cuda: list[Event]) -> None:
    upload = HostUpload() if kind == "host" else DeviceUpload(torch.device("cpu"), 2)
    send(upload, a=[1, 2])
    upload.add("a", [7, 8, 9])
    assert upload["a"].tolist() == [1, 2]
    upload.send()
    assert upload["a"].tolist() == [7, 8, 9]
    send(upload, b=[1])
    with pytest.raises(KeyError):
        upload["a"]


def test_buffers_take_turns_and_are_written_again_only_when_the_device_is_through(fake_cuda: list[Event]) -> None:
    upload = DeviceUpload(torch.device("cpu"), 3)
    sent = list[dict[str, torch.Tensor]]()
    for i in range(9):
        sent.append(send(upload, a=[i, i + 1], b=[-i]))
        for back in range(min(3, i + 1)):
            values = sent[i - back]
            assert values["a"].tolist() == [i - back, i - back + 1], "of a plan that is still in flight"
            assert values["b"].tolist() == [back - i]
        assert [event.done for event in fake_cuda] == [j <= i - 3 for j in range(i + 1)]
    assert max(event.waits for event in fake_cuda) == 1


def test_a_buffer_that_is_too_small_is_replaced_not_overrun(fake_cuda: list[Event]) -> None:
    upload = DeviceUpload(torch.device("cpu"), 1)
    small = send(upload, a=[1])["a"]
    large = send(upload, a=list(range(100)), b=[5])
    assert large["a"].tolist() == list(range(100)) and large["b"].tolist() == [5]
    assert small.tolist() == [1], "the old buffer is left alone"
    assert send(upload, a=[])["a"].tolist() == []


def test_no_two_plans_in_flight_share_a_buffer(fake_cuda: list[Event], monkeypatch: pytest.MonkeyPatch) -> None:
    """`depth` plans in flight and the one that is made: depth + 1 buffers."""
    device = SimpleNamespace(type="cuda")
    upload = make_upload(device, 3)  # type: ignore[arg-type]
    assert isinstance(upload, DeviceUpload)
    monkeypatch.setattr(upload, "_device", torch.device("cpu"))
    for _ in range(4):
        send(upload, a=[1, 2, 3])
    assert not any(event.done for event in fake_cuda), "the host waits for nobody"
    send(upload, a=[1])
    assert [event.done for event in fake_cuda] == [True, False, False, False, False]
