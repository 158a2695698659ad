"""What TorchDynamo needs of an autograd function to capture it with its gradients."""

from __future__ import annotations

import functools
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


def capturable(function: Function) -> Function:
    """Decorate an autograd function: captured, it returns nothing that has another name, too."""
    if KNOWS_MARK_DIRTY:
        return function
    forward = function.forward

    @functools.wraps(forward)
    def run(ctx: Any, *args: Any) -> Any:
        results = forward(ctx, *args)
        if not torch.compiler.is_dynamo_compiling():
            return results
        if isinstance(results, Tensor):
            return results.clone()
        return tuple([r.clone() if isinstance(r, Tensor) else r for r in results])

    function.forward = staticmethod(run)  # type: ignore[method-assign]
    return function
