"""The multi-process executor: results in order, and no failure of a process that leaves anybody waiting."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import psutil
import pytest

from quire.executor import multiproc
from quire.executor.multiproc import MultiprocExecutor
from quire.parallel.launch import describe_exit
from quire.types.errors import ClientError, EngineError
from quire.types.params import SamplingParams
from quire.types.plan import NewRow, Plan, ints

HERE = Path(__file__).parent
SRC = HERE.parents[1] / "src"
FAKE = "fake_worker:FakeWorker"
LIMIT_S = 30.0  # no wait in these tests may reach it


def fake_config(folder, fault=None):
    return import_module("fake_worker").FakeConfig(str(folder), fault)


def plan(number, tokens=(1, 2, 3), params=None):
    new = (NewRow(0, params, 1, 0, 3, 3, ints()),) if params else ()
    n = len(tokens)
    one = ints([0]), ints([0]), ints([n]), ints([0]).astype(bool)
    return Plan(number, *one, ints([0, n]), ints(tokens), ints([0]), ints([0]), (), new)


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start(fault, world=2) -> executor over fake workers, shut down at the end."""
    monkeypatch.syspath_prepend(str(HERE))
    made = []

    def make(fault=None, world=2):
        made.append(MultiprocExecutor(fake_config(tmp_path, fault), world, worker=FAKE))
        return made[-1]

    yield make
    for executor in made:
        executor.shutdown()


def pids(folder):
    """Of the workers that came far enough to note it."""
    found = [int(path.read_text()) for path in folder.glob("pid*")]
    assert found
    return found


def gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until_gone(processes, limit_s=10.0):
    until = time.monotonic() + limit_s
    while not all(gone(pid) for pid in processes):
        assert time.monotonic() < until, "a worker process outlived its parent"
        time.sleep(0.02)


def test_plans_reach_all_ranks_and_results_come_back_in_order(start, tmp_path):
    executor = start(world=2)
    assert (executor.num_blocks, executor.num_host_blocks) == (90, 7)  # the smaller of the ranks'
    assert [g.kind for g in executor.kv_groups] == ["full", "sliding"]
    for pid in pids(tmp_path):
        os.kill(pid, signal.SIGINT)  # a Ctrl-C reaches the whole foreground group; it is the parent's to handle
    wide = list(range(200_000))  # far more than a socket holds
    futures = [executor.submit(plan(n, wide if n == 1 else [n])) for n in range(5)]
    results = [f.result(LIMIT_S) for f in futures]
    assert [r.number for r in results] == list(range(5))
    assert [int(r.tokens[0, 0]) for r in results] == [0, sum(wide) % 1000 * 10, 20, 30, 40]
    callback = SamplingParams(logits_processors=[lambda ids, logits: logits])
    with pytest.raises(ClientError, match="cannot be sent"):
        executor.submit(plan(5, params=callback)).result(LIMIT_S)
    assert int(executor.submit(plan(6, [7], SamplingParams(seed=2))).result(LIMIT_S).tokens[0, 0]) == 70
    began = time.monotonic()
    executor.shutdown()
    assert time.monotonic() - began < multiproc._STOP_S + 2
    wait_until_gone(pids(tmp_path))
    for rank in range(2):
        seen = [int(part.split(":")[0]) for part in (tmp_path / f"seen{rank}").read_text().split()]
        assert seen == [0, 1, 2, 3, 4, 6]
    assert not executor._ranks.folder.exists()
    with pytest.raises(EngineError, match="shut down"):
        executor.submit(plan(7)).result(LIMIT_S)
    executor.shutdown()


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ((1, 2, "raise"), ["worker 1 of 2 ended with exit code 70", "Traceback", "RuntimeError: boom in the fake"]),
        ((0, 2, "kill"), ["worker 0 of 2 was killed by SIGKILL (exit code -9)"]),
        ((0, -2, "raise"), ["worker 0 of 2 ended with exit code 70", "in result", "RuntimeError: boom in the fake"]),
        ((1, 2, "exit"), ["worker 1 of 2 ended with exit code 70", "SystemExit: 3"]),
    ],
)
def test_a_dead_worker_fails_what_is_pending(start, tmp_path, fault, expected):
    executor = start(fault)
    first = executor.submit(plan(1)).result(LIMIT_S)
    assert first.number == 1
    # rank 0 may have answered plan 2 before rank 1 fails in it, and hung plans must not hide a later one's failure
    futures = [executor.submit(plan(n)) for n in (2, 3, 4)]
    until = time.monotonic() + LIMIT_S
    while executor._ranks.broken is None and time.monotonic() < until:
        time.sleep(0.01)
    last = executor.submit(plan(5))
    failures = [f.exception(LIMIT_S) for f in [*futures, last]]
    assert isinstance(failures[-1], EngineError)
    if fault[0] == 0:
        assert all(isinstance(f, EngineError) for f in failures)
    for text in expected:
        assert text in str(failures[-1])
    wait_until_gone(pids(tmp_path))


def test_grammars_are_ready_when_all_ranks_are_and_plans_do_not_wait(start, tmp_path):
    executor = start((1, "fatal", "kill"))
    waiting, wrong = (executor.prepare(name, (2,)) for name in ("good", "wrong"))
    (tmp_path / "good0").touch()
    assert executor.submit(plan(1)).result(LIMIT_S).number == 1
    assert not waiting.done()
    (tmp_path / "good1").touch()
    assert waiting.result(LIMIT_S) is None
    (tmp_path / "wrong1").write_text("not today")
    assert "ValueError: not today" in str(wrong.exception(LIMIT_S))
    lost = executor.prepare("fatal", (2,))
    assert "SIGKILL" in str(lost.exception(LIMIT_S))
    assert isinstance(executor.prepare("late", (2,)).exception(LIMIT_S), EngineError)


def test_a_worker_that_cannot_be_made_is_told_by_the_constructor(start, tmp_path):
    with pytest.raises(EngineError, match=r"(?s)could not be started: worker 1 of 2.*boom in the fake worker"):
        start((1, "start", "raise"))
    wait_until_gone(pids(tmp_path))


def test_what_the_caller_can_mend_is_a_client_error(start, tmp_path):
    with pytest.raises(ClientError, match=r"^no such checkpoint$") as caught:
        start((1, "start", "refuse"))
    assert caught.value.parameter == "model"
    wait_until_gone(pids(tmp_path))


def test_shutdown_does_not_wait_for_a_stuck_worker(start, tmp_path, monkeypatch):
    monkeypatch.setattr(multiproc, "_STOP_S", 0.3)
    executor = start((0, 1, "hang"))
    future = executor.submit(plan(1))
    began = time.monotonic()
    executor.shutdown()
    assert time.monotonic() - began < 5
    assert isinstance(future.exception(LIMIT_S), EngineError)
    wait_until_gone(pids(tmp_path))


def test_workers_end_with_an_executor_that_is_forgotten(start, tmp_path):
    executor = MultiprocExecutor(fake_config(tmp_path), 1, FAKE)
    assert executor.submit(plan(1)).result(LIMIT_S).number == 1
    del executor
    wait_until_gone(pids(tmp_path))


# No guard against being imported again, and the parent goes without a word.
SCRIPT = """
import os, signal, sys
from quire.executor.multiproc import MultiprocExecutor
sys.path.insert(0, {here!r})
from fake_worker import FakeConfig
config = FakeConfig({folder!r}, (1, 1, "hang"))
executor = MultiprocExecutor(config, 2, worker="fake_worker:FakeWorker")
from quire.types.plan import Plan, ints
z = ints([0])
executor.submit(Plan(1, z, z, z, z.astype(bool), ints([0, 0]), ints(), z, z, ()))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_die_with_their_parent(tmp_path):
    script = SCRIPT.format(here=str(HERE), folder=str(tmp_path))
    env = {**os.environ, "PYTHONPATH": str(SRC)}
    done = subprocess.run([sys.executable, "-c", script], env=env, timeout=60, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    wait_until_gone(pids(tmp_path))


def test_exit_codes_in_words():
    assert describe_exit(-11) == "was killed by SIGSEGV (exit code -11)"
    assert describe_exit(1) == "ended with exit code 1"
    assert describe_exit(None) == "closed its channel"
