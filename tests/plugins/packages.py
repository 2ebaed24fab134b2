"""Packages that are installed for a test: modules and a .dist-info in a folder, as pip leaves them."""

from __future__ import annotations

import tomllib
from pathlib import Path
from textwrap import dedent


def install(folder: Path, name: str, points: dict[str, dict[str, str]], **modules: str) -> Path:
    """`points`: group -> name of an entry point -> target. `modules`: source by path without `.py`."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"[{group}]\n" + "".join(f"{n} = {v}\n" for n, v in found.items()) for group, found in points.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))
    for module, source in modules.items():
        file = (folder / module).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(dedent(source))
    return folder


def install_project(folder: Path, project: Path) -> Path:
    """Installs a project as an editable install does: metadata out of its pyproject.toml, modules where they are. The
    folder and the project's `src` must be on the path."""
    about = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    info = folder / f"{about['name'].replace('-', '_')}-{about['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {about['name']}\nVersion: {about['version']}\n")
    lines = [
        f"[{group}]\n" + "".join(f"{n} = {v}\n" for n, v in p.items()) for group, p in about["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return folder
