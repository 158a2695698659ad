"""Functions that give a module's own weight, in a way that TorchDynamo cannot follow.

A library that knows many kinds of quantized weights asks which one it has at hand by the place
where its class is defined: ``type(module.weight).__module__``. TorchDynamo does not know that of a
parameter's class. In a captured forward another function stands for such a one. It gives back an
ordinary parameter by itself, and leaves everything else to the original.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def asks_for_place(function: Any) -> bool:
    """Whether ``function`` takes one module, reads its weight, and asks where a class is from."""
    if not isinstance(function, types.FunctionType):
        return False
    code = function.__code__
    takes_one = code.co_argcount == 1 and not code.co_kwonlyargcount and not code.co_flags & 0x0C
    return takes_one and {"weight", "__module__"} <= set(code.co_names)


@functools.cache
def stand_in(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that does what ``function`` does, and that TorchDynamo can follow further.

    What ``function`` gives for an ordinary parameter is found out by asking it: with a module of
    the same class that has nothing but a weight.
    """
    strings = (c for c in function.__code__.co_consts if isinstance(c, str) and c.isidentifier())
    asked = tuple(sorted(n for n in set(strings) - {"weight"} if not hasattr(nn.Module, n)))
    """What the function may ask a module for, by ``hasattr`` and ``getattr``."""

    @torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]  # 2026-11-26: no types
    def gives_it_back(kind: type[nn.Module]) -> bool:
        return _gives_it_back(function, kind)  # type: ignore[arg-type]  # 2026-11-26: a class

    def own_weight(module: Any) -> Any:
        weight = getattr(module, "weight", None)
        if type(weight) is nn.Parameter and gives_it_back(type(module)):
            for name in asked:
                if hasattr(module, name):
                    return function(module)
            return weight
        return function(module)

    return own_weight


@functools.cache
def _gives_it_back(function: Callable[..., Any], kind: type[nn.Module]) -> bool:
    """Whether it gives back the weight of a module of a class that has nothing else."""
    bare = kind.__new__(kind)
    nn.Module.__init__(bare)
    bare.weight = nn.Parameter(torch.zeros(1, 1, device="cpu"))
    try:
        return function(bare) is bare.weight
    except Exception:  # it asks for more
        return False
