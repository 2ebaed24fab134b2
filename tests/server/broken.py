"""A server whose steps fail when it is told to, for requests that ask for it: `vllm_xargs={"fault": KIND}`.

`python -m broken ...` is the server. It fails from when the file $QUIRE_FAULT is there, in the middle of a step, and
says so in $QUIRE_FAULT.log.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

KINDS = {
    "forward": "a step with this request fails, whenever it is tried",
    "once": "a step with this request fails once",
    "memory": "there is too little memory for this request and any other",
    "hungry": "there is too little memory for this request",
}


def serve(*args: Any) -> None:
    """The engine's process."""
    from quire.engine.serve import serve
    from quire.runner.kv_store import KVStore
    from quire.runner.model_runner import ModelRunner

    trigger = Path(os.environ["QUIRE_FAULT"])
    kinds: dict[int, str] = {}
    plans: list[Any] = []
    submit, move = ModelRunner.submit, KVStore.move

    def submit_(self: Any, plan: Any) -> Any:
        for new in plan.new_rows:
            kinds[new.row] = (new.params.extra_args or {}).get("fault", "")
        plans[:] = [plan]
        return submit(self, plan)

    def move_(self: Any, *args: Any) -> None:  # rows are up to date by now, and nothing is computed yet
        move(self, *args)
        rows = plans[0].rows.tolist()
        for row in rows:
            if (kind := kinds.get(row)) and trigger.exists() and (kind != "memory" or len(rows) > 1):
                with open(f"{trigger}.log", "a") as log:
                    log.write(f"{kind} {len(rows)}\n")
                if kind == "once":
                    trigger.unlink()
                raise MemoryError if kind in ("memory", "hungry") else RuntimeError(f"the fault {kind}")

    ModelRunner.submit, KVStore.move = submit_, move_  # type: ignore[method-assign]
    serve(*args)


if __name__ == "__main__":
    from quire.cli.serve import command
    from quire.engine import process

    process._SERVE = "broken:serve"
    command(prog_name="broken")
