"""The backward pass of all that was read of one call's logits, where the head is trained.

Each read alone would project its rows once more, and make a gradient of the whole head. Here all of
them are one backward pass of ``linear_logprob`` over their rows.
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
    """A sum of outputs of ``linear_logprob`` with these ``weights``, one number per row.

    ``targets``: (N,), for the log-probability; ``NEVER`` where a row does not count.
    """

    weights: dict[str, float]
    targets: Tensor | None = None


@dataclass(frozen=True, eq=False)
class LatePart:
    """The gradients of one read: made alone, or ``together`` with others."""

    rows: HeadRows
    measures: Measures
    grad: Tensor
    count: int  # of the inputs of the logits

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
    reads = _merged(parts)
    operand_sets = [head.of(inputs, r.index, rows.factor) for r in reads]
    with call.mode(False):
        x, weight, bias = operands(torch.cat([o.x for o in operand_sets]), *operand_sets[0][1:3])
    scale, softcap, temperature = operand_sets[0][3:]
    factor = scale if isinstance(scale, Tensor) else None
    names = list(dict.fromkeys(n for r in reads for n in r.columns))
    columns: list[Any] = [torch.cat([r.column(name) for r in reads]) for name in names]
    targets = torch.cat([r.whole_targets() for r in reads])
    places = (head.x, head.weight, head.bias, head.factor)
    needs_grad = [i is not None and inputs[i].requires_grad for i in places]
    with torch.autocast(x.device.type, enabled=False):
        grads = backward_op(
            columns, None, x, weight, bias, targets, factor, names, NEVER, temperature,
            softcap or 0.0, 1.0 if factor is not None else scale, needs_grad,
        )  # fmt: skip
    gradients: list[Any] = [None] * (3 + parts[0].count)
    for i, grad, need in zip(places, grads, needs_grad, strict=True):
        if i is not None and need:
            grad = _scattered(reads, inputs[i], grad) if i == head.x else grad
            gradients[3 + i] = grad.to(inputs[i].dtype).view(inputs[i].shape)
    return gradients


@dataclass(eq=False)
class _RowsRead:
    """Rows, and the gradients (N,) of each output of ``linear_logprob`` that was made of them."""

    index: Tensor | None
    columns: dict[str, Tensor]
    targets: Tensor | None

    def column(self, name: str) -> Tensor:
        """The gradients of an output; 0 where there are none."""
        grad = self.columns.get(name)
        return torch.zeros_like(next(iter(self.columns.values()))) if grad is None else grad

    def whole_targets(self) -> Tensor:
        """The targets; some class where there are none."""
        if self.targets is not None:
            return self.targets
        like = next(iter(self.columns.values()))
        return torch.zeros(len(like), dtype=torch.int64, device=like.device)

    def takes(self, other: _RowsRead) -> bool:
        """Whether ``other`` is of the same rows, and of no other targets."""
        return _equal(self.index, other.index) and (
            self.targets is None or other.targets is None or _equal(self.targets, other.targets)
        )

    def add(self, other: _RowsRead) -> None:
        """Let what was computed of the same rows be one backward pass, which rounds once."""
        for one in (self, other):  # a row that does not count in one may count in the other
            if one.targets is not None:
                ignored = one.targets == NEVER
                one.columns = {n: c.masked_fill(ignored, 0) for n, c in one.columns.items()}
                one.targets = one.targets.masked_fill(ignored, 0)
        for name, column in other.columns.items():
            self.columns[name] = self.columns[name] + column if name in self.columns else column
        self.targets = other.targets if self.targets is None else self.targets


def _merged(parts: Sequence[LatePart]) -> list[_RowsRead]:
    merged: list[_RowsRead] = []
    for part in parts:
        grad, weights = part.grad.reshape(-1), part.measures.weights
        columns = {name: grad * weight for name, weight in weights.items()}
        read = _RowsRead(part.rows.index, columns, part.measures.targets)
        same = next((one for one in merged if one.takes(read)), None)
        if same is None:
            merged.append(read)
        else:
            same.add(read)
    return merged


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _scattered(read: Sequence[_RowsRead], x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of all rows from those of the rows that were read."""
    count = x.numel() // x.shape[-1]
    every = torch.arange(count, device=x.device)
    index = [every if r.index is None else r.index.reshape(-1) for r in read]
    wide = grad if grad.dtype is torch.float64 else grad.float()
    return wide.new_zeros(count, x.shape[-1]).index_add_(0, torch.cat(index), wide)
