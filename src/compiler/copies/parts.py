"""Projections that a tracer cannot follow: each is one node of its block's graph.

Where a capture has stopped in the forward of a submodule, or in what it calls, and the submodule
has parts itself and says, as ``nn.Linear`` does, how many features go in and come out (adapters of
sparse or wavelet updates do), the block is captured around it: it runs as it was.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch._dynamo.exc import Unsupported

from ...graph.opaque.parts import as_node
from .forward_copies import function_of


class UnknownParts:
    """The forwards of one session's modules that run as they were, as nodes."""

    def __init__(self) -> None:
        """None yet."""
        self._forwards: dict[Callable[..., Any], bool] = {}
        self._owners: weakref.WeakValueDictionary[tuple[int, ...], nn.Module] = (
            weakref.WeakValueDictionary()
        )

    def __bool__(self) -> bool:
        return any(self._forwards.values())

    def stopped(self, error: Exception, below: Iterable[nn.Module]) -> bool:
        """Whether ``error`` ended a capture in a part of a region that is a node from now on."""
        # what a checkpoint around it does not allow is no matter of the part: alone it is captured
        if not isinstance(error, Unsupported) or str(error.gb_type).startswith("HOP:"):
            return False
        candidates = [f for m in below if (f := function_of(m)) is not None and _is_projection(m)]
        for frame in reversed(getattr(error, "real_stack", None) or ()):
            for forward in candidates:
                code = forward.__code__
                if code.co_filename == frame.filename and frame.lineno in _lines(code):
                    is_new = forward not in self._forwards
                    self._forwards.setdefault(forward, True)
                    return is_new
        return False

    def changed(self, forward: Callable[..., Any]) -> None:
        """A part has returned something else: let it be no node any more."""
        self._forwards[forward] = False

    def has(self, module: nn.Module) -> bool:
        """Whether a submodule is a node."""
        if not self._forwards or not self._forwards.get(forward := function_of(module), False):
            return False
        key = tuple(map(id, module.parameters()))
        if self._owners.setdefault(key, module) is not module:  # a node knows it by these alone
            self._forwards[forward] = False
        return self._forwards[forward]

    def finish(self, module: nn.Module, copy: Any) -> Any:
        """What a submodule runs for its forward, of which there may be a copy."""
        return _as_node(function_of(module)) if self.has(module) else copy


@functools.cache
def _lines(code: Any) -> frozenset[int]:
    return frozenset(number for *_, number in code.co_lines() if number is not None)


def _is_projection(module: nn.Module) -> bool:
    sizes = (getattr(module, name, None) for name in ("in_features", "out_features"))
    has_parts = next(module.children(), None) and next(module.parameters(), None) is not None
    return bool(has_parts) and all(isinstance(size, int) for size in sizes)


@functools.cache
def _as_node(forward: Callable[..., Any]) -> Callable[..., Any]:
    node = as_node(forward)

    def run(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return forward(self, x, *args, **kwargs)
        return node(x, self.out_features, *self.parameters())

    return run
