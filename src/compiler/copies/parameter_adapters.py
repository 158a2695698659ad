"""Stacked parameters as functions of tensors: adapters of PEFT's, and experts in few bits.

PEFT's ``ParamWrapper`` registers a parametrization of the module that it wraps, for one call: a new
class each time, which no graph can be captured of. While a block is captured, such wrappers run
``_forward`` below instead. It calls the forward of the module inside with something in the module's
place that has the sum ``W + s·B·A`` where the module has W. Neither the module nor its class
changes. ``PackedExperts``, whose class TorchDynamo does not know, are read the same way.
"""

from __future__ import annotations

import functools
import sys
import types
from typing import Any

from torch import Tensor, nn

from ...graph.opaque.stacks import packed_stack, updated_stack
from ...kernels.moe.packed_experts import PackedExperts
from ...upstream import changed
from .forward_copies import function_of


def functional(module: nn.Module, copy: Any) -> Any:
    """What a module runs for its forward, of which there may be a copy; None: what it is."""
    layer = sys.modules.get("peft.tuners.lora.layer")
    wrapper = getattr(layer, "ParamWrapper", None)
    if wrapper and function_of(module) is wrapper.__dict__.get("forward"):
        return _forward if changed("adapters of parameters") is None else copy
    names = tuple(n for n, p in module._parameters.items() if isinstance(p, PackedExperts))
    return _reading_packed(copy or function_of(module), names) if names else copy


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """``ParamWrapper.forward``, for the wrapper and those nested in it, one for each parameter."""
    weights: dict[str, Tensor] = {}
    module = self
    while isinstance(module, type(self)):
        module._check_forward_args(x, *args, **kwargs)
        if module.disable_adapters and module.merged:
            module.unmerge()
        names = [a for a in module.active_adapters if a in module.lora_A]
        if names and not module.disable_adapters and not module.merged:
            weight = weights.get(module.parameter_name, _read(module.get_param()))
            weights[module.parameter_name] = _sum(module, weight, names)
        module = module.base_layer
    if not weights:
        return module(x, *args, **kwargs)
    return module.forward.__func__(_With(module, weights), x, *args, **kwargs)


def _sum(wrapper: Any, weight: Any, names: list[str]) -> Any:
    if wrapper.num_experts == 1 or weight.dtype.itemsize == 1:
        delta = wrapper.get_delta_weight(names[0])
        for name in names[1:]:
            delta = delta + wrapper.get_delta_weight(name)
        return weight + delta
    left, right = [], []
    for name in names:
        a, b = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
        a = a.reshape(wrapper.num_experts, -1, a.shape[-1])  # (E, r, in)
        b = b.reshape(b.shape[0], -1, wrapper.num_experts).permute(2, 0, 1)  # (E, out, r)
        turned = wrapper._did_swap_in_out_features  # stored as (E, out, in)
        left.append(b if turned else a.transpose(-2, -1))
        right.append(a if turned else b.transpose(-2, -1))
    return updated_stack(weight, left, right, [wrapper.scaling[name] for name in names])


@functools.cache
def _reading_packed(forward: Any, names: tuple[str, ...]) -> Any:
    """``forward`` of a module whose parameters of these names are ``PackedExperts``."""

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        module, known = (self._module, self._weights) if isinstance(self, _With) else (self, {})
        weights = {n: _read(getattr(module, n)) for n in names if n not in known}
        return forward(_With(module, {**weights, **known}), *args, **kwargs)

    return run


def _read(weight: Any) -> Any:
    if not isinstance(weight, PackedExperts):
        return weight
    return packed_stack(list(weight.parts), *weight.constants, weight.dtype)


class _With:
    """A module that has other tensors in place of some of its parameters, for its own methods."""

    def __init__(self, module: nn.Module, weights: dict[str, Tensor]) -> None:
        self._module, self._weights = module, weights

    def __getattr__(self, name: str) -> Any:
        if name in self._weights:
            return self._weights[name]
        function = getattr(type(self._module), name, None)
        if isinstance(function, types.FunctionType):
            return functools.partial(function, self)
        return getattr(self._module, name)
