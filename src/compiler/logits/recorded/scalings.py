"""Scales, casts and softmaxes of lazy logits, recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..changes import KeptLogits
from ..deferred import Change
from ..lazy_gradient import apply_change
from ..lazy_logits import LazyLogits
from .rows import Handlers, HeadRows, binding, handler, is_last, result_dtype, rows_of


def _changed(
    z: LazyLogits,
    function: Callable[..., Tensor],
    rows: HeadRows,
    *others: LazyLogits,
    **given: Any,
) -> Any:
    dtype = given.pop("dtype", z.dtype)
    return apply_change(Change(function, tuple(z.shape), dtype, rows, **given), z, *others)


def _scaled(z: LazyLogits, number: float, function: Callable[..., Tensor]) -> Any:
    """A product with a Python number."""
    rows = rows_of(z)
    of = rows.factor if rows.kind == "logits" else rows.weight
    # tiles divide by it; and what many of them make together may be too large, or too small
    if not z.is_floating_point() or not _has_inverse(number) or not _has_inverse(of * number):
        return NotImplemented
    if rows.kind == "logits":
        return _changed(z, function, replace(rows, factor=of * number))
    return _changed(z, function, replace(rows, weight=of * number))


def _has_inverse(x: float) -> bool:
    """Whether both ``x`` and its inverse are numbers of fp32, but not 0."""
    return _SMALLEST < abs(x) < 1.0 / _SMALLEST


_SMALLEST = torch.finfo(torch.float32).tiny


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


@handler
def _div(z: LazyLogits, other: Any) -> Any:
    if not _is_number(other) or not _has_inverse(other):
        return NotImplemented
    return _scaled(z, 1.0 / other, lambda t: t / other)


@handler
def _neg(z: LazyLogits) -> Any:
    return _scaled(z, -1.0, torch.neg)


@binding
def _mul(input: Any, other: Any) -> Any:
    z, other = (input, other) if isinstance(input, LazyLogits) else (other, input)
    return _product(z, other)


@handler
def _product(z: LazyLogits, other: Any) -> Any:
    if _is_number(other):
        return _scaled(z, float(other), lambda t: t * other)
    if not isinstance(other, LazyLogits) or not isinstance(other.recorded, HeadRows):
        return NotImplemented
    a, b = (z, other) if rows_of(z).kind == "probs" else (other, z)
    p, q = rows_of(a), rows_of(b)
    kind = {"log_probs": "p_log_p", "logits": "p_z", "probs": "p_p"}.get(q.kind)
    if p.kind != "probs" or kind is None or not p.is_same(q) or not other.is_pending:
        return NotImplemented
    if a.dtype != b.dtype or a.shape != b.shape:
        return NotImplemented
    if a is b:
        rows = replace(p, kind=kind, weight=p.weight**2)
        return _changed(a, torch.square, rows, is_linear=False)
    if torch.is_grad_enabled() and a.requires_grad != b.requires_grad:
        return NotImplemented  # one of them is a constant there
    rows = replace(p, kind=kind, weight=p.weight * q.weight)
    return _changed(a, torch.mul, rows, b, is_linear=False)


@handler
def _pow(z: LazyLogits, exponent: Any) -> Any:
    return _square(z) if _is_number(exponent) and exponent == 2 else NotImplemented


@handler
def _square(z: LazyLogits) -> Any:
    return _product(z, z) if rows_of(z).kind == "probs" else NotImplemented


def _cast(dtype: torch.dtype) -> Callable[..., Any]:
    @handler
    def cast(z: LazyLogits) -> Any:
        return _to(z, dtype)

    return cast


@handler
def _to(z: LazyLogits, *args: Any, **kwargs: Any) -> Any:
    """To another dtype; a copy or another device is something else."""
    targets = [*args, *(kwargs.pop(k, None) for k in ("dtype", "device"))]
    targets = [torch.device(w) if isinstance(w, str) else w for w in targets if w is not None]
    kwargs.pop("non_blocking", None)
    if kwargs or not all(isinstance(w, (torch.dtype, torch.device)) for w in targets):
        return NotImplemented
    dtypes = [w for w in targets if isinstance(w, torch.dtype)]
    if any(isinstance(w, torch.device) and w != z.device for w in targets) or len(dtypes) > 1:
        return NotImplemented
    if not dtypes or dtypes[0] is z.dtype:
        return z
    if not dtypes[0].is_floating_point:
        return NotImplemented
    return _changed(z, lambda t: t.to(dtypes[0]), rows_of(z), dtype=dtypes[0])


@handler
def _type_as(z: LazyLogits, other: Tensor) -> Any:
    return _to(z, other.dtype) if other.device == z.device else NotImplemented


def _softmax_like(kind: str, function: Any, backward: Any) -> Callable[..., Any]:
    @handler
    def softmax(z: LazyLogits, dim: Any = None, *rest: Any, dtype: Any = None, **more: Any) -> Any:
        rows = rows_of(z)
        dtype = next((r for r in rest if isinstance(r, torch.dtype)), dtype)
        if rows.kind != "logits" or not is_last(z, dim) or rows.factor <= 0:
            return NotImplemented
        if set(more) - {"_stacklevel"}:
            return NotImplemented

        def compute(t: Tensor) -> Tensor:
            result: Tensor = function(t, -1, dtype=dtype)
            return result

        def gradient(grad: Tensor, made: Tensor) -> Tensor:
            result: Tensor = backward(grad.to(made.dtype), made, made.dim() - 1, made.dtype)
            return result.to(source)

        source = z.dtype
        rows = replace(rows, kind=kind)
        made = result_dtype(compute, z)
        return _changed(z, compute, rows, dtype=made, is_linear=False, backward=gradient)

    return softmax


@handler
def _exp(z: LazyLogits) -> Any:
    rows = rows_of(z)
    if rows.kind != "log_probs" or rows.weight != 1.0:
        return NotImplemented
    dtype = result_dtype(torch.exp, z)
    rows = replace(rows, kind="probs")
    return _changed(z, torch.exp, rows, dtype=dtype, is_linear=False, backward=lambda g, p: g * p)


@handler
def _detach(z: LazyLogits) -> Any:
    shape, strides = tuple(z.shape), z.stride()
    change = Change(torch.detach, shape, z.dtype, rows_of(z), is_view=True, strides=strides)
    result = z.changed(change)
    z.share(result, torch.detach)
    call = rows_of(z).call
    model = call.model()
    if model is not None:
        result.keep(KeptLogits.of(model), lambda: not call.is_trained)
    return result


_log_softmax = _softmax_like("log_probs", F.log_softmax, torch.ops.aten._log_softmax_backward_data)
_softmax = _softmax_like("probs", F.softmax, torch.ops.aten._softmax_backward_data)

SCALINGS: Handlers = {
    "div": _div, "divide": _div, "true_divide": _div, "__truediv__": _div,
    "mul": _mul, "multiply": _mul, "__mul__": _mul, "__rmul__": _mul,
    "neg": _neg, "negative": _neg, "__neg__": _neg,
    "pow": _pow, "__pow__": _pow, "square": _square,
    "to": _to, "type_as": _type_as, "float": _cast(torch.float32), "double": _cast(torch.float64),
    "half": _cast(torch.float16), "bfloat16": _cast(torch.bfloat16),
    "log_softmax": _log_softmax, "softmax": _softmax, "exp": _exp, "detach": _detach,
}  # fmt: skip
"""What changes values row by row, by the name of the function."""
