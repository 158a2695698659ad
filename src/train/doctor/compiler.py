"""The C++ compiler that Inductor uses on a CPU: found as Inductor finds it, and tried out."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from .result import RERUN, USERS_CACHE, CheckResult, reason

_PROGRAM = """
#include <Python.h>
#include <omp.h>
#include <cstdio>
int main() { return std::printf("%d", omp_get_max_threads() > 0 ? PY_MAJOR_VERSION : 0) != 1; }
"""
"""Needs what Inductor's kernels need: the headers of Python, and OpenMP."""

REINSTALL = "sudo apt-get install --reinstall g++ libc6-dev"
"""The remedy for a compiler that fails for an unknown reason."""

_MENDS = {
    "Python.h": "sudo apt-get install python3-dev",
    "omp": "sudo apt-get install g++ libgomp1 (for clang++: libomp-dev)",
    "": REINSTALL,
}
"""A word in the compiler's error -> the remedy."""

_SECONDS = 25
"""How long the compiler may take, and how long the program: together less than the check may."""

_EAGER = "blocks run in eager PyTorch (codegen: eager), which is slower"


def compiler() -> list[CheckResult]:
    """The compiler, tried out: it compiles a small program, which is run."""
    path = _path()
    if path is None:
        return [_missing()]
    try:
        with tempfile.TemporaryDirectory(prefix="fusewright-") as folder:
            failed = _try(path, Path(folder))
    except subprocess.TimeoutExpired as error:
        note = f"not finished after {error.timeout:.0f} seconds"
        return [CheckResult("C++ compiler", f"{path}: not known", "unknown", note, RERUN)]
    if failed is None:
        note = f"compiles and runs a program with OpenMP{_not_kept()}"
        return [CheckResult("C++ compiler", shutil.which(path) or path, note=note)]
    mend = next(line for word, line in _MENDS.items() if word in failed)
    note = f"{failed}; set codegen: eager until it works"
    return [CheckResult("C++ compiler", f"{path} fails", "broken", note, mend)]


def _not_kept() -> str:
    """Why what it compiles for this package does not outlive a process, if it does not."""
    try:
        from ...kernels.native.build import kept_folder
    except Exception:  # it imports a broken library, which another check reports
        return ""
    try:
        kept_folder(os.environ.get(USERS_CACHE), make=False)
    except (OSError, RuntimeError) as error:
        return f"; each process compiles the kernels for CPUs anew: {reason(error)}"
    return ""


def _path() -> str | None:
    try:
        from torch._inductor import cpp_builder
    except Exception:  # it imports a broken library, which another check reports
        return next(filter(shutil.which, ("g++", "clang++", "c++")), None)
    try:
        return cpp_builder.get_cpp_compiler()
    except Exception:  # InvalidCxxCompiler, whose module depends on the version
        return None


def _missing() -> CheckResult:
    import torch

    if torch.cuda.is_available():
        return CheckResult("C++ compiler", "none", "unused", "not needed: Triton compiles for GPUs")
    program = os.environ.get("CXX")
    if program is not None:
        note = f"the variable CXX names {program!r}, which does not run; {_EAGER}"
        mend = "unset CXX, or let it name a compiler that runs"
        return CheckResult("C++ compiler", "none", "missing", note, mend)
    mend = "sudo apt-get install g++, or set the variable CXX to another compiler"
    return CheckResult("C++ compiler", "none", "missing", _EAGER, mend)


def _try(path: str, folder: Path) -> str | None:
    """Compile and run the program; the first problem, or None. It may raise TimeoutExpired."""
    source, program = folder / "try.cpp", folder / "try"
    source.write_text(_PROGRAM)
    include = sysconfig.get_paths()["include"]
    steps = (
        [path, "-std=c++17", "-O1", "-fopenmp", f"-I{include}", str(source), "-o", str(program)],
        [str(program)],
    )
    for step in steps:
        try:
            process = subprocess.run(
                step, capture_output=True, text=True, check=False, timeout=_SECONDS
            )
        except OSError as error:
            return reason(error)
        if process.returncode:
            lines = [line for line in process.stderr.splitlines() if "error" in line]
            lines += process.stderr.splitlines()
            return lines[0][:200] if lines else f"{step[0]} ended with {process.returncode}"
    return None if process.stdout == "3" else f"the program printed {process.stdout!r}"
