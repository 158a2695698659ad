"""Copies between a device and the host, beside what the device computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Transfer:
    """A copy under way.

    Attributes:
        result: where it goes; to be read after ``Transport.wait`` only.
        done: what the device can wait for.
    """

    result: Tensor
    done: Any = None


class Transport(Protocol):
    """Copies tensors between a device and the host, beside what the device computes."""

    def out(self, t: Tensor) -> Transfer:
        """Begin to copy ``t`` to the host, in its own layout.

        Raises:
            RuntimeError: there is no such memory.
        """

    def back(self, host: Tensor, device: torch.device) -> Transfer:
        """Begin to copy ``host`` to ``device``.

        Raises:
            RuntimeError: there is no such memory.
        """

    def wait(self, transfer: Transfer, device: torch.device) -> None:
        """Let all that ``device`` is given to do from now on come after ``transfer``."""


class Copies:
    """Copies that have ended when they return: of a CPU, where they are good for tests alone."""

    def out(self, t: Tensor) -> Transfer:
        """A copy of ``t``."""
        return Transfer(torch.empty_like(t).copy_(t))

    def back(self, host: Tensor, device: torch.device) -> Transfer:
        """A copy of ``host``."""
        return Transfer(torch.empty_like(host).copy_(host))

    def wait(self, transfer: Transfer, device: torch.device) -> None:
        """Nothing is under way."""


class Streams:
    """Copies of a GPU, on a stream of their own, from and to pinned memory.

    All device memory belongs to the stream that computes. So PyTorch's allocator, which reuses
    memory in the order of that stream, cannot hand it out while a copy runs that the stream has
    been told to wait for.
    """

    def __init__(self) -> None:
        self._beside: dict[torch.device, torch.cuda.Stream] = {}

    def out(self, t: Tensor) -> Transfer:
        """Begin to copy ``t`` into pinned memory."""
        return self._copy(torch.empty_like(t, device="cpu", pin_memory=True), t, t.device)

    def back(self, host: Tensor, device: torch.device) -> Transfer:
        """Begin to copy pinned memory to ``device``."""
        return self._copy(torch.empty_like(host, device=device), host, device)

    def wait(self, transfer: Transfer, device: torch.device) -> None:
        """Let the stream that computes wait for the copy."""
        now = torch.cuda.current_stream(device)
        now.wait_event(transfer.done)
        if transfer.result.is_cuda:  # does nothing if it is that stream's memory, as it should be
            transfer.result.record_stream(now)

    def _copy(self, target: Tensor, source: Tensor, device: torch.device) -> Transfer:
        beside = self._beside.setdefault(device, torch.cuda.Stream(device))
        # after what made the source, and after whoever used the target's memory before
        beside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(beside):
            target.copy_(source, non_blocking=True)
            return Transfer(target, beside.record_event())


def transport_of(device: torch.device) -> Transport:
    """What copies tensors of ``device``."""
    return Streams() if device.type == "cuda" else Copies()
