"""Training calls that say nothing about a cache run without the one that models make by default.

Blocks that fill a cache run their original code. ``transformers.Trainer`` and TRL switch the cache
off; in other training loops (``model(ids, labels=ids)``) it is made, and hardly ever read. Such
calls get ``use_cache=False``. Their outputs hold an object that raises an error when it is used:
it names ``use_cache=True``, which runs the original code and fills the cache.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import nn

from ...sharding import gathers
from ..bypass import CACHE_ARGUMENTS, transform_reason
from ..session import Session
from ..watch import global_hook_reason
from .forwards import Original

_SWITCH, _INDEX = "use_cache", "layer_idx"
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class DefaultCache:
    """The default cache of a causal LM, or of a backbone, with the forward ``original``.

    ``backbones`` gives the modules that a causal LM passes its other arguments on to.
    """

    def __init__(
        self,
        session: Session,
        original: Original,
        backbones: Callable[[nn.Module], Sequence[nn.Module]] = lambda module: (),
    ) -> None:
        self._session, self._original, self._backbones = session, original, backbones
        self._known: tuple[Any, list[str] | None] = (None, None)

    def is_unwanted(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """True for a training call that says nothing about the cache it would make."""
        names = self._positional(module) if _is_configured(module) else None
        if names is None or _SWITCH in names[: len(args)]:
            return False
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if any(given.get(n) is not None for n in (_SWITCH, *CACHE_ARGUMENTS)):
            return False
        choices, several = self._session.choices, False
        hooked = [*self._backbones(module), *[module] * (self._session.state.replay is not None)]
        if any(m._forward_hooks and not gathers(m) for m in hooked):  # which get the cache
            return False
        if given.get("attention_mask") is None or choices.options.packs:
            # with a cache, masks ignore the positions: samples that share a row see each other
            several = self._session.state.segments.has_several()
        if several and not choices.options.packs:
            return False
        return (
            (several or (module.training and torch.is_grad_enabled()))
            and given.get("return_dict", getattr(module.config, "return_dict", True)) is not False
            and global_hook_reason() is None
            and transform_reason(args, kwargs, choices.fake) is None
            and all(map(_is_ordinary, _stacks(module)))
        )

    def replaced(self, outputs: Any) -> Any:
        """The outputs of such a call, with an object in the place of the cache."""
        if not (isinstance(outputs, Mapping) and is_dataclass(outputs)):
            return outputs
        names = [f.name for f in fields(outputs)]
        name = next((n for n in CACHE_ARGUMENTS if n in names and outputs.get(n) is None), None)
        if name is None:
            return outputs
        from transformers import DynamicCache

        outputs[name] = cache = DynamicCache()
        for later in names[names.index(name) + 1 :]:  # the order of eager outputs
            if later in outputs:
                outputs.move_to_end(later)
        if self._session.state.replay is None:
            _close(cache)
        else:  # it goes through a graph
            self._session.state.on_return.append(functools.partial(_close, cache))
        return outputs

    def _positional(self, module: nn.Module) -> list[str] | None:
        """The positional parameters; None where a forward has no switch that may be left out."""
        function = self._original.function(module)
        if self._known[0] is not function:
            own = inspect.signature(function).parameters
            names = [n for n, p in own.items() if p.kind in _POSITIONAL]
            every = dict(own)
            if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in own.values()):
                for backbone in self._backbones(module):
                    every = {**inspect.signature(backbone.forward).parameters, **every}
            switch = every.get(_SWITCH)
            # a tuple would lose one of its places
            is_record = "return_dict" in every or any(map(_is_record, _returned(function)))
            is_switch = switch is not None and switch.default is None and is_record
            names = names[1:] if self._original.is_method else names
            self._known = function, names if is_switch else None
        return self._known[1]


def _is_configured(module: nn.Module) -> bool:
    """Return True if the configuration asks for a cache; an encoder makes none."""
    config = getattr(module, "config", None)
    if getattr(config, "is_decoder", True) is False and not getattr(
        config, "is_encoder_decoder", False
    ):
        return False
    inner = getattr(config, "get_text_config", lambda: None)()
    return any(getattr(c, _SWITCH, None) is True for c in (config, inner))


def _returned(forward: Callable[..., Any]) -> tuple[Any, ...]:
    """The types that a function says it returns."""
    try:
        returned = typing.get_type_hints(inspect.unwrap(forward)).get("return")
    except Exception:  # a name that is imported for type checkers alone
        returned = inspect.signature(forward).return_annotation
    return typing.get_args(returned) or (returned,)


def _is_record(kind: Any) -> bool:
    """Return True for an output class: a dataclass that is a mapping of its fields."""
    return isinstance(kind, type) and issubclass(kind, Mapping) and is_dataclass(kind)


def _stacks(module: nn.Module) -> Iterator[nn.ModuleList]:
    """The outermost lists of modules."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _stacks(child)


def _is_ordinary(stack: nn.ModuleList) -> bool:
    """Return True if the layers read nothing from the cache that their model makes for them."""
    seen: set[Any] = set()
    for layer in filter(None, stack._modules.values()):
        # a checkpoint drops the cache
        if getattr(layer, "gradient_checkpointing", False):
            return False
        if layer._modules and layer in seen:
            return False
        seen.add(layer)
        for path, part in _parts(layer, ""):
            hooked = part._forward_hooks_with_kwargs or part._forward_pre_hooks_with_kwargs
            if hooked and not gathers(part):  # it sees the cache
                return False
            index = part.__dict__.get(_INDEX)
            if type(index) is not int or index < 0:  # -1: its caller says which place it has
                continue
            if (path, index) in seen:  # it reads what another one wrote
                return False
            seen.add((path, index))
    return True


def _parts(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The module and all below it, with their paths."""
    yield path, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _parts(child, f"{path}.{name}")


def _close(cache: Any) -> None:
    cache.__dict__.clear()
    cache.__class__ = _unmade()


@functools.cache
def _unmade() -> type:
    """A class of caches that raise an error when they are used."""
    from transformers import DynamicCache

    attributes = {*dir(DynamicCache), *vars(DynamicCache())}

    def refuse(*_: Any) -> Any:
        raise RuntimeError(NOT_MADE)

    def getattribute(self: Any, name: str) -> Any:
        if name in attributes and not name.startswith("__"):
            refuse()
        return object.__getattribute__(self, name)

    kept = ("__init__", "__repr__", "__class__", "__bool__")
    operators = {n for n in dir(DynamicCache) if inspect.isfunction(getattr(DynamicCache, n))}
    methods: dict[str, Any] = {
        n: refuse
        for n in (*operators, "__deepcopy__", "__reduce_ex__", "__setattr__")
        if n.startswith("__") and n not in kept
    }
    methods |= {"__getattribute__": getattribute, "__bool__": lambda self: True}
    methods["__repr__"] = lambda self: "DynamicCache(not made)"
    return type(DynamicCache.__name__, (DynamicCache,), methods)


NOT_MADE = (
    "this training call made no cache, since it did not ask for one: pass use_cache=True, which "
    "runs the original code of the blocks"
)
