"""Leaving no mode switched when a graph raises.

A captured ``with torch.autocast(...)`` is two calls in the graph, and nothing undoes the first when
what stands between them raises. A checkpoint's recomputation always ends so, as soon as it has what
backward needs. An autocast that is never left keeps its casts of the weights: every later one in
the process would use them, whatever the optimizer has written since.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from .edit import switches_mode


class _Entered(threading.local):
    """What graphs have entered in this thread and not left yet, the innermost last."""

    def __init__(self) -> None:
        self.modes: list[Any] = []


_entered = _Entered()


@functools.cache
def _entering(enter: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(enter)
    def run(*args: Any, **kwargs: Any) -> Any:
        mode = enter(*args, **kwargs)
        _entered.modes.append(mode)
        return mode

    return _as_ours(run)


@functools.cache
def _exiting(leave: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(leave)
    def run(mode: Any) -> None:
        leave(mode)
        _entered.modes[:] = [m for m in _entered.modes if m is not mode]

    return _as_ours(run)


def _as_ours(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which a graph's code would otherwise write as the one that it wraps."""
    function.__module__ = __name__
    return function


def restored_on_error(module: fx.GraphModule) -> None:
    """Let ``module``, and the graphs in it, undo on an exception what they switched themselves."""
    switching = False
    for inner in module.children():
        if isinstance(inner, fx.GraphModule):
            restored_on_error(inner)
            switching = switching or "forward" in vars(inner)
    for node in filter(switches_mode, module.graph.nodes):
        switching = True
        name = node.target.__name__  # type: ignore[union-attr]
        if name.startswith("_enter_"):
            node.target = _entering(node.target)  # type: ignore[arg-type]
        elif name.startswith("_exit_"):
            node.target = _exiting(node.target)  # type: ignore[arg-type]
    if switching:
        module.recompile()
        module.forward = functools.partial(_run, module)


def _run(module: fx.GraphModule, *args: Any) -> Any:
    grad, depth = torch.is_grad_enabled(), len(_entered.modes)
    try:
        return type(module).forward(module, *args)
    except BaseException:
        while len(_entered.modes) > depth:
            _entered.modes.pop().__exit__(None, None, None)
        torch._C._set_grad_enabled(grad)
        raise
