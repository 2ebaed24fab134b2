"""What `import quire` costs: its cause is tested, not its seconds."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import quire


def run(code: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(Path(quire.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    return done.stdout.strip()


def test_import_is_lazy() -> None:
    heavy = ["torch", "transformers", "tokenizers", "numpy", "msgspec", "jinja2"]
    assert run(f"import sys, quire; print([m for m in {heavy} if m in sys.modules])") == "[]"


def test_parameters_need_no_torch() -> None:
    code = "import sys; from quire import SamplingParams, EngineArgs, LLM; print('torch' in sys.modules)"
    assert run(code) == "False"


def test_grammars_are_loaded_with_the_first_of_them() -> None:
    assert run("import sys, quire.runner.worker, quire.llm; print('llguidance' in sys.modules)") == "False"


@pytest.mark.parametrize("name", quire.__all__)
def test_names(name: str) -> None:
    assert getattr(quire, name) is not None
    assert name in dir(quire)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        _ = quire.nothing  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("sampling_params", ["SamplingParams", "BeamSearchParams", "RequestOutputKind"]),
        ("outputs", ["RequestOutput", "CompletionOutput"]),
        ("inputs", ["TextPrompt", "TokensPrompt"]),
    ],
)
def test_modules_that_code_for_vllm_imports(module: str, names: list[str]) -> None:
    found = importlib.import_module(f"quire.{module}")
    for name in names:
        assert getattr(found, name) is getattr(quire, name, getattr(found, name))
    assert quire.AsyncEngineArgs is quire.EngineArgs
