"""The sample plugin, as a user has it: its own tests, and its model served over HTTP from another process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "server"))

from packages import install_project
from servers import Server

ROOT = Path(__file__).parents[2]
ZEBRA = ROOT / "examples" / "plugins" / "zebra"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For processes that are started from here."""
    site = install_project(tmp_path / "site", ZEBRA)
    path = [str(site), str(ZEBRA / "src"), *(p for p in sys.path if p)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    yield


def test_the_model_is_short() -> None:
    assert len((ZEBRA / "src" / "quire_zebra" / "model.py").read_text().splitlines()) < 60


@pytest.mark.slow
def test_its_own_tests_pass(installed: None) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", str(ZEBRA)],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


@pytest.mark.slow
def test_its_model_is_served_over_http_with_the_engine_in_another_process(installed: None, tmp_path: Path) -> None:
    sys.path.insert(0, str(ZEBRA / "tests"))
    try:
        import zebra_checkpoint as zebra
    finally:
        sys.path.remove(str(ZEBRA / "tests"))
    weights = zebra.write(tmp_path / "zebra", max_position_embeddings=512)
    server = Server(f"--model={tmp_path / 'zebra'}", "--skip-tokenizer-init", "--served-model-name=zebra")
    try:
        assert server.engine().pid != server.process.pid
        prompt, new = [5, 9, 100, 7, 42, 3, 3, 77, 150, 12, 60], 12
        body = {"model": "zebra", "prompt": prompt, "max_tokens": new, "temperature": 0, "logprobs": 1}
        answer = server.post("/v1/completions", {**body, "ignore_eos": True, "return_token_ids": True})
        assert answer.status_code == 200, answer.text
        tokens = answer.json()["choices"][0]["token_ids"]
        best = zebra.logits(weights, [*prompt, *tokens])[len(prompt) - 1 : -1].argmax(-1).tolist()
        assert len(tokens) == new and tokens == best
        refused = server.post("/v1/completions", {**body, "prompt": "words"})
        assert refused.status_code == 400 and "tokenizer" in refused.text
    finally:
        assert server.stop() == 0, "".join(server.log)
