"""The commands that talk to a server."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from servers import Server


def quire(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "quire", *args], capture_output=True, text=True, timeout=120)


def test_complete_and_chat(server: Server) -> None:
    done = quire("complete", "--url", server.url, "The capital of France is", "--max-tokens=3", "--temperature=0")
    assert done.stdout.startswith(" Paris"), done.stderr
    done = quire("chat", f"--url={server.url}/v1", "--message=What is the opposite of hot?", "--temperature=0")
    assert "> What is the opposite of hot?" in done.stdout and "cold" in done.stdout.lower(), done.stderr
    refused = quire("complete", "--url", server.url, "x", "--temperature=7")
    assert refused.returncode == 1 and "temperature" in refused.stderr and "Traceback" not in refused.stderr
    nobody = quire("complete", "--url=localhost:1", "x")
    assert nobody.returncode == 1 and "no server answers" in nobody.stderr


@pytest.mark.parametrize(
    "load",
    [
        ["--max-concurrency=4", "--random-range-ratio=0.5"],
        ["--request-rate=40"],
        ["--dataset-name=sharegpt", "--endpoint=/v1/chat/completions", "--output-len=8"],
    ],
)
def test_bench_serve(server: Server, load: list[str], tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "What is the opposite of hot?"}, {"from": "gpt", "value": "It is cold."}]
    (tmp_path / "share.json").write_text(json.dumps([{"conversations": turns}, {"conversations": []}]))
    if "--dataset-name=sharegpt" in load:
        load = [*load, f"--dataset-path={tmp_path / 'share.json'}"]
    out = tmp_path / "result.json"
    done = quire(
        "bench", "serve", "--url", server.url, "--num-prompts=12", "--input-len=16", "--output-len=8", *load,
        f"--output-json={out}",
    )  # fmt: skip
    result = json.loads(done.stdout)
    assert result == json.loads(out.read_text()) and done.returncode == 0
    assert result["completed"] == 12 and result["failed"] == 0
    if "--random-range-ratio=0.5" in load:
        assert 12 * 4 <= result["output_tokens"] <= 12 * 12 and result["output_tokens"] != 96
    else:
        assert result["output_tokens"] == 96
    for name in ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms"):
        assert 0 < result[name]["p50"] <= result[name]["p99"] <= result[name]["max"]


def test_bench_counts_failures(server: Server) -> None:
    done = quire("bench", "serve", "--url", server.url, "--num-prompts=3", "--input-len=600", "--output-len=8")
    result = json.loads(done.stdout)
    assert done.returncode == 1 and result["failed"] == 3 and "600 tokens" in next(iter(result["errors"]))


def test_serve_ends_by_ctrl_c() -> None:
    server = Server(module="quire.entrypoints.api_server")
    assert server.stop(signal.SIGINT) == 0
