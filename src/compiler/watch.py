"""What lies below a captured module, and whether it is still what it was captured under.

TorchDynamo guards values, not everything that a call depends on: hooks, and functions that are
found through a class, may change behind its back. A ``Watch`` reads the submodules of a region once
and compares what it read at each call, in loops that run in C.
"""

from __future__ import annotations

import types
import weakref
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _globals
from torch.torch_version import TorchVersion

from ..graph.opaque.hub_kernels import replaceable
from ..graph.opaque.quantized import is_packed
from .bypass import (
    Hooks,
    captured_submodules,
    find_hooks,
    has_hooks,
    has_idle_hooks,
    is_block,
    is_container,
)
from .copies.forward_copies import ForwardCopies
from .copies.opaque_calls import callers_of_mixers, opaque_copies, segmented_copies

_HOOKS = itemgetter(
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
)
_CHILDREN = itemgetter("_modules")
_NONE = Hooks()
_CALL = nn.Module.__call__, nn.Module._call_impl
_HELD = ("__closure__", "__defaults__", "__kwdefaults__")
"""What else a function depends on than its code."""

_HELD_IS_GUARDED = TorchVersion(torch.__version__) >= "2.13"


def global_hook_reason() -> str | None:
    """Why no module may be captured now: what was put on all of them; or None."""
    if (
        _globals._global_forward_hooks
        or _globals._global_forward_pre_hooks
        or _globals._global_backward_hooks
        or _globals._global_backward_pre_hooks
    ):
        return "a hook is registered for all modules (register_module_forward_hook and its like)"
    if (nn.Module.__call__, nn.Module._call_impl) != _CALL:
        return "torch.nn.Module.__call__ has been replaced"
    return None


UNSETTLED = (
    "it, or a module inside it, gets a new class again and again (as by a parametrization that is "
    "registered at every call): each class would need a graph of its own"
)
_MAX_ALIKE = 2
"""Sets of classes of one region that may have the same names."""


class Watches:
    """The watches of one session, and what equal modules have in common."""

    def __init__(self, slot: Any = None) -> None:
        """Make none yet; ``slot`` holds the segments of the block that is called."""
        self.opaque = opaque_copies()
        self.segmented = segmented_copies(slot)
        self._mixers = callers_of_mixers()
        self._mixes: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
        self._watches: weakref.WeakKeyDictionary[nn.Module, Watch] = weakref.WeakKeyDictionary()
        self._methods: dict[tuple[type, ...], _Methods] = {}
        self._alike: weakref.WeakKeyDictionary[nn.Module, Counter[Hashable]] = (
            weakref.WeakKeyDictionary()
        )
        self._seen: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._inlined: weakref.WeakKeyDictionary[nn.Module, Inlined] = weakref.WeakKeyDictionary()
        self._codes: dict[Hashable, Hashable] = {}
        self._sizes: dict[Hashable, int] = {}
        self._round = 0

    def get(self, module: nn.Module, outside: Sequence[tuple[str, ...]] = ()) -> Watch:
        """What is below a region now; ``outside`` are paths to submodules captured apart."""
        # the methods of all classes are compared once for each pass over the model
        if module in self._seen:
            self._seen.clear()
            self._round += 1
        self._seen.add(module)
        watch = self._watches.get(module)
        if watch is None or not watch.is_current(module):
            watch = self._watches[module] = self._watch(module, outside)
            self._mixes.pop(module, None)
        if watch.round != self._round:
            watch.round = self._round
            code = self._find_code(module, watch)
            watch.code = self._codes.get(code, code) if watch.inlined else code
        return watch

    def has_mixers(self, module: nn.Module, forward: Any) -> bool:
        """Whether ``forward`` of a region, or code below it, calls what takes segments."""
        mixes = self._mixes.get(module)
        if mixes is None:
            # a part of it that is captured apart has our forward as an instance
            functions = [forward, *map(_function_of, module.modules())]
            functions += [type(m).forward for m in module.modules()]
            mixes = self._mixes[module] = any(map(self._mixers.of, functions))
        return mixes

    def watch_inlined(self, module: nn.Module) -> None:
        """Watch also what the graph that is being compiled calls, and ``get`` has not read."""
        # A head may call parts of its backbone itself. The call at hand keeps its code: what it
        # runs is captured already.
        watch = self._watches[module]
        paths = called_below(module) - watch.paths
        if not paths:
            return
        inlined = Inlined(frozenset(paths) | {path for path, _ in watch.inlined})
        self._inlined[module] = inlined
        grown = self._watches[module] = self._watch(module, watch.outside)
        inlined.hooks = grown.inlined_hooks()
        grown.round, grown.code = self._round, watch.code
        self._codes[self._find_code(module, grown)] = watch.code

    def _watch(self, module: nn.Module, outside: Sequence[tuple[str, ...]]) -> Watch:
        inlined = self._inlined.get(module, _NOTHING)
        return Watch(module, outside, self.opaque.below(module), inlined)

    def _find_code(self, module: nn.Module, watch: Watch) -> Hashable:
        methods = self._methods.get(watch.classes)
        if methods is None:
            methods = self._methods[watch.classes] = _Methods(watch.classes)
            alike = self._alike.setdefault(module, Counter())
            names = tuple((c.__module__, c.__qualname__) for c in watch.classes)
            alike[names] += 1
            watch.is_unsettled = alike[names] > _MAX_ALIKE
        code = methods.code(self._round), watch.own_code, bool(watch.inlined_hooks())
        return *code, self._sizes.setdefault(watch.sizes, len(self._sizes))


@dataclass(eq=False)
class Inlined:
    """Paths of modules that a head's graphs call below the one not captured; their hooks then."""

    paths: frozenset[str] = frozenset()
    hooks: Sequence[Any] = ()


_NOTHING = Inlined()


def called_below(region: nn.Module) -> set[str]:
    """The paths of the modules below ``region`` that the graph being compiled has called."""
    # TorchDynamo reads the hooks of each module that it calls, and notes that as a guard, which it
    # does not check (``skip_nnmodule_hook_guards``)
    context = torch._guards.TracingContext.try_get()
    if context is None:
        return set()
    names = {id(m): name for name, m in region.named_modules()}
    paths = set()
    for guard in context.guards_context.dynamo_guards:
        source, is_hook, _ = guard.name.partition("._forward_hooks")
        if not is_hook:
            continue
        try:
            module = eval(source, {"L": {"self": region}})
        except (NameError, KeyError, AttributeError, IndexError, TypeError, SyntaxError):
            return set(names.values()) - {""}  # called by another name: it may be any of them
        paths.add(names.get(id(module), ""))
    return paths - {""}


class Watch:
    """The modules below one region. It holds them, but not the region itself.

    Attributes:
        outside: the paths, name by name, to submodules that are not captured with it.
        inlined: those of them that are below the one that is not captured, with their paths.
        classes: those of the region and of all these modules, each once.
        own_code: the code of forwards that these modules have as instances, and of kernels that are
            in the place of functions.
        blocks: those of these modules that run their own graphs.
        packed: those of these modules that are 4-bit layers.
        sizes: those of all parameters. Modules that differ in them have graphs of their own in any
            case. Sharing a function, they would have their numbers (sizes of heads) for inputs.
        copies: of their forwards, for those that call what is captured whole.
        round: number of the pass over the model in which ``code`` was found.
        code: tells apart what runs different code; equal for equal modules.
        is_unsettled: whether its classes have the names of those of earlier calls, but are new.
    """

    def __init__(
        self,
        module: nn.Module,
        outside: Sequence[tuple[str, ...]],
        copies: ForwardCopies,
        inlined: Inlined = _NOTHING,
    ) -> None:
        self.outside = outside
        self._captured = list(captured_submodules(module, outside))
        captured = [m for _, m in self._captured]
        self.inlined = [(p, m) for p, m in _at(module, inlined.paths) if m not in captured]
        self.paths = {path for path, _ in (*self._captured, *self.inlined)}
        self._traced = inlined
        self._below = [*captured, *(m for _, m in self.inlined)]
        self._dicts = [m.__dict__ for m in self._below]
        between = {p for path, _ in self.inlined for p in _prefixes(path)} - self.paths
        self._parents = [*self._dicts, *(m.__dict__ for _, m in _at(module, between))]
        self._children = self._current_children(module)
        self._kinds = list(map(type, self._below))
        self._forwards = [d.get("forward") for d in self._dicts]
        self.blocks = [m for m in captured if is_block(m)]
        self._called = [m.__dict__ for m in captured if not is_container(m)]
        self._replaceable = [f.__dict__ for m in (module, *self._below) for f in replaceable(m)]
        self._kernels = [d.get("forward") for d in self._replaceable]
        self.packed = [m for m in captured if is_packed(m)]
        every = (p for m in (module, *captured) for p in m._parameters.values() if p is not None)
        self.sizes = tuple(p.shape for p in every)
        self.classes: tuple[Any, ...] = tuple(dict.fromkeys((type(module), *self._kinds)))
        self._class_forwards = [c.forward for c in self.classes]
        forwards = enumerate((*self._forwards, *self._kernels))
        self.own_code = tuple((i, _code(f)) for i, f in forwards if f is not None)
        self.copies = copies
        self.round = -1
        self.code: Hashable = None
        self.is_unsettled = False

    def _current_children(self, module: nn.Module) -> list[nn.Module | None]:
        inner = chain.from_iterable(map(dict.values, map(_CHILDREN, self._parents)))
        return [*module._modules.values(), *inner]

    def is_current(self, module: nn.Module) -> bool:
        """Whether the modules below, their classes and their forwards are those that were read."""
        present = self._current_children(module)
        return (
            len(present) == len(self._children)
            and all(map(is_, present, self._children))
            and all(map(is_, map(type, self._below), self._kinds))
            and all(map(is_, map(dict.get, self._dicts, repeat("forward")), self._forwards))
            and all(map(is_, map(dict.get, self._replaceable, repeat("forward")), self._kernels))
            and [c.forward for c in self.classes] == self._class_forwards
            and type(module) is self.classes[0]
        )

    def trained(self, module: nn.Module) -> bytes:
        """Which parameters of the region and of the modules below need a gradient now."""
        held = (d["_parameters"].values() for d in (module.__dict__, *self._dicts))
        return bytes([p.requires_grad for p in chain.from_iterable(held) if p is not None])

    def find_hooks(self, module: nn.Module) -> Hooks:
        """The hooks below the region (``bypass.find_hooks``), looked for only if there are any."""
        hooks = _NONE
        if any(chain.from_iterable(map(_HOOKS, self._called))):
            hooks = find_hooks(module, self._captured)
        if self.inlined and not hooks.others and any(has_hooks(m) for _, m in self.inlined):
            idle = [m for _, m in self.inlined if has_hooks(m) and has_idle_hooks(m)]
            hooks = Hooks(None, None, [*hooks.idle, *idle], hooks.units)
            present, traced = self.inlined_hooks(), self._traced.hooks
            if present and (len(present) != len(traced) or not all(map(is_, present, traced))):
                hooks.others = next(path for path, m in self.inlined if has_hooks(m))
        return hooks

    def inlined_hooks(self) -> list[Any]:
        """The hooks of inlined modules, without idle ones."""
        modules = (m for _, m in self.inlined if has_hooks(m) and not has_idle_hooks(m))
        return [h for m in modules for hooks in _HOOKS(m.__dict__) for h in hooks.values()]


def _at(module: nn.Module, paths: Iterable[str]) -> Iterator[tuple[str, nn.Module]]:
    """The modules at these paths, as far as there are any."""
    names = dict(module.named_modules(remove_duplicate=False)) if paths else {}
    return ((path, names[path]) for path in sorted(paths) if path in names)


def _prefixes(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]


def _function_of(module: nn.Module) -> Any:
    forward = module.__dict__.get("forward", type(module).forward)
    return getattr(forward, "__func__", forward)


def _code(forward: Any) -> Any:
    """The code behind a forward, and what it holds where TorchDynamo does not guard that."""
    # PyTorch 2.13 guards the closure and the defaults of a function that a module holds; 2.11 takes
    # any function with the same code for the one that it captured
    function = getattr(forward, "func", forward)  # of a functools.partial
    function = getattr(function, "__func__", function)
    holds = any(getattr(function, name, None) for name in _HELD)
    if holds and not _HELD_IS_GUARDED:
        return function
    return getattr(function, "__code__", type(function))


class _Methods:
    """The functions that some classes define, under a number for each state that was seen."""

    def __init__(self, classes: Sequence[type]) -> None:
        bases = dict.fromkeys(b for c in classes for b in c.__mro__)
        self._namespaces = [b.__dict__ for b in bases if b not in (nn.Module, object)]
        self._values: list[Any] = []
        self._functions: list[types.FunctionType] = []
        self._held: list[Any] = []
        self._states: list[list[Any]] = []
        self._round = -1
        self._code = 0

    def code(self, number: int) -> tuple[int, int]:
        """What tells this state of these classes apart; compared once for each pass."""
        if number != self._round:
            self._round = number
            values = list(chain.from_iterable([s.values() for s in self._namespaces]))
            if not _are_same(values, self._values):
                self._values = values
                self._functions = [v for v in values if type(v) is types.FunctionType]
                self._held = []
            parts = list(chain.from_iterable(map(_PARTS, self._functions)))
            parts += chain.from_iterable(map(dict.values, filter(None, parts[2::3])))
            if not self._held or not _are_same(parts, self._held):
                self._held = parts
                self._code = self._state_number([v for v in values if _is_method(v)] + parts)
        return id(self), self._code

    def _state_number(self, functions: list[Any]) -> int:
        for i, state in enumerate(self._states):
            if _are_same(state, functions):
                return i
        self._states.append(functions)
        return len(self._states) - 1


_PARTS = attrgetter("__code__", "__defaults__", "__kwdefaults__")
"""What of a function can be replaced in place. The last one comes third: ``_Methods`` reads it."""


def _are_same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(map(is_, a, b))


def _is_method(value: Any) -> bool:
    """Whether a class's attribute is code that TorchDynamo would go through, and does not guard."""
    return hasattr(value, "__get__") and not isinstance(value, type)
