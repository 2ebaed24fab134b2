"""An engine-wide logits processor that breaks what a request tells it to: `vllm_xargs={"fault": ...}`."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from typing import Any


class Faults:
    def __init__(self, vocab_size: int, device: Any) -> None:
        pass

    @classmethod
    def validate(cls, params: Any) -> None:
        if (params.extra_args or {}).get("fault") == "refused":
            raise ValueError("this fault is not to be had")

    def add(self, row: int, params: Any) -> bool:
        fault = (params.extra_args or {}).get("fault")
        if fault == "step":
            raise RuntimeError("the step's fault")
        if fault == "memory":
            raise MemoryError
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return fault == "row"

    def fork(self, source: int, destination: int) -> None:
        pass

    def retire(self, row: int) -> None:
        pass

    def apply(self, logits_GV: Any, rows: Sequence[int], history: Any) -> Any:
        raise RuntimeError("the row's fault")
