"""A cache that the blocks of a call do not get, and that stays empty until somebody uses it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..sharding import gathers
from .bypass import is_cache

_FILL = "__fusewright_fill__"


class CacheRefused(Exception):
    """The blocks of a call must be given its cache after all."""


class WithheldCache:
    """The empty cache that one call of a model has made for its blocks, which do not get it.

    Where the model itself uses it, once a block has been called, ``CacheRefused`` is raised.
    """

    def __init__(self) -> None:
        self.cache: Any = None
        self.is_used = False  # by the model itself
        self.is_missed = False  # a block may have returned less than with its cache
        self._blocks: set[nn.Module] = set()

    def withhold(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call of ``block`` without the cache."""
        others = [
            v for v in (*args, *kwargs.values())
            if v is not self.cache and not isinstance(v, (Tensor, nn.Module)) and is_cache(v)
        ]  # fmt: skip
        if self.cache is None and others:
            self.cache = others.pop()
            _defer(self.cache, self._refuse)
        if self.cache is None or all(v is not self.cache for v in (*args, *kwargs.values())):
            return args, kwargs
        if any(v is not self.cache for v in others):
            raise CacheRefused("its blocks get several caches")
        if block in self._blocks:
            raise CacheRefused("a block is called twice with one cache")
        hooks = block._forward_hooks_with_kwargs or block._forward_pre_hooks_with_kwargs
        if hooks and not gathers(block):
            raise CacheRefused("a hook on a block gets the cache")
        self._blocks.add(block)
        return tuple(None if v is self.cache else v for v in args), {
            k: None if v is self.cache else v for k, v in kwargs.items()
        }

    def note(self, results: Any) -> None:
        """Look at what a block without the cache has returned."""
        self.is_missed = self.is_missed or isinstance(results, (tuple, list))

    def defer(self, refill: Callable[[], Any]) -> None:
        """Let the cache become what ``refill`` returns at its first use."""
        self.release()
        _defer(self.cache, refill)

    def release(self) -> None:
        """Let the cache be an ordinary object again."""
        kind = type(self.cache)
        if kind in _kinds.values():
            _become(self.cache, kind.__mro__[1])

    def _refuse(self) -> Any:
        self.is_used = True
        raise CacheRefused("the model uses the cache itself")


# A class for each class of caches, whose objects do something first when they are used: anything
# but ``type`` and ``isinstance`` is a use.


def _defer(cache: Any, fill: Callable[[], Any]) -> None:
    try:
        cache.__class__ = _deferred(type(cache))
    except TypeError as error:  # of a class with another layout
        raise CacheRefused("its class cannot be exchanged") from error
    object.__getattribute__(cache, "__dict__")[_FILL] = fill


def _become(cache: Any, kind: type) -> None:
    object.__setattr__(cache, "__class__", kind)
    del cache.__dict__[_FILL]


def _fill(cache: Any, kind: type) -> None:
    full = object.__getattribute__(cache, "__dict__")[_FILL]()
    _become(cache, kind)
    cache.__dict__.clear()
    cache.__dict__.update(full.__dict__)


_kinds: dict[type, type] = {}


def _deferred(kind: type) -> type:
    """A subclass of ``kind``; any use of an object of it fills the object first."""
    if kind in _kinds:
        return _kinds[kind]

    def __getattribute__(self: Any, name: str) -> Any:
        if name == "__class__":
            return type(self)
        if name in object.__getattribute__(self, "__dict__") or hasattr(kind, name):
            _fill(self, kind)
            return getattr(self, name)
        raise AttributeError(f"{kind.__name__!r} object has no attribute {name!r}")

    def __setattr__(self: Any, name: str, value: Any) -> None:
        _fill(self, kind)
        setattr(self, name, value)

    def operator(name: str) -> Callable[..., Any]:
        def method(self: Any, *args: Any) -> Any:
            _fill(self, kind)
            return getattr(kind, name)(self, *args)

        return method

    # Python looks the methods of operators up in the class
    names = [n for n in dir(kind) if n.startswith("__") and inspect.isfunction(getattr(kind, n))]
    methods: dict[str, Any] = {n: operator(n) for n in names if n != "__init__"}
    methods |= {"__getattribute__": __getattribute__, "__setattr__": __setattr__}
    # what is no question about its values is answered without them, also when it is too late
    methods["__repr__"] = lambda self: f"{kind.__name__}(not computed)"
    methods["__bool__"] = lambda self: True
    methods |= {"__slots__": (), "__module__": kind.__module__}
    return _kinds.setdefault(kind, type(kind.__name__, (kind,), methods))
