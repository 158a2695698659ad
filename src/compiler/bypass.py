"""When a call of a region bypasses its graph: caches, inner outputs, tracing, hooks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.overrides import _get_current_function_mode_stack

from ..sharding import divided_by, unreadable
from .units import is_unit

A_CACHE = (
    "a cache was passed, or made by default in model.eval() (in training call model.train(), "
    "elsewhere pass use_cache=False)"
)

CACHE_ARGUMENTS = ("past_key_values", "cache", "cache_params")
"""What transformers' forwards call the cache that they are given."""


def bypass_reason(
    args: tuple[Any, ...], kwargs: dict[str, Any], hooks: Hooks, fake: bool = False
) -> str | None:
    """Why this call of a region must run the original forward, or None."""
    reason = transform_reason(args, kwargs, fake)
    if reason is not None:
        return reason
    for value in (*args, *kwargs.values()):
        if value is None or isinstance(value, (Tensor, int, float, str)):
            continue
        if is_cache(value):
            return A_CACHE
        if _may_collect(value):
            return f"a {type(value).__name__} was passed, which may collect values as a cache does"
    if kwargs.get("output_attentions"):  # hidden states are what hooks on whole blocks see
        return "attentions were asked for"
    if torch._C._get_tracing_state() is not None:
        return "the model is being traced by torch.jit"
    if hooks.divided:
        return f"{hooks.divided} divides the work of its submodule {hooks.others}"
    if hooks.unreadable:
        return f"how its submodule {hooks.others} is sharded is not known: {hooks.unreadable}"
    return f"a hook is registered on its submodule {hooks.others}" if hooks.others else None


def passes_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether one of the arguments is a cache."""
    return any(not isinstance(v, Tensor) and is_cache(v) for v in (*kwargs.values(), *args))


def transform_reason(
    args: tuple[Any, ...], kwargs: dict[str, Any], fake: bool = False
) -> str | None:
    """Why a call is no ordinary one: a transform runs the model, or its tensors have no values.

    Neither can be captured, and neither says anything about the calls to come. Where the model
    itself is made of ``fake`` tensors, no other calls will come.
    """
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func runs the model (grad, vmap, jacrev, ...)"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation runs the model (jvp)"
    if torch._C._len_torch_function_stack() and not all(
        type(mode).__module__.startswith("torch.") for mode in _get_current_function_mode_stack()
    ):
        return "a TorchFunctionMode is on, which would not see the functions that a graph replaces"
    if is_fx_symbolic_tracing():
        return "the model is being traced by torch.fx"
    if fake:
        return None
    if torch._C._len_torch_dispatch_stack() and any(
        torch._C._get_dispatch_mode(key) is not None for key in _TRACERS
    ):
        return "the model is being traced, or runs on fake tensors"
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and (value.is_meta or isinstance(value, FakeTensor)):
            return "the tensors have no values (meta or fake ones)"
    return None


_TRACERS = (
    torch._C._TorchDispatchModeKey.FAKE,
    torch._C._TorchDispatchModeKey.PROXY,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
)


def is_cache(value: Any) -> bool:
    """Whether this is a key/value or state cache, by what it can do."""
    return any(
        hasattr(value, name)
        for name in ("get_seq_length", "update_conv_state", "update_ssm_state", "conv_states")
    )


def _may_collect(value: Any) -> bool:
    """An object that may collect tensors: its containers hold nothing else, or are empty."""
    # layers hand on keys and values to each other in a mapping; a configuration collects nothing
    excluded = isinstance(value, (nn.Module, Mapping)) or hasattr(value, "to_dict")
    if excluded or type(value).__module__.split(".")[0] in _NO_CACHES:
        return False
    containers = [v for v in getattr(value, "__dict__", {}).values() if isinstance(v, (dict, list))]
    return bool(containers) and all(_holds_tensors(v) for v in containers)


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_holds_tensors(v) for v in value.values())
    if isinstance(value, (list, tuple)):
        return all(_holds_tensors(v) for v in value)
    return value is None or isinstance(value, Tensor)


_NO_CACHES = ("builtins", "torch")
"""Whose objects hold containers without collecting anything in them: masks, for one."""


def is_container(module: nn.Module) -> bool:
    """Whether a module only holds others, as a list does: it is never called itself."""
    return type(module).forward is _NO_FORWARD


_NO_FORWARD = nn.Module.forward


def captured_submodules(
    module: nn.Module, outside: Sequence[tuple[str, ...]] = ()
) -> Iterator[tuple[str, nn.Module]]:
    """The submodules of ``module``, a region, by name, each once, without those captured apart.

    ``outside`` are the paths, name by name, to submodules that are not captured with it. Where one
    is a mere container, the region calls what it holds: blocks are there, but not their parts.
    """
    seen: set[nn.Module] = {module}
    stack: list[tuple[str, tuple[str, ...], nn.Module | None]] = [
        (name, (name,), m) for name, m in module._modules.items()
    ]
    while stack:
        name, path, m = stack.pop()
        if m is None or m in seen or (path in outside and not is_container(m)):
            continue
        seen.add(m)
        yield name, m
        if not (_leads_to(outside, path) and is_block(m)):
            stack += [(f"{name}.{n}", (*path, n), c) for n, c in m._modules.items()]


def _leads_to(outside: Sequence[tuple[str, ...]], path: tuple[str, ...]) -> bool:
    return any(path[: len(names)] == names for names in outside)


def is_block(module: nn.Module) -> bool:
    """Whether a module that a captured head calls itself has a forward that we installed."""
    return "forward" in module.__dict__ and not is_container(module)


@dataclass
class Hooks:
    """The submodules of a region that have hooks, by whose these are.

    ``others`` is the name of the first whose hooks must run where they are, ``divided`` what
    divides its work between processes, and ``unreadable`` why it is not known how it is sharded.
    ``idle`` have nothing but idle hooks, ``units`` nothing but
    those of an engine that shards parameters, by name.
    """

    others: str | None = None
    divided: str | None = None
    idle: list[nn.Module] = field(default_factory=list)
    units: dict[str, nn.Module] = field(default_factory=dict)
    unreadable: str | None = None


def find_hooks(module: nn.Module, captured: Iterable[tuple[str, nn.Module]]) -> Hooks:
    """Look for hooks below ``module``, which a captured graph would not call; its own hooks run."""
    hooks = Hooks()
    for name, m in captured:
        if not has_hooks(m):
            continue
        if is_unit(m, module):
            hooks.units[name] = m
        elif has_idle_hooks(m):
            hooks.idle.append(m)
        else:
            hooks.others, hooks.divided, hooks.unreadable = name, divided_by(m), unreadable(m)
            break
    return hooks


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of ``module`` does anything besides its forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def has_idle_hooks(module: nn.Module) -> bool:
    """Whether all hooks of ``module``, which has some, do nothing in this call."""
    others = module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not others and all(map(_is_idle, module._forward_hooks.values()))


def _is_idle(hook: Any) -> bool:
    """Whether a hook is one of transformers for inner outputs that this call does not ask for."""
    # each collects outputs of one kind, its key, where the call collects these
    if getattr(hook, "__name__", "") != "output_capturing_hook":
        return False
    collector = hook.__globals__.get("_active_collector")
    if collector is None:
        return False
    collected = collector.get()
    cells = dict(zip(hook.__code__.co_freevars, hook.__closure__ or (), strict=True))
    return not collected or ("key" in cells and cells["key"].cell_contents not in collected)


@contextmanager
def hidden_hooks(modules: list[nn.Module]) -> Iterator[None]:
    """Take the forward hooks of ``modules`` off for one call."""
    saved = [m._forward_hooks for m in modules]
    for m in modules:
        m._forward_hooks = OrderedDict()
    try:
        yield
    finally:
        for m, hooks in zip(modules, saved, strict=True):
            m._forward_hooks = hooks
