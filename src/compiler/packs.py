"""Which models may be given packed rows, decided by their structure: nothing is called.

In a packed row each sample must see its own tokens alone. Three kinds of code keep samples apart:
attention whose mask is made from ``position_ids``, and the scans and short convolutions that take
segments (``segments.py``). Every other mixer of positions is refused. A mixer is found by what
transformers needs for generation: what mixes positions takes a cache.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from torch import nn

from ..graph.opaque.functions import CONVOLUTION, segmented_convention
from ..graph.opaque.hub_kernels import behind
from ..graph.signatures import names_in
from . import regions
from .bypass import CACHE_ARGUMENTS, is_container
from .copies.opaque_calls import takes_segments
from .sample_masks import makes_masks

_CACHES = {*CACHE_ARGUMENTS, "past_key_value", "layer_past", "state", "use_cache"}
_ATTENTION = {"ALL_ATTENTION_FUNCTIONS", "scaled_dot_product_attention", "softmax"}


def unpackable(model: nn.Module, optimized: bool = True) -> str:
    """Return why samples in packed rows of ``model`` would see each other; empty if they do not.

    Args:
        model: the model, not optimized.
        optimized: whether it will be optimized with ``packs=True``.
    """
    blocks = [r.module for r in regions.find(model) if r.kind == "block"]
    cached = [b for b in blocks if any(map(_takes_cache, b.modules()))]
    paths = {m: f"{path} ({type(m).__name__})" for path, m in model.named_modules()}
    attends = False
    for mixer in _mixers(cached or blocks):
        called = [f for f in _called(mixer) if takes_segments(f)]
        kinds = {convention.name for f in called if (convention := segmented_convention(f))}
        if _has_convolution(mixer) and CONVOLUTION.name not in kinds:
            return f"{paths[mixer]} has a convolution that does not take segments"
        if kinds and not optimized:
            return f"{paths[mixer]} keeps samples apart in an optimized model only"
        if not kinds and not _attends(mixer):
            return f"{paths[mixer]} mixes positions, and does not take segments"
        attends |= not kinds
    holders = _around(model, cached or blocks)
    if any(inner not in set(outer.modules()) for outer, inner in pairwise(holders)):
        return f"{type(model).__name__} has several stacks of layers"
    if attends and holders and not _masks_samples(holders, optimized):
        when = "" if optimized else ", except in an optimized model"
        return f"{type(model).__name__} makes its attention mask without position_ids{when}"
    return ""


def _masks_samples(holders: list[nn.Module], optimized: bool) -> bool:
    """True if masks are made from ``position_ids``, in the model's code or in our copy of it."""
    makers = {f: m for m in holders for f in _functions(m) if _makes_masks(f)}
    has_bias = any("alibi" in name for name in _names(holders))  # in place of positions
    if not has_bias and any("position_ids" not in _parameters(m) for m in makers.values()):
        return False
    is_copied = optimized and any(f is _forward(m) for f, m in makers.items())
    return is_copied or any(map(_passes_positions, makers))


def unpackable_images(model: nn.Module) -> str:
    """Return why images in packed rows of ``model`` would see other samples, or an empty text."""
    blocks = [r.module for r in regions.find(model) if r.kind == "block"]
    cached = [b for b in blocks if any(map(_takes_cache, b.modules()))]
    for m in _around(model, cached)[:-1]:
        if any(map(_makes_masks, _functions(m))):
            return f"{type(m).__name__} makes a mask of its images for rows of one sample"
    return ""


def _around(model: nn.Module, blocks: list[nn.Module]) -> list[nn.Module]:
    """The modules that hold blocks, the innermost last."""
    inner = set(blocks)
    holders = (m for m in model.modules() if m not in inner and not is_container(m))
    return [m for m in holders if not inner.isdisjoint(m.modules())]


def _takes_cache(module: nn.Module) -> bool:
    return not _CACHES.isdisjoint(_parameters(module))


def _parameters(module: nn.Module) -> set[str]:
    function = None if is_container(module) else _forward(module)
    return set(inspect.signature(function).parameters) if callable(function) else set()


def _mixers(blocks: list[nn.Module]) -> Iterator[nn.Module]:
    """The innermost modules that take a cache, or else the blocks."""
    takers = [[m for m in block.modules() if _takes_cache(m)] for block in blocks]
    passing = {type(block) for block, found in zip(blocks, takers, strict=True) if found[1:]}
    for block, found in zip(blocks, takers, strict=True):
        if found == [block] and type(block) in passing:
            continue  # its mixer is an MLP, which takes no cache
        for m in found or [block]:
            if set(list(m.modules())[1:]).isdisjoint(found):
                yield m


def _attends(mixer: nn.Module) -> bool:
    """True for attention that is given a mask, and selects no keys by itself."""
    names = _names([mixer])
    return (
        "attention_mask" in _parameters(mixer)
        and not _ATTENTION.isdisjoint(names)
        and "topk" not in names
    )


def _has_convolution(mixer: nn.Module) -> bool:
    return any(isinstance(m, nn.Conv1d) and max(m.kernel_size) > 1 for m in mixer.modules())


# --- the code of a module -------------------------------------------------------------------------


def _forward(module: nn.Module) -> Any:
    forward = module.__dict__.get("forward", type(module).forward)
    return inspect.unwrap(getattr(forward, "__func__", forward))


def _called(module: nn.Module) -> list[Any]:
    """The globals that the forward of ``module`` names."""
    # also where kernels of the Hub may be in the place of a function: those that this one names
    found: list[Any] = []
    seen, left = set(), [_forward(module)]
    while left:
        function = left.pop()
        if not isinstance(function, types.FunctionType) or function in seen:
            continue
        seen.add(function)
        for value in map(function.__globals__.get, names_in(function.__code__)):
            found.append(behind(value))
            left += [] if found[-1] is value else [inspect.unwrap(found[-1])]
    return [value for value in found if value is not None]


def _functions(module: nn.Module) -> list[types.FunctionType]:
    """The forward of ``module``, and the methods and functions of its file that it may call."""
    found: dict[types.FunctionType, None] = {}
    left = [_forward(module)]
    while left:
        function = left.pop()
        if not isinstance(function, types.FunctionType) or function in found:
            continue
        found[function] = None
        for name in names_in(function.__code__):
            method = inspect.getattr_static(type(module), name, None)
            if isinstance(method, types.FunctionType) and not hasattr(nn.Module, name):
                left.append(inspect.unwrap(method))
            value = behind(function.__globals__.get(name))
            if getattr(value, "__module__", None) == function.__module__:
                left.append(inspect.unwrap(value) if callable(value) else None)
    return list(found)


def _names(modules: list[nn.Module]) -> set[str]:
    return set().union(*(names_in(f.__code__) for m in modules for f in _functions(m)))


def _makes_masks(function: types.FunctionType) -> bool:
    found = map(function.__globals__.get, names_in(function.__code__))
    return any(isinstance(f, types.FunctionType) and makes_masks(f) for f in found)


def _passes_positions(function: types.FunctionType) -> bool:
    """True if the arguments of a mask, in the code of ``function``, include the positions."""
    groups = (set(c) for c in function.__code__.co_consts if isinstance(c, tuple))
    return any({"config", "inputs_embeds", "position_ids"} <= group for group in groups)
