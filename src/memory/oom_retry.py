"""Running a step again with a leaner plan, when the first one found no memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

from ..sharding import has_peers
from .planner import Planner
from .random_state import RandomState

T = TypeVar("T")


def retrying(planner: Planner, run: Callable[[], T], parameters: Iterable[Tensor] = ()) -> T:
    """Call ``run``; after an out-of-memory error make the plan leaner and call it again.

    Only in the first step, in a process that trains alone (others would wait for the gradients of
    the step that failed), and only with ``memory="auto"``: the plan is a prediction then. Random
    numbers are drawn again as the first time.
    Nothing is repeated if one of ``parameters``, whose gradients ``run`` makes, has a gradient.
    Other errors are raised, and this one if nothing can be made leaner.
    """
    fresh = list(parameters)
    # sums of earlier batches could be put back from copies only, which take memory themselves
    if not planner.may_retry() or has_peers() or any(p.grad is not None for p in fresh):
        return run()
    numbers = RandomState.now(planner.meter.device)
    while True:
        try:
            return run()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or not planner.leaner():
                raise
        # here the error, and what its frames held, is gone
        gc.collect()
        if numbers.gpu is not None:
            torch.cuda.empty_cache()
        numbers.restore()
        for p in fresh:
            p.grad = None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator found no memory: PyTorch's of a GPU or the CPU, or Python's."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
