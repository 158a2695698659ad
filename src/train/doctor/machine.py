"""The hardware: GPUs, the CPU with its instructions, and the free memory."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from ...memory.meter import Meter
from ..report.format import memory
from .result import USERS_CACHE, CheckResult


def machine() -> list[CheckResult]:
    """The GPUs, the CPU, the memory, and the dtype that ``bf16: auto`` means here."""
    import torch

    return [*_gpus(torch), *_cpu(torch), _memory(torch), _precision()]


def _gpus(torch: Any) -> list[CheckResult]:
    if not torch.cuda.is_available():
        return [_no_gpu(torch)]
    results = []
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        free, total = torch.cuda.mem_get_info(i)
        sizes = f"{memory(total / 2**20)}, {memory(free / 2**20)} free"
        results.append(
            CheckResult(f"GPU {i}", f"{about.name}, {sizes}", note=f"sm_{about.major}{about.minor}")
        )
    return results


def _no_gpu(torch: Any) -> CheckResult:
    """Why PyTorch sees no GPU: there is none, or it was built without them."""
    driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi")
    if not driver:
        return CheckResult("GPU", "none", "unused", "training runs on the CPU")
    if torch.version.cuda is None:
        note = f"there is an NVIDIA driver, but torch {torch.__version__} is a build for the CPU"
        mend = (
            "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130"
        )
        return CheckResult("GPU", "not used", "missing", note, mend)
    note = "there is an NVIDIA driver, but PyTorch finds no device"
    return CheckResult(
        "GPU", "not used", "broken", note, "run nvidia-smi to see what the driver finds"
    )


def _cpu(torch: Any) -> list[CheckResult]:
    from ...kernels.processor import limits, model_name, processor

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = f"{usable} of {os.cpu_count()} cores usable; threads: {torch.get_num_threads()}"
    has = ", ".join(processor().instructions()) or "none of AVX2, AVX-512, AMX"
    narrowed = f"as {' and '.join(limits())} has it" if limits() else ""
    result = CheckResult("instructions", has, note=narrowed)
    return [CheckResult("CPU", model_name(), note=cores), result, *_kept()]


def _kept() -> list[CheckResult]:
    """Report the libraries, verdicts and choices that later processes reuse; nothing if none."""
    from ...kernels.native.build import kept_folder

    try:
        folder = kept_folder(os.environ.get(USERS_CACHE), make=False)
        names = [path.name for path in folder.glob("*")]  # of none, if it is not there yet
    except (OSError, RuntimeError):  # the compiler's line says why
        return []
    counts = (
        (sum(name.endswith(".so") for name in names), "libraries"),
        (sum(name.startswith("verdict-") for name in names), "verdicts"),
        (sum(name.startswith("choice-") for name in names), "choices"),
    )
    value = ", ".join(f"{number} {what}" for number, what in counts)
    return [CheckResult("kept for later processes", value, note=str(folder))]


def _memory(torch: Any) -> CheckResult:
    free = Meter(torch.device("cpu")).host()
    if not free:
        return CheckResult("memory", "unknown", "unused")
    return CheckResult(
        "memory", f"{memory(free / 2**20)} free", note="within the container's limit"
    )


def _precision() -> CheckResult:
    from ..model.precision import dtype_for_training, has_bfloat16

    name = str(dtype_for_training("auto")).removeprefix("torch.")
    note = (
        "" if has_bfloat16() else "the CPU has no bfloat16 instructions: it spares memory, not time"
    )
    return CheckResult("bf16: auto", name, note=note)
