"""The CPU benchmark: quire's runner on a tiny model through the code that measures, and the report's arithmetic."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks.cpu import models, report, run, workloads
from benchmarks.cpu.driver import Memory, PeerError, Runner
from benchmarks.cpu.report import Result
from benchmarks.cpu.workloads import Request, Timing

TINY = models.Shape(hidden=32, layers=1, heads=2, kv_heads=1, intermediate=48, vocab=20_000, theta=1e4, head=16)
CEILINGS = {"read_gb_s": 80.0, "bf16_gflop_s": 1000.0}


def test_a_run_of_quire_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(models.SHAPES, "tiny", TINY)
    monkeypatch.setattr(run, "ceilings", lambda threads: CEILINGS)
    options = ["--models", "tiny", "--precisions", "bf16", "--workloads", "C1", "--peers", "quire", "llamacpp"]
    done = run.main([*options, "--repeats", "2", "--quiet", "0", "--threads", "1", "--cache", str(tmp_path)])
    (row,) = done.rows
    assert row.values.keys() == {"quire"} and row.values["quire"] > 0
    assert row.best is None and row.ratio is None and row.met is None
    assert done.skipped[0].startswith("llama.cpp: not installed")
    written: dict[str, Any] = json.loads((tmp_path / "cpu.json").read_text())
    (result,) = written["results"]
    assert len(result["rounds"]) == 2 and result["memory"]["peak"] > result["memory"]["anonymous"] > 10
    assert written["rows"][0]["bound"] == pytest.approx(report.bound(TINY, "bf16", "C1", [], CEILINGS)[0])  # type: ignore[index]
    assert "C1, ms per token" in capsys.readouterr().out


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


def result(peer: str, name: str, *values: float) -> Result:
    return Result(peer, [{name: value} for value in values], Memory(values[0], 0, 0))


@pytest.mark.parametrize(
    ("workload", "quire", "best", "ratio", "met"),
    [("C1", 5.0, "llamacpp", 1.2, False), ("C1", 4.0, "llamacpp", 1.5, True), ("C2", 5.0, "openvino", 5 / 8, False)],
)
def test_ratios_and_targets(workload: str, quire: float, best: str, ratio: float, met: bool) -> None:
    name = report.METRICS[workload].name
    peers = [result("llamacpp", name, 9.0, 6.0, 3.0), result("openvino", name, 8.0)]
    row = report.row("m135", "bf16", workload, [result("quire", name, quire), *peers])
    assert (row.best, row.ratio, row.met) == (best, pytest.approx(ratio), met)
    assert row.spread == pytest.approx(1.0)


def test_targets_that_name_a_peer_and_start_up_have_their_own_yardstick() -> None:
    name = report.METRICS["C2"].name
    found = [result("quire", name, 14.0), result("llamacpp", name, 20.0), result("openvino", name, 10.0)]
    row = report.row("m1b", "int8", "C2", found)
    assert (row.best, row.ratio, row.met) == ("openvino", 1.4, True)
    name = report.METRICS["C5"].name
    found = [result("quire", name, 1.3), result("llamacpp", name, 0.2), result("transformers", name, 2.6)]
    assert report.row("m135", "bf16", "C5", found).best == "transformers"
    memory = report.memory_row("m135", "bf16", found)
    assert memory.best == "llamacpp" and memory.ratio == pytest.approx(0.2 / 1.3) and memory.met is False
    text = report.table([report.row("m135", "bf16", "C5", found), memory])
    assert "| C5, s | 1.30 | 0.20 | 2.60 * | 2.00x | 2.00x (1.30): met |" in text


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
    assert report.bound(shape, "bf16", "C5", two, CEILINGS) is None


def test_a_runner_that_dies_says_why() -> None:
    with (
        Runner(Path(sys.executable), "benchmarks.cpu.no_such_module", {}, {}) as runner,
        pytest.raises(PeerError, match=r"status 1.*no_such_module"),
    ):
        runner.wait_ready()
