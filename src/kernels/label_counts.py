"""How many labels count, known on the host without waiting for the device.

A loss that knows how many rows count multiplies just these with a library's products. Asking the
device for that number would wait for all that is queued. But labels are known before the backbone
runs: the copy that is queued there arrives while the device is busy with the backbone.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

_LATEST = threading.local()


def send(labels: Any) -> None:
    """Queue a copy of a model's labels to the host, for ``expected``; forget those before."""
    forget()
    if type(labels) is not Tensor or labels.dim() < 1 or torch.compiler.is_compiling():
        return
    if not _is_on_gpu(labels):
        _LATEST.labels = labels.detach(), None
        return
    with torch.cuda.device(labels.device):
        if _is_capturing():  # what is replayed has other labels
            return
        host = torch.empty(labels.shape, dtype=labels.dtype, pin_memory=True)
        host.copy_(labels, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
    _LATEST.labels = host, arrived


def forget() -> None:
    """Keep no labels any more."""
    _LATEST.labels = None


def _is_on_gpu(labels: Tensor) -> bool:
    return labels.is_cuda


def expected(rows: int, ignore_index: int) -> int:
    """How many of ``rows`` labels count, if they are those that were sent, shifted; 0 if unknown.

    It is a guess: nothing says that they are. So only the speed of a result may depend on it.
    """
    host, arrived = getattr(_LATEST, "labels", None) or (None, None)
    if host is None or _is_capturing():
        return 0
    shifted = host[..., 1:]
    if rows not in (host.numel(), shifted.numel()):  # padded by one label, or without it
        return 0
    if arrived is not None:
        arrived.synchronize()
    return int((shifted != ignore_index).sum())


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
