"""What TorchDynamo needs of an autograd function to capture it with its gradients."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=type[torch.autograd.Function])

_apply: Any = getattr(torch.ops.higher_order, "autograd_function_apply", None)
_code = getattr(type(_apply).__call__, "__code__", None)

KNOWS_MARK_DIRTY = "dirty_idx" in getattr(_code, "co_consts", ())
"""Whether a captured autograd function keeps the gradient of a result that it has made twice.

PyTorch 2.11 does not. There, a function returns each tensor that is made inside, too; where one is
its result under another name, after a write in place or a cast that changes nothing, the gradient
goes to that one, and is lost.
"""


def mark_frozen(ctx: Any, results: Sequence[Tensor], frozen: Iterable[bool]) -> None:
    """Mark those results that need no gradient; to be called in a function's forward."""
    ctx.frozen = tuple(frozen)
    pairs = zip(results, ctx.frozen, strict=True)
    ctx.mark_non_differentiable(*(out for out, is_frozen in pairs if is_frozen))


def capturable(function: Function) -> Function:
    """Decorate an autograd function: captured, it returns nothing that has another name, too."""
    if KNOWS_MARK_DIRTY:
        return function
    forward = function.forward
    marks = mark_frozen.__name__ in forward.__code__.co_names

    @functools.wraps(forward)
    def run(ctx: Any, *args: Any) -> Any:
        results = forward(ctx, *args)
        if not torch.compiler.is_dynamo_compiling():
            return results
        if isinstance(results, Tensor):
            return results.clone()
        copies = tuple([r.clone() if isinstance(r, Tensor) else r for r in results])
        if marks:
            mark_frozen(ctx, copies, ctx.frozen)
        return copies

    function.forward = staticmethod(run)  # type: ignore[method-assign]
    return function
