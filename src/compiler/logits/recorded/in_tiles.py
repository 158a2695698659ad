"""What is computed of lazy logits in tiles, as autograd sees it in eager mode.

The operation's result is made of rows and head, and its history is eager mode's: it leads to the
lazy logits that were asked. What flows back is a ``LazyGradient``. Where that arrives as it was
sent, rows and head get the gradients of the tiled operation; where somebody has changed it, or
wants to see it, its values are those of the plain formula.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....kernels.loss.linear_cross_entropy_parts import OPERANDS, operands
from ....kernels.loss.linear_logprob import linear_logprob
from ....kernels.loss.linear_logprob_parts import backward_op
from ....kernels.second_order import differentiable, gradients
from ..changes import remembered, unchanged
from ..head_call import Operands, as_leaf
from ..lazy_gradient import LazyGradient, like, require_unwritten
from ..lazy_logits import LazyLogits
from .rows import HeadRows, WrongArguments, rows_of

# ------------------------------------------------------------------------------------ trained heads
#
# Each read alone would project its rows once more, and make a gradient of the whole head. Here all
# reads of one call are one backward pass of ``linear_logprob`` over their rows.

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
    gradients: list[Any] = [None] * (OPERANDS + parts[0].count)
    for i, grad, need in zip(places, grads, needs_grad, strict=True):
        if i is not None and need:
            grad = _scattered(reads, inputs[i], grad) if i == head.x else grad
            gradients[OPERANDS + i] = grad.to(inputs[i].dtype).view(inputs[i].shape)
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


@dataclass(frozen=True, eq=False)
class Tiled:
    """Something that is computed of logits, or of what was recorded of them."""

    name: str
    # computes it from the operands of the head; flat, in fp32 (fp64 for fp64)
    compute: Callable[[Operands], Tensor]
    formula: Callable[[Tensor], Tensor]  # computes the same from the values
    measures: Measures | None = None  # what it is a sum of, or None
    # the caller's tensors that ``formula`` and ``measures`` read, such as targets
    given: tuple[Tensor, ...] = ()


def compute(z: LazyLogits, tiled: Tiled, rows: HeadRows | None = None) -> Tensor:
    """The result of ``tiled`` of ``rows``, by default z's, with a history that leads to ``z``.

    Raises:
        WrongArguments: it cannot be computed from the operands of the head now.
    """
    rows = rows_of(z) if rows is None else rows
    if rows.factor <= 0 or not rows.call.can_end_in_tiles(rows.inputs):
        raise WrongArguments
    rows.call.plan.reads.note_tiles(tiled.name)
    rows.call.is_done = True
    if torch.is_grad_enabled() and z.requires_grad:
        result: Tensor = _Ended.apply(tiled, rows, z)  # type: ignore[no-untyped-call]
        return result
    with rows.call.mode(False):
        return tiled.compute(_operands(rows, rows.inputs))


def _operands(rows: HeadRows, inputs: Any) -> Operands:
    head = rows.call.plan.head
    assert head is not None
    return head.of(inputs, rows.index, rows.factor)


def _double_backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return None, None, None
    require_unwritten([ctx.z], [ctx.writes])
    _require_unchanged(ctx)
    with ctx.autocast():
        return None, None, *gradients(ctx.tiled.formula, (ctx.z.materialize(),), (True,), (grad,))


class _Ended(torch.autograd.Function):
    """The tiled operation. Its own history, from the operands on, is kept for backward."""

    @staticmethod
    def forward(ctx: Any, tiled: Tiled, rows: HeadRows, z: LazyLogits) -> Tensor:
        head = rows.call.plan.head
        assert head is not None
        is_late = tiled.measures is not None and rows.inputs[head.weight].requires_grad
        leaves = rows.inputs if is_late else [as_leaf(t) for t in rows.inputs]
        with rows.call.mode(not is_late):
            result = tiled.compute(_operands(rows, leaves))
        ctx.is_late = is_late
        ctx.tiled, ctx.rows, ctx.z, ctx.leaves = tiled, rows, z, leaves
        ctx.made, ctx.autocast = result, _autocast(z.device.type)
        ctx.values, ctx.like = z.snapshot(), like(z)
        ctx.writes, ctx.given = z.writes, [remembered(t) for t in tiled.given]
        ctx.set_materialize_grads(False)
        return result.detach()

    @staticmethod
    @differentiable(_double_backward)
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        if grad is None:
            return None, None, None
        _require_unchanged(ctx)
        z, result = ctx.like, ctx.made

        def values() -> Tensor:
            with torch.no_grad(), ctx.autocast():
                leaf = ctx.values.values().detach().requires_grad_()
                gradient: Tensor = gradients(ctx.tiled.formula, (leaf,), (True,), (grad,))[0]
            return gradient

        def part() -> list[Any]:
            indices = [
                i for i, t in enumerate(ctx.leaves)
                if isinstance(t, Tensor) and t.requires_grad
            ]  # fmt: skip
            inputs = [ctx.leaves[i] for i in indices]
            grads = torch.autograd.grad(result, inputs, grad, retain_graph=True, allow_unused=True)
            pairs = dict(zip(indices, grads, strict=True))
            return [None] * OPERANDS + [pairs.get(i) for i in range(len(ctx.leaves))]

        if ctx.is_late:
            late = LatePart(ctx.rows, ctx.tiled.measures, grad, len(ctx.leaves))
            return None, None, LazyGradient.of(z, values, [late])
        return None, None, LazyGradient.of(z, values, [part])


def _require_unchanged(ctx: Any) -> None:
    for saved in ctx.given:
        unchanged(saved)


def _autocast(device: str) -> Callable[[], Any]:
    """The autocast at hand, to be entered again."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    @contextmanager
    def again() -> Iterator[None]:
        with torch.autocast(device, dtype, enabled):
            yield

    return again


# ---------------------------------------------------------------------------------- numbers per row


def measure(o: Operands, name: str, targets: Tensor | None = None, **more: Any) -> Tensor:
    """One output of ``linear_logprob``."""
    settings = {"ignore_index": NEVER, **more}
    result: Tensor = linear_logprob(
        o.x, o.weight, o.bias, targets, (name,), temperature=o.temperature, softcap=o.softcap,
        logit_scale=o.scale, **settings,
    )[0]  # fmt: skip
    return result


def weighted_sum(o: Operands, weights: Mapping[str, float]) -> Tensor:
    """A sum of several measures, in one pass over the logits."""
    # The gradients of a mean logit and of a log-sum-exp nearly cancel: they are added before they
    # are multiplied with the head, by backward, and not as one term of each that forward has made.
    names = list(weights)
    outputs = linear_logprob(
        o.x, o.weight, o.bias, None, names, ignore_index=NEVER, temperature=o.temperature,
        softcap=o.softcap, logit_scale=o.scale,
        deferred=names if {"mean_logit", "logsumexp"} <= set(names) else (),
    )  # fmt: skip
    total: Tensor = sum(t * weights[n] for n, t in zip(names, outputs, strict=True))  # type: ignore[assignment]
    return total


def mean_logit(o: Operands) -> Tensor:
    """(N,): the mean over the vocabulary; linear in the rows where nothing caps it."""
    if o.softcap is not None:
        return measure(o, "mean_logit")
    # no matrix product: autocast would round that
    result = (wide(o.x) * o.weight.mean(0, dtype=wide(o.x).dtype)).sum(-1)
    if o.bias is not None:
        result = result + wide(o.bias).mean()
    return result * (wide(o.scale) if isinstance(o.scale, Tensor) else o.scale) / o.temperature


def picked(o: Operands, index: Tensor) -> Tensor:
    """(N, K): some logits of each row."""
    result: Tensor = Pick.apply(wide(o.x), o.weight, index)  # type: ignore[no-untyped-call]
    if o.bias is not None:
        result = result + wide(o.bias)[index]
    result = result * (wide(o.scale) if isinstance(o.scale, Tensor) else o.scale)
    if o.softcap is not None:
        result = torch.tanh(result / o.softcap) * o.softcap
    return result / o.temperature


def wide(t: Tensor) -> Tensor:
    """``t`` in fp32; fp64 stays."""
    return t if t.dtype is torch.float64 else t.float()


def flat_rows(t: Tensor) -> Tensor:
    """``t`` as (N, vocabulary), in fp32; fp64 stays."""
    return wide(t).reshape(-1, t.shape[-1])


class Pick(torch.autograd.Function):
    """Single logits before scale and soft cap: ``x[n] · weight[index[n, k]]``, in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
        """Compute one product per row and column; x (N, H), weight (V, H), index (N, K)."""
        ctx.save_for_backward(x, weight, index)
        return torch.stack([(x * weight.index_select(0, i)).sum(-1) for i in index.unbind(-1)], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the rows, and of the head in the precision of ``grad``."""
        x, weight, index = ctx.saved_tensors
        dx = dweight = None
        columns = list(zip(grad.unbind(-1), index.unbind(-1), strict=True))
        if ctx.needs_input_grad[0]:
            dx = torch.zeros_like(x)
            for g, i in columns:
                dx += g.unsqueeze(-1) * weight[i]
        if ctx.needs_input_grad[1]:
            total = torch.zeros(weight.shape, dtype=grad.dtype, device=grad.device)
            for g, i in columns:
                total.index_add_(0, i, (g.unsqueeze(-1) * x).to(grad.dtype))
            dweight = total.to(weight.dtype)
        return dx, dweight, None
