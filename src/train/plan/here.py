"""The devices of this machine."""

from __future__ import annotations

import re
import time
from dataclasses import replace

import psutil
import torch

from ...memory.meter import Meter
from .cards import CARDS, Card, Devices, of_size

CPU = "CPU"


def devices_here(dtype: torch.dtype, processes: int | None) -> Devices:
    """The GPUs of this machine; where there is none, its CPU.

    ``dtype`` is that of the products whose rate on the CPU is measured; ``processes`` train, by
    default one for each GPU.
    """
    if torch.cuda.is_available():
        return Devices(processes or torch.cuda.device_count(), _gpu())
    return Devices(processes or 1, _cpu(dtype, processes or 1))


def _gpu() -> Card:
    """The first GPU: as fast as the card of its name, or of its size."""
    properties = torch.cuda.get_device_properties(0)
    name = str(properties.name)
    words = re.split(r"[\s-]+", name.lower().replace("rtx ", "rtx"))
    like = next((card for card in CARDS.values() if card.name.lower() in words), None)
    if like is not None:
        return replace(like, name=name, memory=int(properties.total_memory))
    return replace(of_size(properties.total_memory, name), name=name)


def _cpu(dtype: torch.dtype, processes: int) -> Card:
    """The CPU, for one of several processes that share its cores and its memory."""
    capacity = Meter(torch.device("cpu")).capacity() or psutil.virtual_memory().total
    return Card(CPU, capacity // processes, _rate(dtype) / processes, 20e9, 5e9, 1e9)


def _rate(dtype: torch.dtype) -> float:
    """Operations per second of matrix products: the best of five, a tenth of a second."""
    a, b = torch.ones(1024, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    a @ b
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best
