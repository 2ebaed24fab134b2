"""The GPU benchmark, as far as it goes without one: whose rounds are dropped, the bounds, the report, a real server."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from benchmarks.gpu import offline, report, run, serve, startup, workloads
from benchmarks.gpu.bounds import Ceilings, bound
from benchmarks.gpu.run import Stage, allot, stages

H200 = Ceilings(4615e9, 792e12)
RECORDED = json.loads(report.RECORDED.read_text())
TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 32,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "intermediate_size": 48, "vocab_size": 12_000, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
    "max_position_embeddings": 1024, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize(
    ("workload", "model", "expected"),
    [
        ("W3", "qwen06", 0.26),
        ("W3", "l1b", 0.54),
        ("W3", "l8b", 3.26),
        ("W7_64", "l8b", 3.72),
        ("W7_256", "l8b", 5.11),
        ("W4_1x8192", "l8b", 132e12 / 792e12),
    ],
)
def test_bounds_of_an_h200(workload: str, model: str, expected: float) -> None:
    assert bound(workload, model, H200) == pytest.approx(expected, rel=0.02)


def test_no_recorded_figure_beats_its_bound() -> None:
    for workload, models in RECORDED["figures"].items():
        for model, known in models.items():
            limit = bound(workload, model, H200)
            for figure in [*known["vllm"], *(known[k] for k in ("target", "stretch") if k in known)]:
                assert limit is None or report.METRICS[workload].ratio(figure, limit) < 1, (workload, model)
    assert set(RECORDED["figures"]) == set(report.METRICS)


def result() -> dict[str, Any]:
    """What a run of one model writes, in which the server failed."""
    spread = {"p50": 28.0, "p99": 11.5}
    return {
        "date": "2026-11-20 12:00 UTC", "minutes": 9, "seconds": 480.0, "errors": {"serve l8b": "it ended"},
        "machine": {"gpu": "NVIDIA H200", "cpu": "a processor", "cores": 16}, "versions": {"quire": "1"},
        "ceilings": {"copy_gb_s": 4278.0, "read_gb_s": 4615.0, "bf16_tflop_s": 792.0, "host_score": 20.0},
        "startup": {"l8b": {"cold": {"engine_ready_s": 20.0}, "warm": {"engine_ready_s": 6.0}}},
        "offline": {"l8b": {
            "tests": {"W1": {"seconds": [12.0], "output_tokens_per_s": 11_000.0}, "W6_new": {"seconds": [0.7, 0.6, 1]}},
            "steps": {"W7_64": {"ms_per_step": 5.0, "graph_ms": 4.5, "host_ms": 1.25}, "W3": {"ms_per_step": 4.4}},
        }},
        "serve": {"l8b": {"loads": {"20": {"ttft_ms": spread, "itl_ms": spread, "output_tokens_per_s": 2500.0}}}},
    }  # fmt: skip


def test_the_table_says_what_was_reached() -> None:
    found = {row.workload: row for row in report.rows(result(), RECORDED)}
    assert list(found) == ["W1", "W3", "W7_64", "W6_new", "W8_20_ttft", "W8_20_itl", "W5_cold", "W5_warm"]
    assert found["W6_new"].value == 0.7 and found["W6_new"].met
    assert found["W8_20_ttft"].value == 28.0 and found["W8_20_itl"].value == 11.5
    assert [name for name, row in found.items() if row.met is False] == ["W3", "W5_cold"]
    row = found["W7_64"]
    assert row.share == pytest.approx(3.72 / 5.0, rel=0.01) and row.idle == pytest.approx(0.1)
    share = found["W1"].share
    assert share is not None and 0.5 < share < 0.6
    text = report.text(result(), RECORDED)
    line = (
        "| W7, ms per step, batch 64 | Llama-3.1-8B | 5.000 | 5.100: met | 6.010 | 1.20x | 3.718 | 74% | 10% | 1.25 |"
    )
    assert line in text
    assert "6 of 8 targets that were measured are met; there are 27 in all." in text
    assert "serve l8b failed: it ended" in text and "read 4,615 GB/s" in text


def test_without_ceilings_there_is_no_bound() -> None:
    found = report.rows(result() | {"ceilings": None}, RECORDED)
    assert found and all(row.bound is None and row.share is None for row in found)


def test_the_page_keeps_what_is_around_the_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n")
    for part in ("one", "two"):
        report.write_page(page, part)
    assert page.read_text() == f"before\n\n{report.BEGIN}\n\ntwo\n\n{report.END}\n\nafter\n"
    page.write_text("no marks")
    with pytest.raises(ValueError, match="add them where the table is to be"):
        report.write_page(page, "three")
    performance = Path(__file__).parents[2] / "docs" / "performance.md"
    assert report.BEGIN in performance.read_text() and report.END in performance.read_text()


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("one.svg", "two.svg"):
        report.draw(report.rows(result(), RECORDED), tmp_path / name)
    drawn = (tmp_path / "one.svg").read_text()
    assert drawn == (tmp_path / "two.svg").read_text()
    assert "W7, ms per step, batch 64: 5.000" in drawn and "what the machine allows" in drawn


def test_short_minutes_drop_rounds_and_no_workload() -> None:
    todo = stages(list(workloads.MODELS))
    assert {stage.key[0] for stage in todo} == {"ceilings", "startup", "offline", "prefill", "serve"}
    least, most = sum(stage.least for stage in todo), sum(stage.most for stage in todo)
    for minutes in (least + 1, (least + most) / 2, most, most + 100):
        left = minutes
        for i, stage in enumerate(todo):
            should, limit = allot(left, stage, todo[i + 1 :])
            assert stage.least <= should <= min(stage.most, limit) + 1e-6
            left -= should
        assert left == pytest.approx(max(0, minutes - most))
    should, limit = allot(30.0, todo[0], todo[1:])
    assert should == todo[0].least == limit  # far too short: one after the other, as far as it goes


def test_a_stage_that_fails_and_one_that_hangs_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Stage(("offline", "l1b"), 0, 0, lambda seconds: ["offline", "--model=none"])
    plan = [broken, Stage(("startup", "l1b"), 0, 0, lambda seconds: ["startup", "--cache=.", "--models", "l1b"])]
    monkeypatch.setattr(run, "stages", lambda models: plan)
    monkeypatch.setattr(run, "GRACE", 0)
    monkeypatch.setattr(run, "allot", lambda left, stage, later: (1.0, 30.0 if stage is broken else 0.01))
    found = run.main(["--json", str(tmp_path / "new" / "gpu.json"), "--minutes", "1"])
    assert found["errors"]["offline l1b"] == "it ended with status 2"
    assert found["errors"]["startup l1b"].startswith("it was ended after 0 s")
    assert json.loads((tmp_path / "new" / "gpu.json").read_text()) == found
    assert run.main(["--json", str(tmp_path / "gpu.json"), "--minutes", "0"])["errors"] == {
        "offline l1b": "no time was left", "startup l1b": "no time was left"
    }  # fmt: skip


class Clock:
    """An engine whose calls take as long as they make tokens, on a clock of its own."""

    now = 0.0

    def __init__(self, **options: Any) -> None:
        assert options["load_format"] == "dummy" and options["skip_tokenizer_init"]
        self.calls: list[tuple[int, int]] = []

    def generate(self, prompts: Sequence[dict[str, list[int]]], params: Sequence[Any], use_tqdm: bool) -> list[Any]:
        self.calls.append((len(prompts), params[0].max_tokens))
        Clock.now += max(each.max_tokens for each in params) / 1e3
        return [
            SimpleNamespace(outputs=[SimpleNamespace(token_ids=[0] * each.max_tokens)])
            for _, each in zip(prompts, params, strict=True)
        ]

    def reset_prefix_cache(self) -> None:
        pass


def test_offline_rounds_are_in_turns_and_end_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ModuleType("an_engine")
    engine.LLM, engine.SamplingParams, engine.__version__ = Clock, SimpleNamespace, "1"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "an_engine", engine)
    monkeypatch.setattr(offline.time, "perf_counter", lambda: Clock.now)
    bench = offline.Bench("an_engine", "l1b", {}, tmp_path / "out.json")
    tests = [*bench.w3(), *bench.w7()]
    # A round of W3 and W7 takes 3 x 0.257 s: the second W7 of the second round would end too late, and all after it.
    bench.measure(tests, Clock.now + 5 * 0.257 + 0.1)
    kept = json.loads((tmp_path / "out.json").read_text())
    assert {name: len(found["seconds"]) for name, found in kept["tests"].items()} == {
        "W3_1": 2, "W3": 2, "W7_64_1": 2, "W7_64": 2, "W7_256_1": 1, "W7_256": 1
    }  # fmt: skip
    assert kept["steps"]["W7_256"] == {"ms_per_step": 1.0}
    assert kept["tests"]["W7_64"]["output_tokens_per_s"] == 64_000
    assert kept["tests"]["W7_64"]["tokens_per_s"] == 96_000
    bench.measure(tests[:1], Clock.now - 1)
    assert len(bench.runs["W3"]) == 3  # out of time: once all the same


@pytest.mark.slow
def test_a_server_and_a_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(workloads.MODELS, "tiny", TINY)
    monkeypatch.setattr(serve, "WARM_UP", 2)
    more = ["--kv-cache-memory-bytes=50M", "--max-model-len=256"]
    out = tmp_path / "serve.json"
    found = serve.run("tiny", more, (20, 0.5), 1, 6, (40, 5), out)
    assert json.loads(out.read_text()) == found and found["ready_s"] > 0
    loads = found["loads"]
    assert {name: (load["requests"], load["completed"]) for name, load in loads.items()} == {
        "20": (20, 20), "0.5": (1, 1), "burst": (6, 6)
    }  # fmt: skip
    assert loads["20"]["output_tokens"] == 100 and loads["20"]["prompt_tokens"] == 800
    assert 1 <= loads["20"]["tokens_per_event"] <= 5 and loads["20"]["ttft_ms"]["p50"] > 0
    cache = tmp_path / "cache"
    (cache / "old").mkdir(parents=True)
    phases = startup.run("tiny", cache, 1, more)
    assert not (cache / "old").exists() and set(phases) == {"cold", "warm"}
    for times in phases.values():
        assert 0 < times["import_quire_s"] < times["engine_ready_s"] <= times["first_token_s"]
