"""The house rules that no linter knows: generated pages, environment variables, where mutable state may be."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from quire.utils.environment import ENVIRONMENT

ROOT = Path(__file__).resolve().parents[2]


def test_generated_pages_are_up_to_date_and_links_lead_somewhere() -> None:
    done = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"],
        cwd=ROOT,
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_environment_variables_are_few_and_listed() -> None:
    assert len(ENVIRONMENT) <= 5
    used: set[str] = set()
    for file in (ROOT / "src").rglob("*.py"):
        used |= set(re.findall(r"\bQUIRE_[A-Z][A-Z_]*\b", file.read_text(encoding="utf-8")))
    assert used == set(ENVIRONMENT)


def test_importing_quire_imports_no_torch() -> None:
    code = "import sys, quire; assert not {'torch', 'numpy', 'transformers', 'tokenizers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


def test_public_names_exist() -> None:
    import quire

    for name in quire.__all__:
        assert getattr(quire, name) is not None
