"""When the cache that a model fills by default, and nobody reads in training, is left out.

Transformers' models fill a key/value cache unless ``use_cache=False`` is passed. What is left out
here is left out of the outputs too, so it happens only where the model itself says what the word
means, and where the values stay what they are.
"""

from __future__ import annotations

import inspect
import typing
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any

from torch import nn

_CACHE_ARGUMENTS = ("cache", "past_key_values", "cache_params")
_INDEX = "layer_idx"
"""Where a layer writes in the cache: the convention of ``transformers.Cache.update``."""


def parameters_of(forward: Any, backbone: nn.Module | None) -> dict[str, inspect.Parameter]:
    """The parameters of a head, and of the backbone where the head passes on what it is given."""
    own = dict(inspect.signature(forward).parameters)
    passes_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in own.values())
    if passes_on and backbone is not None:
        own |= {n: p for n, p in inspect.signature(backbone.forward).parameters.items()
                if n not in own}  # fmt: skip
    return own


def has_cache_switch(
    forward: Callable[..., Any], parameters: Mapping[str, inspect.Parameter]
) -> bool:
    """Whether a causal LM's signature says what ``use_cache`` means, and that it may be left out.

    A call that does not say it means the configuration, and the outputs are a record with named
    fields: a plain tuple would lose one of its places.

    Args:
        forward: its forward.
        parameters: what the forward takes, as ``parameters_of`` says.
    """
    switch = parameters.get("use_cache")
    if switch is None or switch.default is not None:
        return False
    return "return_dict" in parameters or any(map(_is_record, _returned(forward)))


def uses_cache(module: nn.Module) -> bool:
    """Whether the configuration of a causal LM asks for a cache now."""
    config = getattr(module, "config", None)
    if getattr(config, "use_cache", None) is True:
        return True
    inner = getattr(config, "get_text_config", lambda: None)()
    return getattr(inner, "use_cache", None) is True


def _returned(forward: Callable[..., Any]) -> tuple[Any, ...]:
    """The types that a function says it returns."""
    try:
        returned = typing.get_type_hints(inspect.unwrap(forward)).get("return")
    except Exception:  # a name that is imported for type checkers alone
        returned = inspect.signature(forward).return_annotation
    return typing.get_args(returned) or (returned,)


def _is_record(kind: Any) -> bool:
    """Whether a type is an output class: a mapping of its own fields."""
    return isinstance(kind, type) and issubclass(kind, Mapping) and is_dataclass(kind)


def cache_is_unused(kwargs: Mapping[str, Any]) -> bool:
    """Whether nobody reads, in this call, the cache that is filled by default.

    Transformers finds packed samples in ``position_ids`` only without a cache.
    """
    return (
        kwargs.get("use_cache") is None
        and all(kwargs.get(n) is None for n in _CACHE_ARGUMENTS)
        and (kwargs.get("position_ids") is None or kwargs.get("attention_mask") is not None)
    )


class SharedCacheIndices:
    """Whether two layers write to one place of the cache: the second reads what the first wrote.

    Asked at each step; the layers are gone through only when they, or their parts, are others.
    """

    def __init__(self) -> None:
        self._known: tuple[list[Any], bool] = ([], False)

    def any_in(self, backbone: nn.Module) -> bool:
        """Whether there are such layers in ``backbone``."""
        layers = [
            layer
            for stack in _stacks(backbone)
            for layer in stack._modules.values()
            if layer is not None
        ]
        parts = [p for layer in layers for p in (layer, *layer._modules.values()) if p is not None]
        # references, and not their ids: another module may get the id of one that is gone
        now = [(weakref.ref(p), p.__dict__.get(_INDEX)) for p in parts]
        if now != self._known[0]:
            self._known = now, any(map(_share_an_index, _stacks(backbone)))
        return self._known[1]


def _stacks(module: nn.Module) -> Iterator[nn.ModuleList]:
    """The outermost lists of modules."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _stacks(child)


def _share_an_index(stack: nn.ModuleList) -> bool:
    """Whether two layers are one module, or have one index."""
    seen: set[tuple[str, int]] = set()
    layers = [m for m in stack._modules.values() if m is not None]
    for layer in layers:
        for path, module in layer.named_modules():
            index = module.__dict__.get(_INDEX)
            if type(index) is int and index >= 0:
                if (path, index) in seen:
                    return True
                seen.add((path, index))
    composite = all(any(True for _ in m.children()) for m in layers)
    return composite and len(set(map(id, layers))) < len(layers)
