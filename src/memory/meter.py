"""How much memory is in use, how much has been, and how much there is."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch

_PROCESS = Path("/proc/self")


class Meter:
    """Memory of one device: of the CPU the resident memory of this process, of a GPU PyTorch's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before: int | None = None

    def used(self) -> int:
        """Bytes in use now; 0 where that is not known."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return process_status("VmRSS") or 0

    def start(self) -> None:
        """Remember the peak so far. It is not set back: others may be measuring, too."""
        self._before = self._highest()

    def peak(self) -> int | None:
        """The most bytes in use since ``start``; None if there had been more before, or unknown."""
        now = self._highest()
        return None if now is None or self._before is None or now <= self._before else now

    def _highest(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return process_status("VmHWM")

    def capacity(self) -> int | None:
        """Bytes that this process can use in all: what it uses, and what is free; or None."""
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            return free + torch.cuda.memory_reserved(self.device)
        available = _available()
        return None if available is None else available + self.used()

    def host(self) -> int:
        """Bytes of the host's memory that are free for use; 0 where that is not known."""
        return _available() or 0


def process_status(field: str) -> int | None:
    """A field of ``/proc/self/status`` such as ``VmHWM``, in bytes; None where there is none."""
    with contextlib.suppress(OSError):
        for line in (_PROCESS / "status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None


def _available() -> int | None:
    """Bytes of memory that are free for use, within the limit of a container."""
    if sys.platform != "linux":
        return None
    sizes = []
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        sizes.append(next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable:")) * 1024)
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        sizes.append(limit - int((group / "memory.current").read_text()))
    return min(sizes) if sizes else None
