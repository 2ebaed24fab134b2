"""Compiles csrc/cpu to one shared library with the system's C++ compiler.

    python csrc/build.py [--sanitize] OUTPUT

Owns: the flags. Each level of instructions is a translation unit of its own; a level that the compiler does not know is
left out. With --sanitize the C++ tests are compiled instead, with AddressSanitizer and UBSan. No dependencies, so that
the package's build can run it before anything is installed.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "cpu"
# No -ffast-math: NaN must survive.
FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra"]
FAST = ["-O3"]
SANITIZED = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mprfchw", *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni", "bf16"))]
# gcc 12's own AVX-512 header warns about itself.
_QUIET = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
LEVELS = {"portable": [], "avx2": _AVX2, "avx512": [*_AVX512, *_QUIET]}


class NoCompilerError(Exception):
    """There is no C++ compiler, or it cannot compile the portable level."""


def compiler() -> str:
    """The C++ compiler: $CXX, else the first of the usual names."""
    for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++"):
        if name and (path := shutil.which(name)):
            return path
    raise NoCompilerError("no C++ compiler was found (g++, clang++, c++ or $CXX)")


def build(output: Path, sanitize: bool = False) -> list[str]:
    """Compiles to `output`; returns the levels that are in it."""
    cxx = compiler()
    flags = [*FLAGS, *(SANITIZED if sanitize else FAST)]
    wanted = LEVELS if platform.machine() in ("x86_64", "AMD64") else {"portable": []}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as threads:

        def compile_one(name: str, extra: list[str]) -> subprocess.CompletedProcess[str]:
            command = [cxx, *flags, *extra, "-c", str(SOURCES / f"{name}.cpp"), "-o", f"{folder}/{name}.o"]
            return subprocess.run(command, capture_output=True, text=True, check=False)

        tried = {level: threads.submit(compile_one, f"level_{level}", extra) for level, extra in wanted.items()}
        results = {level: future.result() for level, future in tried.items()}
        done = [level for level, result in results.items() if result.returncode == 0]
        defines = [f"-DQR_WITH_{level.upper()}" for level in done]
        names = ["pool", "test"] if sanitize else ["pool"]
        results |= {name: compile_one(name, defines) for name in names}
        for name in ("portable", *names):
            if results[name].returncode:
                raise NoCompilerError(f"{cxx} cannot compile {name}.cpp: {results[name].stderr.strip()[-2000:]}")
        for result in results.values():
            sys.stderr.write(result.stderr)
        objects = [f"{folder}/{name}.o" for name in [*(f"level_{level}" for level in done), *names]]
        output.parent.mkdir(parents=True, exist_ok=True)
        made = Path(folder) / output.name  # moved into place whole: a process may be loading the old one
        link = [cxx, *flags, *([] if sanitize else ["-shared"]), *objects, "-o", str(made)]
        linked = subprocess.run(link, capture_output=True, text=True, check=False)
        if linked.returncode:
            raise NoCompilerError(f"{cxx} cannot link: {linked.stderr.strip()[-2000:]}")
        staged = output.with_name(f".{output.name}.{os.getpid()}")
        shutil.copy2(made, staged)
        os.replace(staged, output)
    return done


def main() -> None:
    arguments = sys.argv[1:]
    sanitize = "--sanitize" in arguments
    (output,) = (argument for argument in arguments if argument != "--sanitize")
    try:
        print(f"{output}: {', '.join(build(Path(output), sanitize))}")
    except NoCompilerError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
