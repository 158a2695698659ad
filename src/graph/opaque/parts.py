"""A projection of unknown code, as one node of a graph: it runs as it was."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch._subclasses.fake_tensor import FakeTensor

_MARK = "__fusewright_unknown__"
_MODULES: weakref.WeakValueDictionary[tuple[int, ...], nn.Module] = weakref.WeakValueDictionary()
"""The modules that run so, by the identities of their parameters, which are inputs of the graph."""


class PartChanged(TorchDynamoException):
    """A part has returned something else than a projection of its input."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        """The part's forward is ``forward``."""
        super().__init__("a part of it has returned something else than a projection")
        self.forward = forward


def register(module: nn.Module) -> None:
    """Let the node of its forward find ``module``."""
    _MODULES[tuple(map(id, module.parameters()))] = module


def as_node(forward: Callable[..., Any]) -> Any:
    """What calls ``forward`` of a module, as a node: x (..., in), the size out, its parameters.

    It gives (..., out) in x's dtype, and raises PartChanged where ``forward`` gives something else.
    """

    def unknown_part(x: Tensor, out: int, *parameters: Tensor) -> Tensor:
        shape = (*x.shape[:-1], out)
        if any(isinstance(t, FakeTensor) for t in (x, *parameters)):
            result = x.new_empty(shape)
            trains = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters))
            return result.requires_grad_().clone() if trains else result
        result = forward(_MODULES[tuple(map(id, parameters))], x)
        if type(result) is not Tensor or (result.shape, result.dtype) != (shape, x.dtype):
            raise PartChanged(forward)
        return result

    setattr(unknown_part, _MARK, forward)
    return torch._dynamo.allow_in_graph(unknown_part)  # type: ignore[no-untyped-call]


def is_unknown_part(target: Any) -> bool:
    """Whether a node's target is such a call."""
    return getattr(target, _MARK, None) is not None
