"""Which modules share a compiled function, and which numbers are constants of its graphs.

Equal modules share one function. Integers and floats in the modules are constants of its graphs, so
that rules can read them. Where that makes too many graphs (each layer reads its own index; a module
counts its calls), a second function takes over, in whose graphs the numbers that vary are inputs.
Where that makes too many as well, each module gets its own function; and one that needs a new graph
all the time is no longer captured.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from torch import nn
from torch._dynamo.exc import TorchDynamoException


class Stage(IntEnum):
    """How much is shared."""

    CONSTANT = 0
    VARYING = 1
    OWN = 2


_MAX_GRAPHS = {Stage.CONSTANT: 8, Stage.VARYING: 24, Stage.OWN: 16}
"""Graphs of one function: equal layers need one, times the modes in which they are called."""


@dataclass(eq=False)
class SharedFunction:
    """One function, or where each module has its own, the function of one module.

    ``graphs`` counts captures.
    """

    stage: Stage = Stage.CONSTANT
    graphs: int = 0
    compiled: Callable[..., Any] | None = None

    @property
    def is_full(self) -> bool:
        """Whether it has as many graphs as it may have."""
        return self.graphs >= _MAX_GRAPHS[self.stage]


@dataclass
class SharedFunctions:
    """The compiled functions of one session."""

    _common: dict[Hashable, SharedFunction] = field(default_factory=dict)
    _own: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, SharedFunction]] = field(
        default_factory=weakref.WeakKeyDictionary
    )

    def find(self, module: nn.Module, key: Hashable) -> SharedFunction:
        """The function that ``module`` runs; ``key`` is equal for what is compiled alike."""
        shared = self._common.get(key)
        if shared is None:
            shared = self._common[key] = SharedFunction()
        if shared.stage is not Stage.OWN and shared.is_full:
            shared = self._common[key] = SharedFunction(Stage(shared.stage + 1))
        if shared.stage is not Stage.OWN:
            return shared
        return self._own.setdefault(module, {}).setdefault(key, SharedFunction(Stage.OWN))


def structure(module: nn.Module) -> tuple[Any, ...]:
    """What tells layers that run different code apart: their parts, switches and kinds."""
    # numbers are left out: each layer has its own index
    return tuple(
        (name, type(m), *sorted((k, v) for k, v in vars(m).items() if isinstance(v, (bool, str))))
        for name, m in module.named_modules()
    )


class CaptureError(TorchDynamoException):
    """Something else was raised, ``error``, while TorchDynamo captured."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class InputGradient(TorchDynamoException):
    """A block does something else where its input has a gradient."""


class UnfrozenWeight(TorchDynamoException):
    """A weight needs a gradient that needed none when its block was compiled."""
