"""Sharded parameters inside a region: the hooks that gather and release them run around its graph.

FSDP2 and ZeRO-3 keep a part of each parameter on each process. Hooks on the modules that are their
units gather the rest before a unit's forward and before its backward pass, and release it after.
A captured graph calls no submodule, so these hooks are called for all units inside a region at
once: what comes before a forward gets the region's hidden states, what comes after one gets its
results. In a backward pass the first come last, and the second first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..sharding import fsdp2_casts, gathers

_FORWARD_HOOKS = "_forward_pre_hooks", "_forward_hooks"


def is_unit(module: nn.Module, region: nn.Module) -> bool:
    """Whether ``module`` has no other hooks than those of an engine that shards parameters.

    A unit of FSDP2 that casts its inputs or outputs in another way than ``region`` is none: around
    a whole region it would cast something else. The projection of a head may cast its inputs, which
    are the hidden states that the region is given.
    """
    if module._backward_hooks or module._backward_pre_hooks or not gathers(module):
        return False
    casts = fsdp2_casts(module)
    if not any(casts) or casts == fsdp2_casts(region):
        return True
    return casts[1] is None and _is_projection(module, region)


def _is_projection(module: nn.Module, region: nn.Module) -> bool:
    """Whether ``module`` is what a causal LM computes its logits with."""
    try:
        projection = getattr(region, "get_output_embeddings", lambda: None)()
    except (NotImplementedError, AttributeError):
        return False
    return projection is module


class Units:
    """The units inside one region, for one call; ``is_open``: their parameters are gathered."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = list(modules)
        self._kept = [{name: m.__dict__[name] for name in _FORWARD_HOOKS} for m in self._modules]
        self._inputs: list[tuple[Any, ...]] = []
        self.is_open = False

    def __bool__(self) -> bool:
        return bool(self._modules)

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """While a graph is captured or runs: the units have no hooks."""
        self._hide()
        try:
            yield
        finally:
            self._show()

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Inside ``hidden``: the original code runs after all."""
        # it calls the hooks itself, unless they have gathered the parameters already: then it runs
        # with these, so that each process gathers as often as the others
        if self.is_open:
            yield
            return
        self._show()
        try:
            yield
        finally:
            self._hide()

    def _hide(self) -> None:
        for module in self._modules:
            module.__dict__.update({name: OrderedDict() for name in _FORWARD_HOOKS})

    def _show(self) -> None:
        for module, hooks in zip(self._modules, self._kept, strict=True):
            module.__dict__.update(hooks)

    def before(self, hidden: Tensor) -> Tensor:
        """Gather the parameters; returns ``hidden``, (B, T, H), whose gradient releases them."""
        self._inputs, self.is_open = [], True
        for module, hooks in zip(self._modules, self._kept, strict=True):
            for key, hook in hooks["_forward_pre_hooks"].items():
                if key in module._forward_pre_hooks_with_kwargs:
                    result = (hook(module, (hidden,), {}) or (None, None))[0]
                else:
                    result = hook(module, (hidden,))
                if result is not None:
                    (hidden,) = result if isinstance(result, tuple) else (result,)
            self._inputs.append((hidden,))
        return hidden

    def after(self, results: Any) -> Any:
        """Release the parameters; returns the results, whose gradients gather them first."""
        self.is_open = False
        units = list(zip(self._modules, self._kept, self._inputs, strict=True))
        for module, hooks, inputs in reversed(units):
            for key, hook in hooks["_forward_hooks"].items():
                keywords: Any = ({},) if key in module._forward_hooks_with_kwargs else ()
                result = hook(module, inputs, *keywords, results)
                results = results if result is None else result
        return results


def gathered(
    units: Units, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a region whose units are gathered; the first (B, T, H) are hidden states."""
    # where there are none, the gradient of nothing releases the parameters; the engines do at the
    # end of backward
    for i, value in enumerate(args):
        if _is_hidden(value):
            return (*args[:i], units.before(value), *args[i + 1 :]), kwargs
    for name, value in kwargs.items():
        if _is_hidden(value):
            return args, {**kwargs, name: units.before(value)}
    units.before(torch.zeros(()))
    return args, kwargs


def _is_hidden(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 3 and value.is_floating_point()
