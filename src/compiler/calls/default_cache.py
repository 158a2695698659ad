"""The cache that models fill by default, which hardly anybody reads in training.

Transformers' models fill one unless ``use_cache=False`` is passed or configured, and blocks that
fill a cache run as they were. So in training calls that say nothing about a cache, the one that the
model makes is returned empty, and fills itself when somebody uses it: the model's original code
runs once more, with the same random numbers. That shows that caches are read here: from then on
this model's are filled as in eager mode.

A cache that is used once backward has begun, or once weights have changed, raises an error.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.direct import is_traced_here
from ...memory.random_state import BufferState, RandomState
from ...sharding import has_shards
from ..bypass import CACHE_ARGUMENTS, is_cache, transform_reason
from ..session import Session
from ..watch import global_hook_reason
from ..withheld import CacheRefused, WithheldCache
from .forwards import Original

_SWITCH = "use_cache"
_INDEX = "layer_idx"
"""Where a layer writes in the cache: the convention of ``transformers.Cache.update``."""

_NO_CACHE = (CacheRefused, AttributeError, TypeError, LookupError, ValueError, AssertionError)
"""What code may raise that gets None where it expects what a block has written to its cache."""


class DefaultCache:
    """The forward of a module that makes a cache by default; called as ``Original`` is."""

    def __init__(self, session: Session, original: Original, run: Callable[..., Any]) -> None:
        # ``run`` calls the original
        self._session, self._original, self._run = session, original, run
        self._indices = SharedCacheIndices()
        self._signature: tuple[Any, inspect.Signature | None] = (None, None)
        # why the cache is filled at once, by module: a copy of one has the same forward
        self._reasons: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        self._deferring: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # have done so once

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Call the original; its blocks do not get a cache that nobody has asked for."""
        state = self._session.state
        if self._keeps_samples_apart(module, args, kwargs):
            return self._run(module, *args, **{**kwargs, _SWITCH: False})
        if not self._is_default(module, args, kwargs):
            return self._run(module, *args, **kwargs)
        before = _Before(module, (args, kwargs), module not in self._deferring)
        withheld = state.withheld = WithheldCache()
        try:
            outputs = self._run(module, *args, **kwargs)
            if withheld.cache is None:
                return outputs
            if withheld.is_used or not any(v is withheld.cache for v in _values(outputs)):
                raise CacheRefused("the model uses the cache itself, or does not return it")
        except _NO_CACHE as error:
            # an error of anything but the cache is nobody's reason to call twice
            if not (isinstance(error, CacheRefused) or withheld.is_used or withheld.is_missed):
                raise
            state.withheld = None
            before.restore()
            outputs = self._run(module, *args, **kwargs)
            self._stop(module, str(error))
            return outputs
        finally:
            state.withheld = None
        self._deferring.add(module)
        before.watch(outputs)
        refill = functools.partial(self._refill, module, args, kwargs, before)
        if state.replay is None:
            withheld.defer(refill)
        else:  # it goes through a graph
            withheld.release()
            state.on_return.append(functools.partial(withheld.defer, refill))
        return outputs

    def _stop(self, module: nn.Module, reason: str) -> None:
        reason = f"its cache is filled at once in training, unless use_cache=False: {reason}"
        self._reasons[module] = reason
        self._session.log.note(module, reason)

    def _is_default(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call is a part of training, and says nothing about a cache."""
        session = self._session
        if not (module.training and torch.is_grad_enabled()) or session.state.withheld is not None:
            return False
        return module not in self._reasons and self._is_silent(module, args, kwargs)

    def _keeps_samples_apart(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        """Whether a call that says nothing about a cache has packs: with one, masks ignore them."""
        if not self._session.choices.options.packs or not self._is_silent(module, args, kwargs):
            return False
        signature = self._signature[1]
        before = list(signature.parameters).index(_SWITCH) if signature is not None else 0
        is_by_position = len(args) + self._original.is_method > before
        return not is_by_position and self._session.state.segments.has_several()

    def _is_silent(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call says nothing about a cache, and its module would make one."""
        session = self._session
        if module in session.log.restored or is_traced_here():
            return False
        if getattr(getattr(module, "config", None), _SWITCH, True) is False:
            return False
        arguments = self._by_name(module, args, kwargs)
        if arguments is None or any(
            arguments.get(n) is not None for n in (_SWITCH, *CACHE_ARGUMENTS)
        ):
            return False
        if any(is_cache(v) for v in arguments.values() if not isinstance(v, (Tensor, nn.Module))):
            return False
        if global_hook_reason() or transform_reason(args, kwargs, session.choices.fake):
            return False
        return not self._indices.any_in(module)

    def _by_name(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any] | None:
        """The arguments by name; None where there is no switch, or the call is a wrong one."""
        function = self._original.function(module)
        if self._signature[0] is not function:
            signature = inspect.signature(function)
            switch = signature.parameters.get(_SWITCH)
            is_switch = switch is not None and switch.default is None
            self._signature = function, signature if is_switch else None
        if self._signature[1] is None:
            return None
        if not args:
            return kwargs
        signature = self._signature[1]
        try:
            bound = signature.bind(
                *((module,) if self._original.is_method else ()), *args, **kwargs
            )
        except TypeError:
            return None
        values = dict(bound.arguments)
        for name, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                values |= values.pop(name, {})
        return values

    def _refill(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], before: _Before
    ) -> Any:
        """The filled cache, of a call that is made once more."""
        self._stop(module, "an earlier one was read")
        before.require_unchanged(module, (args, kwargs))
        now = RandomState.now(before.random.device)
        before.random.restore()
        enabled, dtype = before.autocast
        device = before.random.device.type
        try:
            with (
                torch.inference_mode(False),
                torch.enable_grad(),
                torch.autocast(device, dtype, enabled),
            ):
                outputs = self._run(module, *args, **kwargs)
        finally:
            now.restore()
        return next(v for v in _values(outputs) if is_cache(v))


def _values(outputs: Any) -> Iterable[Any]:
    if isinstance(outputs, Mapping):
        return outputs.values()
    return outputs if isinstance(outputs, (tuple, list)) else ()


class _Before:
    """What a call of a module depends on besides its arguments."""

    def __init__(self, module: nn.Module, arguments: Any, with_buffers: bool) -> None:
        self._state = _state(module, arguments)
        self._buffers = BufferState(module) if with_buffers else None
        # weights that are kept elsewhere are on meta; buffers are where the module computes
        tensors = itertools.chain(module.parameters(), module.buffers(), _tensors(arguments))
        device = next((t.device for t in tensors if not t.is_meta), torch.device("cpu"))
        self.random = RandomState.now(device)
        kind = device.type
        self.autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        self._has_begun: list[bool] = []

    def restore(self) -> None:
        """Undo what a call has drawn, and written to buffers, before it is made once more."""
        self.random.restore()
        if self._buffers is not None:
            self._buffers.restore()

    def watch(self, outputs: Any) -> None:
        """Note when a backward pass of the call begins."""
        begun = self._has_begun
        for t in _tensors(outputs):
            if t.grad_fn is not None:
                t.grad_fn.register_prehook(lambda grads: begun.append(True))

    def require_unchanged(self, module: nn.Module, arguments: Any) -> None:
        """Raise where the call could not be made once more."""
        now = _state(module, arguments)
        is_same = len(now) == len(self._state) and all(
            a[0] is b[0] and a[1] == b[1] for a, b in zip(now, self._state, strict=True)
        )
        if self._has_begun or not is_same or has_shards(module):
            raise RuntimeError(
                "the cache of this training call was not computed, and can no longer be: read it "
                "before backward and before weights change, and not of a sharded model; or pass "
                "use_cache=True, which fills it at once"
            )


def _state(module: nn.Module, arguments: Any) -> list[tuple[Any, Any]]:
    """The modules, parameters, buffers and given tensors of a call, and what changes in them."""
    modules = list(module.modules())
    state: list[tuple[Any, Any]] = [(m, m.training) for m in modules]
    for m in modules:
        state += [(t, _version(t)) for t in (*m._parameters.values(), *m._buffers.values())]
    return state + [(t, _version(t)) for t in _tensors(arguments)]


def _version(t: Tensor | None) -> int | None:
    return None if t is None or t.is_inference() else t._version


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))


# ------------------------------------------------------------------- layers that share their place


class SharedCacheIndices:
    """Whether two layers write to one place of the cache: the second reads what the first wrote.

    Asked at each step; the layers are searched only when they, or their parts, have changed.
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
