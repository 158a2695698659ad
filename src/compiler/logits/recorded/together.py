"""The backward pass of all that was read of one call's logits, where the head is trained.

Each read alone would project its rows once more, and make a gradient of the whole head. Together
they are one backward pass of ``linear_logprob`` over the rows of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....kernels.loss.linear_cross_entropy_parts import operands
from ....kernels.loss.linear_logprob_parts import backward_op
from .rows import HeadRows

NEVER = -(1 << 31)
"""An index that is never a class."""


@dataclass(frozen=True, eq=False)
class Measures:
    """A sum of outputs of ``linear_logprob``, one number per row.

    Attributes:
        weights: output -> its weight in the sum.
        targets: (N,), for the log-probability; ``NEVER`` where a row does not count. Or None.
    """

    weights: dict[str, float]
    targets: Tensor | None = None


@dataclass(frozen=True, eq=False)
class LatePart:
    """The gradients of one read: made alone, or ``together`` with others.

    Attributes:
        rows: that were read.
        measures: what was computed of them.
        grad: of that.
        count: how many inputs the logits have.
    """

    rows: HeadRows
    measures: Measures
    grad: Tensor
    count: int

    @property
    def key(self) -> tuple[int, float]:
        """Equal for reads that can be made together."""
        return id(self.rows.call), self.rows.factor

    def together(self, parts: Sequence[LatePart]) -> list[Any]:
        """The gradients of reads with the same ``key``."""
        return together(parts)

    def __call__(self) -> list[Any]:
        """The gradients of this read alone."""
        return together([self])


def together(parts: Sequence[LatePart]) -> list[Any]:
    """The gradients of operands and inputs, of reads with one ``key``."""
    rows, inputs = parts[0].rows, parts[0].rows.inputs
    call, head = rows.call, rows.call.plan.head
    assert head is not None
    if not call.can_end_in_tiles(inputs):
        raise RuntimeError(
            "the gradient of these logits cannot be computed: the weights that make them were "
            "changed since. Call backward before the optimizer, or use "
            "fusewright.optimize(model, logits='always')."
        )
    given = [head.of(inputs, p.rows.index, p.rows.factor) for p in parts]
    with call.mode(False):
        x, weight, bias = operands(torch.cat([o.x for o in given]), *given[0][1:3])
    scale, softcap, temperature = given[0][3:]
    factor = scale if isinstance(scale, Tensor) else None
    names = list(dict.fromkeys(n for p in parts for n in p.measures.weights))
    columns = [torch.cat([_column(p, name) for p in parts]) for name in names]
    targets = torch.cat([_targets(p, len(o.x)) for p, o in zip(parts, given, strict=True)])
    places = (head.x, head.weight, head.bias, head.factor)
    wanted = [i is not None and inputs[i].requires_grad for i in places]
    with torch.autocast(x.device.type, enabled=False):
        found = backward_op(
            columns, None, x, weight, bias, targets, factor, names, NEVER, temperature,
            softcap or 0.0, 1.0 if factor is not None else scale, wanted,
        )  # fmt: skip
    gradients: list[Any] = [None] * (3 + parts[0].count)
    for i, grad, need in zip(places, found, wanted, strict=True):
        if i is not None and need:
            grad = _scattered(parts, inputs[i], grad) if i == head.x else grad
            gradients[3 + i] = grad.to(inputs[i].dtype).view(inputs[i].shape)
    return gradients


def _column(part: LatePart, name: str) -> Tensor:
    return part.grad.reshape(-1) * part.measures.weights.get(name, 0.0)


def _targets(part: LatePart, rows: int) -> Tensor:
    if part.measures.targets is not None:
        return part.measures.targets
    return torch.zeros(rows, dtype=torch.int64, device=part.grad.device)


def _scattered(parts: Sequence[LatePart], x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of all rows from those of the rows that were read."""
    count = x.numel() // x.shape[-1]
    every = torch.arange(count, device=x.device)
    index = [every if p.rows.index is None else p.rows.index.reshape(-1) for p in parts]
    wide = grad if grad.dtype is torch.float64 else grad.float()
    return wide.new_zeros(count, x.shape[-1]).index_add_(0, torch.cat(index), wide)
