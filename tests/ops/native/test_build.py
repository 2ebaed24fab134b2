"""The build: the C++ tests under sanitizers, and a machine without a compiler, where quire is pure Python."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from quire.ops.native.library import load

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


class Hook:
    """What hatchling's hook brings, where hatchling is only in the environment that a build has to itself."""

    def __init__(self, root: Path) -> None:
        self.root, self.app, self.said = str(root), self, list[str]()

    def display_warning(self, text: str) -> None:
        self.said.append(text)


def test_an_install_without_a_compiler_is_pure_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    library = tmp_path / "src" / "quire" / "ops" / "native" / "libquire.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"of an older build")
    hatchling: Any = ModuleType("hatchling.builders.hooks.plugin.interface")
    hatchling.BuildHookInterface = Hook
    for name in ("", ".builders", ".builders.hooks", ".builders.hooks.plugin"):
        monkeypatch.setitem(sys.modules, f"hatchling{name}", ModuleType(f"hatchling{name}"))
    monkeypatch.setitem(sys.modules, hatchling.__name__, hatchling)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    hook = runpy.run_path(str(ROOT / "hatch_build.py"))["NativeLibrary"](tmp_path)
    wheel: dict[str, Any] = {"artifacts": []}
    hook.initialize("standard", wheel)
    assert wheel == {"artifacts": []}, "a wheel for any platform"
    assert not library.exists()
    (said,) = hook.said
    assert "without its native CPU library" in said and "no C++ compiler" in said


RUN = """
import sys
from pathlib import Path
from quire.ops.native import library
if sys.argv[1] == "without":
    library.FILE = Path(sys.argv[0]).with_name("nothing.so")
from quire import LLM, SamplingParams
from quire.cli.main import main
params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
with LLM("demo", dtype="float32", max_model_len=128) as llm:
    for output in llm.generate(["The cat", "One day, a big dog"], params, use_tqdm=False):
        print(output.outputs[0].token_ids)
sys.argv[1:] = ["env"]
main()
"""


@pytest.mark.skipif(isinstance(load(), str), reason=str(load()))
def test_without_the_library_everything_works() -> None:
    found: dict[str, tuple[list[str], str]] = {}
    for kind in ("with", "without"):
        command = [sys.executable, "-c", RUN, kind]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        lines = done.stdout.splitlines()
        found[kind] = lines[:2], "\n".join(lines[2:])
    assert found["with"][0] == found["without"][0], "the same tokens"
    assert "is not built" not in found["with"][1]
    assert "is not built" in found["without"][1], "`quire env` says why"
