"""How much memory one graph will hold between forward and backward, found without running it.

The graph runs on fake tensors, which have shapes and no contents, and every storage that comes into
being is counted as long as it lives. So whatever keeps a tensor for backward (an op, autograd, a
checkpoint) is seen without being known, and a prediction is what the run itself will do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_iter

from ..graph.fakes import fake
from ..kernels.cost import Living


@dataclass(frozen=True)
class Usage:
    """What one run of a graph takes."""

    saved: int  # bytes held between forward and backward, the outputs included, the inputs not
    forward: int  # the most bytes held at one time in forward, what it keeps included
    backward: int  # the most bytes held at one time in backward, gradients of parameters included
    gradients: int  # bytes of the parameters' gradients
    flops: int  # floating-point operations of both directions, and what copies cost, in such
    host: int = 0  # bytes held in the memory of the host between forward and backward


def predict(run: Callable[..., Any], examples: Sequence[Any], size: Callable[[Any], Any]) -> Usage:
    """Predict what ``run`` takes in forward and backward.

    ``examples`` are inputs, fake or real, like those of ``run``; parameters are told by their
    class. ``size`` gives a symbolic size its number. Raises what an operation raises that cannot
    run without contents.
    """
    # out of the tracing context of a compilation that goes on: it has other fake tensors
    with torch._guards.tracing(None), FakeTensorMode(allow_non_fake_inputs=True):
        inputs = [fake(e, size) for e in examples]
        run(*inputs)  # what is made once, in the first call, is not counted
        living = Living()
        living.exclude(inputs)
        with living:
            results = [t for t in tree_iter(run(*inputs)) if isinstance(t, Tensor)]
            forward, saved = living.most, living.bytes
            living.most = 0
            roots = [t for t in results if t.requires_grad]
            if roots:
                torch.autograd.backward(roots, [torch.ones_like(t) for t in roots])
            backward = living.most
    gradients = [
        t.grad.nbytes
        for t, e in zip(inputs, examples, strict=True)
        if isinstance(e, torch.nn.Parameter) and t.grad is not None
    ]
    return Usage(saved, forward, backward, sum(gradients), living.flops)
