"""The package's build step: compiles the native library into the package where there is a C++ compiler.

Serves wheels and editable installs. Without a compiler the package is pure Python, says so once, and runs on PyTorch.
"""

from __future__ import annotations

import runpy
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LIBRARY = "src/quire/ops/native/libquire.so"


class NativeLibrary(BuildHookInterface):
    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        script = runpy.run_path(str(root / "csrc" / "build.py"))
        try:
            levels = script["build"](root / LIBRARY)
        except script["NoCompilerError"] as error:
            (root / LIBRARY).unlink(missing_ok=True)  # one of an older build would not fit
            self.app.display_warning(f"quire is installed without its native CPU library, and runs slower: {error}")
            return
        self.app.display_info(f"native CPU library: {', '.join(levels)}")
        build_data["artifacts"].append(LIBRARY)
        build_data["pure_python"] = False
        # No Python ABI in it: one wheel a platform.
        tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{tag}"
