"""All integers of a step in one copy to the device. Owns: the host buffers, pinned where that speeds the copy, and when
each may be written again. On a CPU there is nothing to copy (`HostUpload`). `Pinned` is the same for a buffer whose
layout stays."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Upload(Protocol):
    """Collects named integer arrays, sends them at once, and gives them back as int64 tensors on the device, until the
    next `send`."""

    def add(self, name: str, values: Any, shape: tuple[int, ...] | None = None) -> None: ...
    def send(self) -> None: ...
    def __getitem__(self, name: str) -> Tensor: ...


def make_upload(device: torch.device, depth: int) -> Upload:
    """For up to `depth` plans in flight."""
    return DeviceUpload(device, depth + 1) if device.type == "cuda" else HostUpload()


def _array(values: Any, shape: tuple[int, ...] | None) -> NDArray[np.int64]:
    array = np.asarray(values, dtype=np.int64)
    return array if shape is None else array.reshape(shape)


class HostUpload:
    """The host is the device."""

    def __init__(self) -> None:
        self._filling: dict[str, NDArray[np.int64]] = {}
        self._sent: dict[str, NDArray[np.int64]] = {}

    def add(self, name: str, values: Any, shape: tuple[int, ...] | None = None) -> None:
        self._filling[name] = _array(values, shape)

    def send(self) -> None:
        self._sent, self._filling = self._filling, {}

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(self._sent[name])


class DeviceUpload:
    """One copy from a pinned buffer. Buffers take turns, so that the host fills one while the device may still read
    those of the plans in flight."""

    def __init__(self, device: torch.device, buffers: int) -> None:
        self._device = device
        self._ring: list[tuple[Tensor, torch.cuda.Event | None]] = [(torch.empty(0, dtype=torch.int64), None)] * buffers
        self._turn = 0
        self._parts: list[tuple[str, NDArray[np.int64]]] = []
        self._views: dict[str, Tensor] = {}

    def add(self, name: str, values: Any, shape: tuple[int, ...] | None = None) -> None:
        self._parts.append((name, _array(values, shape)))

    def send(self) -> None:
        total = sum(array.size for _, array in self._parts)
        buffer, event = self._ring[self._turn]
        if event is not None:
            event.synchronize()
        if buffer.numel() < total:
            buffer = torch.empty(max(total, 2 * buffer.numel()), dtype=torch.int64, pin_memory=True)
        host, at = buffer.numpy(), 0
        for _, array in self._parts:
            host[at : at + array.size] = array.reshape(-1)
            at += array.size
        sent = buffer[:total].to(self._device, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._ring[self._turn] = (buffer, event)
        self._turn = (self._turn + 1) % len(self._ring)
        at = 0
        self._views = {}
        for name, array in self._parts:
            self._views[name] = sent[at : at + array.size].view(array.shape)
            at += array.size
        self._parts = []

    def __getitem__(self, name: str) -> Tensor:
        return self._views[name]


class Pinned:
    """`buffers` host buffers of `size` int32 numbers that take turns."""

    def __init__(self, size: int, buffers: int, device: torch.device) -> None:
        self._pin = pin = device.type == "cuda"
        self._ring = [torch.zeros(size, dtype=torch.int32, pin_memory=pin) for _ in range(buffers)]
        self._read = [torch.cuda.Event() for _ in range(buffers)] if pin else []
        self._turn = -1

    def next(self, least: int = 0) -> NDArray[np.int32]:
        """The buffer to fill, of `least` numbers at least; waits until the device has read what it held."""
        turn = self._turn = (self._turn + 1) % len(self._ring)
        if self._read:
            self._read[turn].synchronize()
        if self._ring[turn].numel() < least:
            self._ring[turn] = torch.zeros(2 * least, dtype=torch.int32, pin_memory=self._pin)
        return self._ring[turn].numpy()

    def send(self, target: Tensor) -> None:
        """Start the copy of its first numbers into `target` (int32, contiguous)."""
        target.copy_(self._ring[self._turn][: target.numel()], non_blocking=True)
        if self._read:
            self._read[self._turn].record()
