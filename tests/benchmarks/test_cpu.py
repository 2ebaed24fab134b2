"""The CPU benchmark: two engines on a tiny model through the code that measures, resuming, the report's arithmetic."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from benchmarks.cpu import models, report, results, run, workloads
from benchmarks.cpu.driver import QUIET_CORES, Memory, Noise, Patience, PeerError, Runner, TimeUp
from benchmarks.cpu.results import Cell, Key, Results
from benchmarks.cpu.workloads import Request, Timing

TINY = models.Shape(hidden=32, layers=1, heads=2, kv_heads=1, intermediate=48, vocab=20_000, theta=1e4, head=16)
CEILINGS = {"read_gb_s": 80.0, "bf16_gflop_s": 1000.0}
KEY = ("m135", "bf16", "C1", "llamacpp")


def test_quire_beside_transformers_in_two_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second go finds all done and starts nothing; a peer that is not installed is named in both."""
    monkeypatch.setitem(models.SHAPES, "tiny", TINY)
    monkeypatch.setattr(run, "ceilings", lambda threads: CEILINGS)
    monkeypatch.setattr(results, "QUIET_CORES", 99.0)  # others may be at work here
    python = tmp_path / "venvs" / "transformers" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    options = ["--models", "tiny", "--precisions", "bf16", "--workloads", "C2", "--peers", "transformers", "llamacpp"]
    options += ["--repeats", "2", "--quiet", "0", "--threads", "1", "--cache", str(tmp_path)]
    done = run.main(options)
    (cell,) = done.cells.values()
    assert cell.key == ("tiny", "bf16", "C2", "transformers") and cell.complete
    assert {name: len(found) for name, found in cell.rounds.items()} == {"quire": 2, "transformers": 2}
    assert cell.memory["transformers"].peak > cell.memory["transformers"].anonymous > 10
    assert cell.settings["quire"]["torch"] == cell.settings["transformers"]["torch"]
    assert done.left_out == {"llama.cpp": "not installed (make bench-cpu-peers)"}
    out = capsys.readouterr().out
    assert "| C2, output tokens/s" in out and "C2 tiny: " in out and "1 of 2 cells are complete" in out

    monkeypatch.setattr(run, "Runner", None)
    again = run.main(options)
    assert again.cells == done.cells and again.left_out == done.left_out
    with pytest.raises(SystemExit, match="another threads: delete it or name another --json"):
        run.main([*options, "--threads", "2"])


def cell(key: Key, ours: list[float], theirs: list[float], others: float = 0.0, ceilings: bool = True) -> Cell:
    """One with these figures of its workload's metric."""
    name = report.METRICS[key[2]].name
    made = Cell.new(key, len(ours), "now")
    made.rounds = {
        "quire": [{name: value, "others_cores": others} for value in ours],
        key[3]: [{name: value, "others_cores": 0.0} for value in theirs],
    }
    made.memory = {"quire": Memory(ours[0], 0, 0), key[3]: Memory(theirs[0], 0, 0)} if theirs else {}
    made.ceilings = dict(CEILINGS) if ceilings else {}
    return made


def test_a_cell_is_complete_when_enough_rounds_were_undisturbed() -> None:
    assert cell(KEY, [1, 2], [3, 4]).complete
    assert not cell(KEY, [1, 2], [3]).complete
    assert not cell(KEY, [1, 2], [3, 4], ceilings=False).complete
    assert not cell(KEY, [1, 2], [3, 4], others=QUIET_CORES + 0.01).complete
    mixed = cell(KEY, [1, 2], [3, 4])
    mixed.rounds["quire"] += [{"ms_per_token": 50, "others_cores": 1.0}]
    assert mixed.complete and mixed.median("quire", "ms_per_token") == 1.5
    disturbed = cell(KEY, [1, 2, 9], [3], others=1.0)
    assert disturbed.median("quire", "ms_per_token") == 2 and disturbed.spread("quire", "ms_per_token") == 4


def test_the_file_is_whole_after_each_round_and_keeps_the_better_attempt(tmp_path: Path) -> None:
    path = tmp_path / "new" / "cpu.json"
    kept = Results.resume(path, {"threads": 2})
    full = cell(KEY, [1, 2], [3, 4])
    kept.put(full)
    kept.left_out["x"] = "y"
    kept.save()
    read = Results.resume(path, {"threads": 2})
    assert read.cells == {KEY: full} and read.left_out == {"x": "y"} and read.complete(KEY)
    less = cell(KEY, [7], [8], ceilings=False)
    less.seconds = 30
    read.put(less)
    assert Results.read(path).cells[KEY].rounds == full.rounds and Results.read(path).cells[KEY].seconds == 30
    newer = cell(KEY, [5, 6], [7, 8])
    read.put(newer)
    assert Results.read(path).cells[KEY] == newer
    assert json.loads(path.read_text())["circumstances"] == {"threads": 2}
    with pytest.raises(ValueError, match="another quire"):
        Results.resume(path, {"threads": 2, "quire": "abc"})


def test_a_change_of_the_package_is_another_quire(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("1")
    first = results.digest(tmp_path)
    (tmp_path / "notes.txt").write_text("2")
    assert results.digest(tmp_path) == first
    (tmp_path / "b.so").write_bytes(b"2")
    assert results.digest(tmp_path) != first


def go(tmp_path: Path, deadline: float = float("inf"), fruitful: bool = False) -> run.Run:
    args = run.parse(["--cache", str(tmp_path), "--repeats", "2"])
    return run.Run(args, Results(args.json, {}), deadline, Patience(0), fruitful)


def measure(rounds: list[tuple[str, float]], others: Callable[[int], float]) -> run.Measure:
    """Figures without an engine; notes who was asked."""

    def answer(name: str, requests: list[Request]) -> dict[str, float]:
        found = others(len(rounds))
        rounds.append((name, found))
        return {"ms_per_token": 1.0, "others_cores": found}

    return answer


@pytest.mark.parametrize(
    ("others", "asked"),
    [
        (lambda n: 0.0, "qlqlql"),  # a warm-up, then turns
        (lambda n: 1.0 if n == 2 else 0.0, "qlqlqlq"),  # a disturbed round is made good
        (lambda n: 1.0, "qlqlqlqlql"),  # but not for ever
    ],
)
def test_turns_go_on_until_enough_rounds_were_quiet(tmp_path: Path, others: Callable[[int], float], asked: str) -> None:
    rounds: list[tuple[str, float]] = []
    made = Cell.new(KEY, 2, "now")
    assert run.turns(go(tmp_path), made, time.monotonic(), measure(rounds, others))
    assert "".join(name[0] for name, _ in rounds) == asked
    assert sum(map(len, made.rounds.values())) == len(asked) - 2
    assert Results.read(tmp_path / "cpu.json").cells[KEY].rounds == made.rounds


def test_a_slow_start_is_measured_once(tmp_path: Path) -> None:
    made, asked = Cell.new((*KEY[:2], "C5", "vllm"), 3, "now"), list[str]()

    def measure(name: str, requests: list[Request]) -> dict[str, float]:
        asked.append(name)
        return {"first_token_s": 60.0 if name == "vllm" else 1.0, "others_cores": 0.0}

    assert run.turns(go(tmp_path), made, time.monotonic(), measure)
    assert (asked.count("vllm"), asked.count("quire")) == (2, 4) and made.wanted == {"quire": 3, "vllm": 1}


def test_what_does_not_fit_is_left_for_the_next_go_unless_it_is_the_first(tmp_path: Path) -> None:
    rounds: list[tuple[str, float]] = []
    made = Cell.new(KEY, 2, "now")
    soon = time.monotonic() + 0.2

    def slow(name: str, requests: list[Request]) -> dict[str, float]:
        time.sleep(0.1)
        return measure(rounds, lambda n: 0.0)(name, requests)

    assert not run.turns(go(tmp_path, soon, fruitful=True), made, time.monotonic(), slow)
    assert len(rounds) == 2 and 0.6 <= made.seconds < 2
    assert run.turns(go(tmp_path, time.monotonic() + 0.2), made, time.monotonic(), slow)


def test_time_that_is_up_ends_a_round_and_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cut(go: run.Run, keys: list[Key]) -> None:
        go.results.put(cell(keys[0], [1.0], [2.0], ceilings=False))
        raise TimeUp

    monkeypatch.setattr(run, "sitting", cut)
    options = ["--models", "m135", "--precisions", "bf16", "--workloads", "C1", "--peers", "llamacpp"]
    run.main([*options, "--cache", str(tmp_path)])
    printed = capsys.readouterr()
    assert "| C1, ms per token | 1.00 | 2.00 (2.00x) ~ * | 2.00x |" in printed.out
    assert "0 of 1 cells" in printed.out and "the time is up" in printed.err


def test_a_runner_is_cut_at_its_deadline(tmp_path: Path) -> None:
    (tmp_path / "silent.py").write_text("import time; time.sleep(60)")
    environment, deadline = {"PYTHONPATH": str(tmp_path)}, time.monotonic() + 0.3
    with (
        Runner(Path(sys.executable), "silent", {}, environment, deadline=deadline) as runner,
        pytest.raises(TimeUp),
    ):
        runner.wait_ready()
    assert runner.process.returncode is not None and time.monotonic() < deadline + 30


def test_patience_ends() -> None:
    patience = Patience(0.2)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            time.sleep(0.1)
            start = time.monotonic()
            for _ in range(3):
                patience.wait()
            assert patience.left <= 0 and time.monotonic() - start < 2
            noise = Noise()
            time.sleep(0.3)
            assert noise.cores() > 0.1
        finally:
            busy.kill()


def test_workloads_are_the_same_for_all_and_new_each_round() -> None:
    for name in workloads.NAMES:
        first, again = (workloads.build(name, "m135", 0) for _ in range(2))
        other = workloads.build(name, "m135", 1)
        assert first == again
        assert [r.output_tokens for r in first] == [r.output_tokens for r in other]
        assert [len(r.prompt) for r in first] == [len(r.prompt) for r in other]
        assert all(a.prompt[:16] != b.prompt[:16] for a, b in zip(first, other, strict=True))
    c2 = workloads.build("C2", "m135", 0)
    assert (len(c2), len(workloads.build("C2", "m1b", 0))) == (32, 8)
    assert all(32 <= len(r.prompt) <= 256 and 16 <= r.output_tokens <= 128 for r in c2)
    c4 = workloads.build("C4", "m135", 0)
    assert len({tuple(r.prompt[:512]) for r in c4}) == 1 and len({tuple(r.prompt) for r in c4}) == 16
    assert workloads.computed_tokens(c4) == 512 + 16 * (16 + 15)
    assert workloads.computed_tokens([Request([1, 2, 3], 4)]) == 6


def test_figures_of_a_round() -> None:
    found = report.figures([Request([1] * 10, 5), Request([1] * 20, 3)], [Timing(1, 3, 5), Timing(2, 4, 3)])
    assert found["wall_s"] == 4 and found["ttft_s"] == 1.5
    assert found["output_tokens_per_s"] == 2 and found["total_tokens_per_s"] == 9.5
    assert found["ms_per_token"] == pytest.approx((500 + 1000) / 2)
    assert "ms_per_token" not in report.figures([Request([1], 1)], [Timing(1, 1, 1)])


def table(tmp_path: Path, *cells: Cell) -> dict[str, report.Row]:
    kept = Results(tmp_path / "cpu.json", {})
    for found in cells:
        kept.put(found)
    return {row.workload: row for row in report.rows(kept)}


@pytest.mark.parametrize(
    ("workload", "quire", "best", "ratio", "met"),
    [("C1", 5.0, "llamacpp", 1.2, False), ("C1", 4.0, "llamacpp", 1.5, True), ("C2", 5.0, "openvino", 5 / 8, False)],
)
def test_ratios_and_targets(tmp_path: Path, workload: str, quire: float, best: str, ratio: float, met: bool) -> None:
    peers = {"llamacpp": [9.0, 6.0, 3.0], "openvino": [8.0] * 3}
    cells = [cell(("m135", "bf16", workload, peer), [quire] * 3, found) for peer, found in peers.items()]
    row = table(tmp_path, *cells)[workload]
    assert (row.best, row.pair.ratio, row.met) == (best, pytest.approx(ratio), met)
    assert row.pairs["llamacpp"].spread == pytest.approx(1.0)


def test_ratios_are_of_one_sitting(tmp_path: Path) -> None:
    """In a slow hour the better peer looks worse: only the ratios of each sitting tell."""
    cells = [cell(KEY, [5.0], [6.0]), cell((*KEY[:3], "vllm"), [10.0], [11.0])]
    row = table(tmp_path, *cells)["C1"]
    assert row.best == "vllm" and row.pair.ratio == pytest.approx(1.1) and row.pair.ours == 10.0


def test_start_up_shows_the_median_of_all_sittings(tmp_path: Path) -> None:
    figures = {"llamacpp": 1.7, "openvino": 1.2, "transformers": 1.3}
    cells = [cell(("m135", "bf16", "C5", peer), [ours], [2.0]) for peer, ours in figures.items()]
    row = table(tmp_path, *cells)["C5"]
    assert row.ours == 1.3 and "| 1.30 |" in report.table([row])


def test_targets_that_name_a_peer_and_start_up_have_their_own_yardstick(tmp_path: Path) -> None:
    keys = [("m1b", "int8", "C2", peer) for peer in ("llamacpp", "openvino")]
    row = table(tmp_path, cell(keys[0], [14.0], [20.0]), cell(keys[1], [14.0], [10.0]))["C2"]
    assert (row.best, row.pair.ratio, row.met) == ("openvino", 1.4, True)
    keys = [("m135", "bf16", "C5", peer) for peer in ("llamacpp", "transformers")]
    found = table(tmp_path, cell(keys[0], [1.3], [0.2]), cell(keys[1], [1.3], [2.6]))
    assert found["C5"].best == "transformers" and "memory" not in found
    text = report.table([found["C5"]])
    assert "| C5, s | 1.30 | 0.20 (0.15x) | 2.60 (2.00x) * | 2.00x | 2.00x (1.30): met |  | 0%, 0.0 |" in text


def test_memory_is_told_after_c2(tmp_path: Path) -> None:
    row = table(tmp_path, cell(("m135", "bf16", "C2", "llamacpp"), [600.0], [708.0]))["memory"]
    assert row.best == "llamacpp" and row.pair.ratio == pytest.approx(1.18) and row.met


def test_the_picture_has_a_line_for_each_workload_and_is_the_same_each_time(tmp_path: Path) -> None:
    plot = pytest.importorskip("benchmarks.cpu.plot")
    pytest.importorskip("matplotlib")
    cells = [cell(("m135", "bf16", name, "vllm"), [2.0], [4.0]) for name in workloads.NAMES]
    rows = list(table(tmp_path, *cells).values())
    for name in ("a.svg", "b.svg"):
        plot.draw(rows, tmp_path / name)
    drawn = (tmp_path / "a.svg").read_text()
    assert drawn == (tmp_path / "b.svg").read_text()
    titles = ("one request", "many requests", "long prompt", "shared prefix", "start")
    assert all(f"{title}, 135M bf16: 2.00 " in drawn for title in titles) and "memory" not in drawn


def test_bounds() -> None:
    shape, requests = models.SHAPES["m135"], workloads.build("C3", "m135", 0)
    weights = shape.block_weights + shape.embedding_weights
    assert sum(a * b for a, b in (s for s in shape.tensors().values() if len(s) == 2)) == weights
    bound = report.bound(shape, "bf16", "C1", [], CEILINGS)
    assert bound == (pytest.approx(2 * weights / 80e9 * 1000), "bytes")
    assert report.bound(shape, "int4", "C1", [], CEILINGS) == (pytest.approx(weights / 2 / 80e9 * 1000), "bytes")
    operations = 2 * (shape.block_weights * 2048 + shape.embedding_weights)
    assert report.bound(shape, "bf16", "C3", requests, CEILINGS) == (pytest.approx(operations / 1e12), "operations")
    two = [Request([1] * 4, 8), Request([2] * 4, 2)]
    rate = 10 / (8 * weights / 80e9)
    assert report.bound(shape, "int8", "C2", two, CEILINGS) == (pytest.approx(rate), "bytes")
    half = report.bound(shape, "int8", "C3", requests, CEILINGS)
    assert half == (pytest.approx(operations / 2e12), "operations")
    assert report.bound(shape, "bf16", "C5", two, CEILINGS) is None


def test_a_runner_that_dies_says_why() -> None:
    with (
        Runner(Path(sys.executable), "benchmarks.cpu.no_such_module", {}, {}) as runner,
        pytest.raises(PeerError, match=r"status 1.*no_such_module"),
    ):
        runner.wait_ready()
