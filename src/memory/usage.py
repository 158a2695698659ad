"""How much memory one graph will hold between forward and backward, found without running it.

The graph runs on fake tensors, which have shapes and no contents, and every storage that comes into
being is counted as long as it lives. So whatever keeps a tensor for backward (an op, autograd, a
checkpoint) is seen without being known, and a prediction is what the run itself will do.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from .flops import held, operations


@dataclass(frozen=True)
class Usage:
    """What one run of a graph takes.

    Attributes:
        kept: bytes held between forward and backward, the outputs included, the inputs not.
        forward: the most bytes held at one time in forward, what it keeps included.
        backward: likewise in backward, the gradients of parameters included.
        gradients: bytes of the parameters' gradients.
        flops: floating-point operations of both directions, and what copies cost, in such.
        host: bytes held in the memory of the host between forward and backward.
    """

    kept: int
    forward: int
    backward: int
    gradients: int
    flops: int
    host: int = 0


class Living(TorchDispatchMode):
    """Counts the bytes of the storages that came into being under it and are still alive.

    Attributes:
        flops: floating-point operations so far.
        bytes: of the storages alive now.
        most: the highest that ``bytes`` has been since it was last set back.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # 2026-11-25: torch is not typed here
        self.flops = self.bytes = self.most = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what is new in its result."""
        out = func(*args, **(kwargs or {}))
        self.flops += operations(func, args, kwargs or {}, out)
        for t in tree_iter(out):
            if isinstance(t, Tensor):
                self._count(t.untyped_storage())
        self.most = max(self.most, self.bytes + held(func, args))
        return out

    def exclude(self, tensors: Sequence[Any]) -> None:
        """Do not count the memory of ``tensors``."""
        self._known.update(t.untyped_storage() for t in tensors if isinstance(t, Tensor))

    def _count(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.bytes += size
        weakref.finalize(storage, self._end, size)

    def _end(self, size: int) -> None:
        self.bytes -= size


def predict(run: Callable[..., Any], examples: Sequence[Any], size: Callable[[Any], Any]) -> Usage:
    """Predict what ``run`` takes in forward and backward.

    Args:
        run: takes tensors like ``examples`` and returns tensors.
        examples: inputs, fake or real; parameters are told by their class.
        size: gives a symbolic size its number.

    Raises:
        Exception: whatever an operation raises that cannot run without contents.
    """
    # out of the tracing context of a compilation that goes on: it has fake tensors of its own
    with torch._guards.tracing(None), FakeTensorMode(allow_non_fake_inputs=True):
        inputs = [_fake(e, size) for e in examples]
        run(*inputs)  # what is made once, in the first call, is not counted
        living = Living()
        living.exclude(inputs)
        with living:
            results = [t for t in tree_iter(run(*inputs)) if isinstance(t, Tensor)]
            forward, kept = living.most, living.bytes
            living.most = 0
            wanted = [t for t in results if t.requires_grad]
            if wanted:
                torch.autograd.backward(wanted, [torch.ones_like(t) for t in wanted])
            backward = living.most
    gradients = [
        t.grad.nbytes
        for t, e in zip(inputs, examples, strict=True)
        if isinstance(e, torch.nn.Parameter) and t.grad is not None
    ]
    return Usage(kept, forward, backward, sum(gradients), living.flops)


def _fake(example: Any, size: Callable[[Any], Any]) -> Any:
    """An input of ``predict``'s run: the shape and strides of ``example``, and its dtype."""
    if not isinstance(example, Tensor):
        return size(example)
    shape, strides = [size(s) for s in example.shape], [size(s) for s in example.stride()]
    made = torch.empty_strided(shape, strides, dtype=example.dtype, device=example.device)
    return made.requires_grad_(example.requires_grad)
