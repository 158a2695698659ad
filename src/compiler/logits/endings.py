"""Functions of pending logits that are computed in tiles, from the rows and the head's weight.

A result's history is eager mode's: it leads to the logits that were passed. What flows back is a
``LazyGradient``, whose parts are the gradients of the tiled computation.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.loss.head_op import OPERANDS
from ...kernels.loss.linear_cross_entropy import linear_cross_entropy
from ...kernels.loss.linear_logprob import linear_logprob
from ...kernels.second_order import differentiable, gradients
from .fingerprints import remembered, unchanged
from .head_call import Operands, as_leaf
from .lazy_gradient import LazyGradient, without_values
from .lazy_logits import Answer, Buffer, LazyLogits, NotInTiles

NEVER = -(1 << 31)
"""An index that is never a class."""
_MOST_COLUMNS = 64
"""Columns of a gather, at most, that are computed one by one."""


@dataclass(frozen=True, eq=False)
class _Ending:
    """A function of logits: its name, in tiles, and as a formula of the values (N, vocabulary).

    ``given`` are the caller's tensors that both read, such as targets.
    """

    name: str
    tiled: Callable[[Operands], Tensor]
    formula: Callable[[Tensor], Tensor]
    given: tuple[Tensor, ...] = ()


def _compute(z: LazyLogits, memory: Buffer, ending: _Ending) -> Tensor:
    """The result of ``ending`` for ``z``, whose rows are ``memory``; flat, in fp32 or fp64."""
    memory.operands(memory.inputs)  # raises NotInTiles
    if not memory.call.can_end_in_tiles(memory.inputs):
        raise NotInTiles
    memory.call.plan.reads.note_tiles(ending.name)
    if torch.is_grad_enabled() and z.requires_grad:
        result: Tensor = _Ended.apply(ending, memory, z)  # type: ignore[no-untyped-call]
        return result
    with memory.call.mode(False):
        return ending.tiled(memory.operands(memory.inputs))


def _double_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    _require_unchanged(ctx)
    if ctx.z._version != ctx.version:
        raise RuntimeError(
            "the gradient of a gradient of these logits cannot be computed: they were written to "
            "since. Write to logits.clone(), or use fusewright.optimize(model, logits='always')."
        )

    def formula(values: Tensor) -> Tensor:
        result: Tensor = ctx.ending.formula(_wide(values).reshape(-1, values.shape[-1]))
        return result

    with ctx.autocast():
        return None, None, *gradients(formula, (ctx.z,), (True,), (grad,))


class _Ended(torch.autograd.Function):
    """The tiled computation; its own history, from the operands on, is kept for backward."""

    @staticmethod
    def forward(ctx: Any, ending: _Ending, memory: Buffer, z: LazyLogits) -> Tensor:
        leaves = tuple(as_leaf(t) for t in memory.inputs)
        with memory.call.mode(True):
            result = ending.tiled(memory.operands(leaves))
        ctx.ending, ctx.memory, ctx.z, ctx.version = ending, memory, z, z._version
        ctx.leaves, ctx.made, ctx.autocast = leaves, result, _autocast(z.device.type)
        ctx.like = without_values(z)  # its sizes may change in place
        ctx.given = [remembered(t) for t in ending.given]
        ctx.set_materialize_grads(False)
        return result.detach()

    @staticmethod
    @differentiable(_double_backward)
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if ctx.made is None:
            raise RuntimeError(
                "Trying to backward through the graph a second time: pass retain_graph=True to the "
                "first call of backward."
            )
        _require_unchanged(ctx)
        memory, leaves, made, formula = ctx.memory, ctx.leaves, ctx.made, ctx.ending.formula
        device = ctx.z.device
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            # as autograd frees saved tensors, if the caller keeps the loss
            ctx.made = ctx.memory = ctx.leaves = ctx.z = ctx.ending = ctx.given = None

        def values() -> Tensor:
            with torch.no_grad(), ctx.autocast():
                rows = _wide(memory.compute_again()).requires_grad_()
                of_rows = gradients(formula, (rows,), (True,), (grad,))[0]
            result: Tensor = of_rows.to(memory.dtype).view(memory.shape)
            return result

        def part() -> list[Any]:
            places = [i for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.requires_grad]
            found: list[Any] = [None] * (OPERANDS + len(leaves))
            if made.requires_grad:
                grads = torch.autograd.grad(
                    made, [leaves[i] for i in places], grad, retain_graph=True, allow_unused=True
                )
                for i, g in zip(places, grads, strict=True):
                    found[OPERANDS + i] = g
            return found

        return None, None, LazyGradient.of(ctx.like, values, [part], device)


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


def _measure(
    o: Operands, name: str, targets: Tensor | None = None, ignored: int = NEVER, top_k: int = 0
) -> Tensor:
    """One output of ``linear_logprob``."""
    return _measures(o, (name,), targets, ignored, top_k)[0]


def _measures(
    o: Operands, names: tuple[str, ...], targets: Tensor | None = None, ignored: int = NEVER,
    top_k: int = 0,
) -> tuple[Tensor, ...]:  # fmt: skip
    # gradients of a mean logit and of a log-sum-exp nearly cancel: backward adds them up first
    together = names if {"mean_logit", "logsumexp"} <= set(names) else ()
    return linear_logprob(
        o.x, o.weight, o.bias, targets, names, ignore_index=ignored, temperature=o.temperature,
        softcap=o.softcap, logit_scale=o.scale, deferred=together, top_k=top_k,
    )  # fmt: skip


def _picked(o: Operands, index: Tensor) -> Tensor:
    """(N, K): some logits of each row."""
    result: Tensor = _Pick.apply(_wide(o.x), o.weight, index)  # type: ignore[no-untyped-call]
    if o.bias is not None:
        result = result + _wide(o.bias)[index]
    result = result * (_wide(o.scale) if isinstance(o.scale, Tensor) else o.scale)
    if o.softcap is not None:
        result = torch.tanh(result / o.softcap) * o.softcap
    return result / o.temperature


class _Pick(torch.autograd.Function):
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


def _wide(t: Tensor) -> Tensor:
    """``t`` in fp32; fp64 stays."""
    return t if t.dtype is torch.float64 else t.float()


# ------------------------------------------------------------------------------------ the functions


def _ending(function: Callable[..., Any]) -> Answer:
    """Wrap a function of ``(z, memory, ...)``: NotImplemented for calls that need the values."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def run(z: LazyLogits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch._C._are_functorch_transforms_active():  # what a tile computes has no batches
            return NotImplemented
        if kwargs.get("out") is not None:
            return NotImplemented
        try:
            memory = z.chosen()
            signature.bind(z, memory, *args, **kwargs)
        except (NotInTiles, TypeError):
            return NotImplemented
        try:
            return function(z, memory, *args, **kwargs)
        except NotInTiles:
            return NotImplemented

    return run


def _require(*conditions: bool) -> None:
    if not all(conditions):
        raise NotInTiles


def _last(z: Tensor, dim: Any) -> bool:
    """True for the dimension of the vocabulary."""
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    return isinstance(dim, int) and dim in (-1, z.dim() - 1)


def _result_dtype(function: Callable[[Tensor], Tensor], z: Tensor) -> torch.dtype:
    """The dtype of what ``function`` makes of logits, under the autocast at hand."""
    return function(torch.zeros((1, 1), dtype=z.dtype, device=z.device)).dtype


def _per_row(z: LazyLogits, result: Tensor, keepdim: bool, dtype: torch.dtype) -> Tensor:
    result = result.view(z.shape[:-1]).to(dtype)
    return result.unsqueeze(-1) if keepdim else result


@_ending
def _gather(z: LazyLogits, memory: Buffer, dim: Any, index: Tensor) -> Any:
    _require(_last(z, dim), isinstance(index, Tensor))
    _require(index.dtype is torch.int64, index.dim() == z.dim(), index.device == z.device)
    _require(index.shape[:-1] == z.shape[:-1])
    columns = index.shape[-1]
    _require(0 < columns <= _MOST_COLUMNS)
    if index.device.type == "cpu" and index.numel():  # a GPU's kernels report an error later
        _require(bool((index.min() >= 0) & (index.max() < z.shape[-1])))
    flat, weight, is_logits = index.reshape(-1, columns), memory.weight, memory.kind == "logits"

    def tiled(o: Operands) -> Tensor:
        if columns == 1 and not is_logits:
            return _measure(o, "logprob", flat[:, 0]).unsqueeze(-1) * weight
        logits = _picked(o, flat)
        return (logits if is_logits else logits - _measure(o, "logsumexp").unsqueeze(-1)) * weight

    def formula(values: Tensor) -> Tensor:
        return values.gather(-1, flat)

    name = "single logits" if is_logits else "log-probabilities"
    result = _compute(z, memory, _Ending(name, tiled, formula, (index,)))
    result = result.view(index.shape).to(z.dtype)
    if is_logits:  # comparisons with the whole logits find the same numbers
        values = result.detach().reshape(-1, columns).clone()
        z.memory.picked.append((z.places().unsqueeze(-1), flat.clone(), values))
    return result


@_ending
def _argmax(z: LazyLogits, memory: Buffer, dim: Any = None, keepdim: bool = False) -> Any:
    _require(_last(z, dim), memory.weight > 0)
    ending = _Ending("argmax", lambda o: _measure(o, "argmax"), lambda values: values.argmax(-1))
    with torch.no_grad():
        return _per_row(z, _compute(z, memory, ending), keepdim, torch.int64)


@_ending
def _topk(z: LazyLogits, memory: Buffer, k: int, dim: Any = -1) -> Any:
    _require(memory.kind == "logits", _last(z, dim), isinstance(k, int))
    _require(0 < k <= min(z.shape[-1], _MOST_COLUMNS))
    ending = _Ending(
        "top classes", lambda o: _measure(o, "topk_indices", top_k=k), lambda v: v.topk(k).indices
    )
    with torch.no_grad():
        classes = _compute(z, memory, ending).view(*z.shape[:-1], k)
    values = ENDINGS["gather"](z, (-1, classes), {})
    _require(values is not NotImplemented)
    # computed one by one, near ties may come in another order
    order = values.detach().argsort(dim=-1, descending=True, stable=True)
    result = values.gather(-1, order), classes.gather(-1, order)
    return torch.return_types.topk(result)  # type: ignore[attr-defined]


@_ending
def _cross_entropy(
    z: LazyLogits, memory: Buffer, target: Tensor, weight: Any = None, size_average: Any = None,
    ignore_index: int = -100, reduce: Any = None, reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:  # fmt: skip
    _require_loss(z, target, weight, size_average, reduce, reduction)
    is_capped = memory.call.plan.head is not None and memory.call.plan.head.softcap is not None
    by_row = reduction == "none" or (is_capped and memory.factor != 1.0)
    _require(memory.kind == "logits", 0.0 <= label_smoothing <= 1.0)
    _require(not (label_smoothing and by_row))

    def tiled(o: Operands) -> Tensor:
        if by_row:
            terms = -_measure(o, "logprob", target, ignore_index)
            return _reduced(terms, target, ignore_index, reduction)
        x, scale = o.x, o.scale
        if isinstance(scale, Tensor):
            x, scale = (x * scale).to(x.dtype), 1.0
        return linear_cross_entropy(
            x, o.weight, o.bias, target, ignore_index, reduction, float(label_smoothing),
            o.softcap, scale / o.temperature,
        )  # fmt: skip

    def formula(values: Tensor) -> Tensor:
        return F.cross_entropy(
            values, target, None, None, ignore_index, None, reduction, label_smoothing
        )

    loss = _compute(z, memory, _Ending("cross entropy", tiled, formula, (target,)))
    return loss.to(_loss_dtype(F.cross_entropy, z))


@_ending
def _nll_loss(
    z: LazyLogits, memory: Buffer, target: Tensor, weight: Any = None, size_average: Any = None,
    ignore_index: int = -100, reduce: Any = None, reduction: str = "mean",
) -> Any:  # fmt: skip
    _require_loss(z, target, weight, size_average, reduce, reduction)
    _require(memory.kind == "log_probs")

    def tiled(o: Operands) -> Tensor:
        terms = _measure(o, "logprob", target, ignore_index) * -memory.weight
        return _reduced(terms, target, ignore_index, reduction)

    def formula(values: Tensor) -> Tensor:
        return F.nll_loss(values, target, None, None, ignore_index, None, reduction)

    loss = _compute(z, memory, _Ending("cross entropy", tiled, formula, (target,)))
    return loss.to(_loss_dtype(F.nll_loss, z))


def _require_loss(
    z: Tensor, target: Any, weight: Any, average: Any, reduce: Any, reduction: str
) -> None:
    _require(weight is None, average is None, reduce is None, z.dim() == 2)
    _require(reduction in ("mean", "sum", "none"), type(target) is Tensor)
    _require(target.dtype is torch.int64, target.shape == z.shape[:1], target.device == z.device)


def _loss_dtype(function: Callable[..., Tensor], z: LazyLogits) -> torch.dtype:
    target = torch.zeros(1, dtype=torch.int64, device=z.device)
    return _result_dtype(lambda t: function(t, target), z)


def _reduced(terms: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    if reduction == "none":
        return terms
    return terms.sum() if reduction == "sum" else terms.sum() / (target != ignore_index).sum()


@_ending
def _logsumexp(z: LazyLogits, memory: Buffer, dim: Any, keepdim: bool = False) -> Any:
    _require(memory.kind == "logits", _last(z, dim))
    ending = _Ending(
        "log-sum-exp", lambda o: _measure(o, "logsumexp"), lambda values: values.logsumexp(-1)
    )
    dtype = _result_dtype(lambda t: t.logsumexp(-1), z)
    return _per_row(z, _compute(z, memory, ending), keepdim, dtype)


@_ending
def _sum(
    z: LazyLogits, memory: Buffer, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Any:
    """Of log-probabilities, as label smoothing does."""
    _require(memory.kind == "log_probs", _last(z, dim))
    size, weight = z.shape[-1], memory.weight

    def tiled(o: Operands) -> Tensor:
        mean, total = _measures(o, ("mean_logit", "logsumexp"))
        return (mean - total) * (weight * size)

    ending = _Ending("sum of log-probabilities", tiled, lambda values: values.sum(-1))
    cast = _result_dtype(lambda t: t.sum(-1, dtype=dtype), z)
    return _per_row(z, _compute(z, memory, ending), keepdim, cast)


@_ending
def _mean(z: LazyLogits, memory: Buffer, *, dtype: Any = None) -> Any:
    """Of all logits, as trainers log it."""
    _require(memory.kind == "logits", z.numel() > 0)
    ending = _Ending(
        "mean logit", lambda o: _measure(o, "mean_logit"), lambda values: values.mean(-1)
    )
    cast = _result_dtype(lambda t: t.mean(dtype=dtype), z)
    return _compute(z, memory, ending).mean().to(cast)


ENDINGS: Mapping[str, Answer] = {
    "gather": _gather, "argmax": _argmax, "topk": _topk, "cross_entropy": _cross_entropy,
    "nll_loss": _nll_loss, "logsumexp": _logsumexp, "sum": _sum, "mean": _mean,
}  # fmt: skip
"""The functions that are computed in tiles, by name; a few more make rows, see ``lazy_logits``."""
