"""What the processes have measured, brought together where their batches differ in size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class UnevenGather:
    """In place of ``accelerate``'s ``gather``, which needs as many rows of every process.

    The last batch of an epoch may have fewer rows, and a process may have none left: it then takes
    part with nothing.

    Args:
        counts: whether this process's batch counts.
    """

    def __init__(self, counts: Callable[[], bool]) -> None:
        self.counts = counts

    def __call__(self, values: Any, *args: Any, **kwargs: Any) -> Any:
        """The rows of all processes, one after the other; single values become rows.

        Args:
            values: a tensor, or tensors in tuples, lists and dicts.
            args: of ``accelerate``; without effect.
            kwargs: likewise.
        """
        if isinstance(values, Tensor):
            return self._rows(values)
        if isinstance(values, dict):
            return {name: self(value) for name, value in values.items()}
        if isinstance(values, list | tuple):
            return type(values)(self(value) for value in values)
        return values

    def _rows(self, values: Tensor) -> Tensor:
        own = values.detach().reshape(1, *values.shape[1:]) if values.ndim == 0 else values.detach()
        if not self.counts():
            own = own[:0]
        size = torch.tensor([len(own)], device=own.device)
        sizes = [torch.empty_like(size) for _ in range(dist.get_world_size())]
        dist.all_gather(sizes, size)
        numbers = [int(s) for s in sizes]
        padded = own.new_zeros(max(numbers), *own.shape[1:])
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in numbers]
        dist.all_gather(parts, padded)
        return torch.cat([part[:number] for part, number in zip(parts, numbers, strict=True)])
