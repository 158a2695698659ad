"""Code of transformers that the package ``kernels`` may replace by kernels of the Hub.

Where that package is installed (transformers requires it since 5.25), a function that is marked
with ``use_kernel_forward_from_hub`` is a module without parameters. The forward of a class that is
marked with ``use_kernelized_func`` sets a context variable, in which such a function finds what
``kernelize`` has put in its place for this module. A function cannot be known by its signature so,
and a checkpoint may set no variables: a captured forward calls the functions themselves, as long as
nothing is in their place.
"""

from __future__ import annotations

import types
from typing import Any

from torch import nn

_FUNCTION = "_create_func_module.<locals>.Func"
_FORWARD = "use_kernelized_func.<locals>.decorator.<locals>.new_forward"


def behind(value: Any) -> Any:
    """The function that a marked function, or the forward of a marked class, calls by default.

    It is ``value`` itself where that is anything else.
    """
    if isinstance(value, types.FunctionType):
        is_marked = value.__code__.co_qualname == _FORWARD
        return value.__dict__.get("__wrapped__", value) if is_marked else value
    if isinstance(value, nn.Module) and type(value).__qualname__ == _FUNCTION:
        forward = type(value).forward
        cells = dict(zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True))
        return cells["func"].cell_contents if "func" in cells else value
    return value


def replaceable(module: nn.Module) -> list[nn.Module]:
    """What ``kernelize`` puts kernels into for the functions that ``module`` calls."""
    return list(module.__dict__.get("_kernel_funcs", {}).values())


def is_replaced(module: nn.Module) -> bool:
    """Whether a kernel is in the place of a function that ``module`` calls."""
    return any("forward" in function.__dict__ for function in replaceable(module))
