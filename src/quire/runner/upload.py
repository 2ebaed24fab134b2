"""All integers of a step in one copy to the device. Owns: the host buffers, pinned where that speeds the copy, and when
each may be written again."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


class Upload:
    """Collects named integer arrays, sends them at once, and gives them back as int64 tensors on the device.

    Buffers take turns, so that the host fills one while the device may still read those of the plans in flight.
    """

    def __init__(self, device: torch.device, buffers: int) -> None:
        self._device = device
        self._pinned = device.type == "cuda"
        self._ring: list[tuple[Tensor, Any]] = [(torch.empty(0, dtype=torch.int64), None)] * buffers
        self._turn = 0
        self._parts: list[tuple[str, Any]] = []
        self._views: dict[str, Tensor] = {}

    def add(self, name: str, values: Any, shape: tuple[int, ...] | None = None) -> None:
        array = np.asarray(values, dtype=np.int64)
        self._parts.append((name, array if shape is None else array.reshape(shape)))

    def send(self) -> None:
        """One copy; what was added can be read by its name until the next `send`."""
        total = sum(array.size for _, array in self._parts)
        buffer, event = self._ring[self._turn]
        if event is not None:
            event.synchronize()
        if buffer.numel() < total:
            buffer = torch.empty(max(total, 2 * buffer.numel()), dtype=torch.int64, pin_memory=self._pinned)
        host, at = buffer.numpy(), 0
        for _, array in self._parts:
            host[at : at + array.size] = array.reshape(-1)
            at += array.size
        sent = buffer[:total].to(self._device, non_blocking=True)
        if self._pinned:
            event = torch.cuda.Event()
            event.record()
        else:
            sent = sent.clone()  # the host is the device: the buffer is written again while the step's tensors live
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
