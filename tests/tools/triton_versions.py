"""Compile every kernel ahead of time with other versions of Triton, for cards that are not here.

    python -m tests.tools.triton_versions 3.6.0 3.9.0 [PYTEST ARGUMENTS ...]

Each version is installed into a folder of its own, which is deleted again, and takes some minutes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = "tests/kernels/test_triton_aot.py"


def compiles(version: str, arguments: list[str]) -> bool:
    """Whether all cases compile with that version of Triton."""
    with tempfile.TemporaryDirectory(prefix="triton-") as folder:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*install, "--target", folder, f"triton=={version}"], check=True)
        path = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": path, "TRITON_CACHE_DIR": f"{folder}/cache"}
        ask = [sys.executable, "-c", "import triton; print(triton.__version__)"]
        said = subprocess.run(ask, capture_output=True, text=True, check=True, env=environment)
        assert said.stdout.strip() == version, said.stdout
        print(f"=== Triton {version}", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", "-n0", "-m", "", *(arguments or [TESTS])]
        return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0


def main(arguments: list[str]) -> int:
    """0 when every version compiles every case."""
    versions = [a for a in arguments if re.fullmatch(r"\d+\.\d+\.\d+", a)]
    rest = [a for a in arguments if a not in versions]
    failed = [version for version in versions if not compiles(version, rest)]
    print(f"=== failed: {', '.join(failed)}" if failed else f"=== passed: {', '.join(versions)}")
    return bool(failed) or not versions


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
