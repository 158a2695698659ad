"""The versions of packages, and whether they are in the ranges that fusewright requires."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

from ...packages import PLAIN_EXTRAS, PURPOSES, install, install_command, package_ranges, untested
from .result import CheckResult

_OTHERS = ("tokenizers", "safetensors", "huggingface-hub", "deepspeed", "flash-attn")
"""Packages that fusewright works with and whose versions it does not limit."""


def packages() -> list[CheckResult]:
    """Python, the packages that fusewright names as its own needs, and some others."""
    results = [_python()]
    required = package_ranges()
    results += [_package(name, *requirement) for name, requirement in required.items()]
    for name in _OTHERS:
        if name not in required and (version := _version(name)) is not None:
            results.append(CheckResult(name, version))
    if (note := untested()) is not None:
        results.append(CheckResult("tested range", "left", note=note))
    return results


def _python() -> CheckResult:
    about: Any = importlib.metadata.metadata("fusewright")
    versions = str(about.get("Requires-Python", ""))
    version = platform.python_version()
    if versions and not _is_in(version, versions):
        mend = f"use a Python {versions}"
        return CheckResult("python", version, "broken", f"wanted: {versions}", mend, needed=True)
    return CheckResult("python", version, note=f"wanted: {versions}" if versions else "")


def _package(name: str, versions: str, extra: str) -> CheckResult:
    version, needed = _version(name), extra in PLAIN_EXTRAS
    note = f"wanted: {versions}" if versions else ""
    # PyTorch runs without Triton, and uses no kernel of it where there is no GPU
    needed = needed and name != "triton"
    if version is None:
        purpose = f"for {PURPOSES[extra]}" if extra in PURPOSES else ""
        note = "; ".join(filter(None, (note, purpose)))
        if name == "triton" and not _has_gpu():
            return CheckResult(name, "not installed", "unused", note)
        return CheckResult(name, "not installed", "missing", note, install(name), needed)
    if versions and not _is_in(version, versions):
        return CheckResult(
            name, version, "broken", f"{note}; this version is outside that range",
            install_command(name, versions), needed,
        )  # fmt: skip
    return CheckResult(name, version, note=note)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_in(version: str, versions: str) -> bool:
    """Whether a version is in a range; builds such as ``2.13.0+cpu`` and pre-releases count."""
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:
        return True
    return SpecifierSet(versions).contains(version, prereleases=True)


def _has_gpu() -> bool:
    torch: Any
    try:
        import torch

        return bool(torch.cuda.is_available())
    except Exception:  # which the check of imports reports
        return False
