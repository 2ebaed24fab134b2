"""The build: the C++ tests under sanitizers, and a machine without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
BUILD = [sys.executable, str(ROOT / "csrc" / "build.py")]


@pytest.mark.slow
def test_cpp_tests_under_sanitizers(tmp_path: Path) -> None:
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        pytest.skip("no C++ compiler")
    program = tmp_path / "test"
    built = subprocess.run([*BUILD, "--sanitize", str(program)], capture_output=True, text=True, check=False)
    if "cannot find -lasan" in built.stderr or "libclang_rt" in built.stderr:
        pytest.skip("the compiler has no sanitizer runtime")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_without_a_compiler_the_build_says_so(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "CXX"} | {"PATH": str(tmp_path)}
    command = [*BUILD, str(tmp_path / "libquire.so")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode != 0
    assert "no C++ compiler was found" in done.stderr
    assert not (tmp_path / "libquire.so").exists()
