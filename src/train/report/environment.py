"""The environment of a run: versions, the machine, and the memory of the process."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import sys
from typing import Any

import torch

from ...memory.meter import process_status


def versions() -> dict[str, str]:
    """The versions that matter for a run."""
    result = {"python": platform.python_version()}
    for name in ("fusewright", "torch", "transformers", "peft", "accelerate", "triton"):
        try:
            result[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            result[name] = "not installed"
    return result


def machine() -> dict[str, Any]:
    """The machine: system, cores, threads, GPU."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def peak_rss_mb() -> float:
    """Largest resident memory of this process so far, in MiB."""
    if (peak := process_status("VmHWM")) is not None:
        return peak / 2**20
    # on Linux this would count the peak of the process that started this one, too
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest / 2**20 if sys.platform == "darwin" else highest / 2**10


def memory() -> dict[str, float]:
    """The peaks of this process so far, in MiB: ``rss_mb``, and ``cuda_mb`` on a GPU."""
    peaks = {"rss_mb": peak_rss_mb()}
    if torch.cuda.is_available():
        peaks["cuda_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return peaks


def rss_mb() -> float:
    """Resident memory of this process now, in MiB."""
    import psutil

    return float(psutil.Process().memory_info().rss) / 2**20
