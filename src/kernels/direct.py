"""Calling the ops of this library without PyTorch's dispatcher, where it would find nothing to do.

Between an op and what implements it there may be a tracer, a mode that counts or records, a
transform, the profiler, a subclass of tensors, or autograd: the dispatcher finds out, and boxes
the arguments for it. In an ordinary step there is none of these, and to ask for them costs
a fraction of what the dispatcher does, some forty times in each block of a Llama.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor

from .launch import RUNS

_CONSTANTS = frozenset((type(None), bool, int, float, str, torch.dtype))
_C: Any = torch._C  # 2026-11-28: torch does not type all of it
_grad_is_enabled = torch.is_grad_enabled
_count_modes, _count_function_modes = _C._len_torch_dispatch_stack, _C._len_torch_function_stack
_are_transforms_active = _C._are_functorch_transforms_active
_is_profiling, _tracing_state = _C._autograd._profiler_enabled, _C._get_tracing_state


def direct(op: Callable[..., Any]) -> Callable[..., Any]:
    """``op``, from ``library_op``, called directly where nothing could tell.

    All arguments must be passed by position.
    """
    run, schema = RUNS[op], cast("Any", op)._schema
    # the dispatcher makes floats of integers, of which Triton makes constants
    floats = [i for i, a in enumerate(schema.arguments) if isinstance(a.type, torch.FloatType)]

    def call(*args: Any) -> Any:
        if _is_watched() or not _are_plain(args):
            return op(*args)
        for i in floats:
            if type(args[i]) is not float:
                return op(*args)
        return run(*args)

    return call


def is_traced_here() -> bool:
    """Whether a compiler traces what this thread does."""
    # ``torch.compiler.is_compiling()`` is true in all threads while one of them compiles.
    if torch.compiler.is_dynamo_compiling():
        return True
    return torch.compiler.is_compiling() and _count_modes() > 0


def _is_watched() -> bool:
    return (
        torch.compiler.is_compiling()
        or _grad_is_enabled()  # library ops have no autograd rule: PyTorch must see the call
        or _count_modes() > 0
        or _count_function_modes() > 0
        or _are_transforms_active()
        or _is_profiling()
        or _tracing_state() is not None
    )


def _are_plain(args: Iterable[Any]) -> bool:
    for a in args:
        kind = type(a)
        if kind is Tensor or kind is torch.nn.Parameter:
            if a.is_neg() or a._is_zerotensor():
                return False
        elif kind is list or kind is tuple:
            if not _are_plain(a):
                return False
        elif kind not in _CONSTANTS:
            return False
    return True
