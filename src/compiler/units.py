"""Sharded parameters inside a region: the hooks that gather and release them run around its graph.

FSDP2 and ZeRO-3 keep a part of each parameter on each process. Hooks on the modules that are their
units gather the rest before a unit's forward and before its backward pass, and release it after.
A captured graph calls no submodule, so these hooks are called for all units inside a region at
once: what comes before a forward gets the region's hidden states, what comes after one gets its
results. In a backward pass the first come last, and the second first.
"""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_ENGINES = (
    "torch.distributed.fsdp._fully_shard.",
    "deepspeed.runtime.zero.",
    "deepspeed.utils.nvtx",  # which hides some of the hooks of the one before
)
_DIVIDING = {
    "torch.distributed.tensor": "tensor parallelism",
    "accelerate.big_modeling": "context parallelism",
}
"""Whose hooks exchange values between processes where a module stands."""
_FORWARD_HOOKS = "_forward_pre_hooks", "_forward_hooks"


def is_unit(module: nn.Module, region: nn.Module) -> bool:
    """Whether ``module`` has no other hooks than those of an engine that shards parameters.

    A unit of FSDP2 that casts its inputs or outputs in another way than ``region`` is none: around
    a whole region it would cast something else. The projection of a head may cast its inputs, which
    are the hidden states that the region is given.
    """
    if module._backward_hooks or module._backward_pre_hooks:
        return False
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    if not hooks or not all(map(_is_engines, hooks)):
        return False
    casts = _casts(module)
    if not any(casts) or casts == _casts(region):
        return True
    return casts[1] is None and _is_projection(module, region)


def _is_projection(module: nn.Module, region: nn.Module) -> bool:
    """Whether ``module`` is what a causal LM computes its logits with."""
    try:
        projection = getattr(region, "get_output_embeddings", lambda: None)()
    except (NotImplementedError, AttributeError):
        return False
    return projection is module


def divided_by(module: nn.Module) -> str | None:
    """What divides the work of a module between processes, as its hooks say; None: nothing."""
    # they exchange values before or after its forward, which no captured graph may leave out
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        place = str(getattr(hook, "__module__", ""))
        for engine, name in _DIVIDING.items():
            if place.startswith(engine):
                return name
    return None


def _casts(module: nn.Module) -> tuple[Any, Any]:
    """The dtypes that FSDP2 casts inputs and outputs of ``module`` to; None: it does not."""
    state = getattr(module, "_get_fsdp_state", lambda: None)()
    policy = getattr(state, "_mp_policy", None)
    if policy is None:
        return None, None
    return policy.param_dtype if policy.cast_forward_inputs else None, policy.output_dtype


def _is_engines(hook: Any) -> bool:
    is_engine = _known.get(hook) if isinstance(hook, types.FunctionType) else None
    if is_engine is None:
        function = hook.func if isinstance(hook, functools.partial) else hook
        function = inspect.unwrap(getattr(function, "__func__", function))
        is_engine = str(getattr(function, "__module__", "")).startswith(_ENGINES)
        if isinstance(hook, types.FunctionType):
            _known[hook] = is_engine
    return is_engine


_known: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


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
