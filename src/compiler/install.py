"""Putting captured forwards into one model instance, and taking them out again.

A region's module gets an instance attribute ``forward``: a bound method of a plain function. So
signatures, hooks, ``isinstance``, parameters and ``state_dict`` are what they were. ``deepcopy``
gives an optimized copy (methods are rebound to the copy). Shallow copies and pickles are plain, in
which a method would run the original: an instance attribute ``__getstate__`` sees to that.
"""

from __future__ import annotations

import copy
import functools
import itertools
import types
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..graph.opaque.hub_kernels import is_replaced
from .calls.forwards import Original, block_forward
from .calls.heads import backbone_forward, head_forward
from .calls.opaque_blocks import Results, callable_from_head
from .calls.trainer_heads import TrainerHead, is_training_watch, replaced_forward, watch_training
from .capture import captured
from .copies.forward_copies import cell_contents, clone_function
from .regions import Region, undivided_parts
from .sample_masks import Masked, making_masks
from .segments import Segmented
from .session import Session

_MARK = "__fusewright__"
_REPLICATE = "_replicate_for_data_parallel"
_GETSTATE = "__getstate__"


@dataclass(frozen=True)
class Installed:
    """What an installed forward knows; ``previous``: the instance's own one before, or None."""

    session: Session
    kind: str
    previous: Any


def installed(module: nn.Module, wrapped: bool = False) -> Installed | None:
    """The record of the forward that fusewright put into ``module``, or None.

    ``wrapped``: also under wrappers put around it since, as ``Accelerator.prepare`` does.
    """
    record = _innermost_record(module.__dict__.get("forward"), wrapped)
    if record is None and wrapped:
        record = getattr(_function(module.__dict__.get(_REPLICATE)), _MARK, None)
    return record


def replaced_by(module: nn.Module) -> str | None:
    """What has taken the place of a forward that fusewright put into ``module``, if anything."""
    # it may call ours, through a closure or not at all: nothing tells
    if (
        installed(module, wrapped=True) is None
        or replaced_forward(module.forward) is not None
        or _innermost_record(module.forward, wrapped=True) is not None
    ):
        return None
    forward = _function(module.forward)
    return getattr(getattr(forward, "__code__", None), "co_qualname", type(forward).__name__)


def _innermost_record(forward: Any, wrapped: bool) -> Installed | None:
    while forward is not None:
        function = getattr(forward, "__func__", forward)
        inner = getattr(function, "__wrapped__", None)
        record: Installed | None = getattr(function, _MARK, None)
        # wraps() copies attributes, ours too: the real one is innermost
        if record is not None and getattr(_function(inner), _MARK, None) is None:
            return record
        if not wrapped:
            return None
        forward = inner
    return None


def active(module: nn.Module) -> Installed | None:
    """The record of an installed forward, wrapped by others or not, that was not restored."""
    record = installed(module, wrapped=True)
    return None if record is None or module in record.session.log.restored else record


def _function(forward: Any) -> Any:
    return getattr(forward, "__func__", forward)


def install(regions: Iterable[Region], session: Session) -> None:
    """Give the modules of ``regions`` captured forwards."""
    results, regions = Results(), list(regions)
    for region in regions:
        if region.kind == "head":
            head_results = results if any(r.in_head for r in regions) else None
            fused = TrainerHead(region.module, session.log.reads)
            make = functools.partial(
                head_forward, session, region.outside, head_results, fused, _session_of
            )
            _install_forward(region.module, session, "head", make)
            for module in region.backbone:
                outside = functools.partial(backbone_forward, session, fused)
                _install_forward(module, session, "backbone", outside)
                watch_training(module, fused)
        elif region.kind == "backbone":
            make = functools.partial(backbone_forward, session, None)
            _install_forward(region.module, session, "backbone", make)
        else:
            make = functools.partial(block_forward, session, region.kind)
            _install_forward(
                region.module, session, region.kind, make, results if region.in_head else None
            )


def _session_of(module: nn.Module) -> Session | None:
    record = installed(module)
    return None if record is None else record.session


def split(module: nn.Module, session: Session) -> Callable[[], None]:
    """Make regions of the parts of a block that could not be captured; returns what undoes it."""
    record = installed(module, wrapped=True)
    is_whole = record is not None and record.kind in ("block", "projector")
    parts = undivided_parts(module) if is_whole else []
    install(parts, session)

    def undo() -> None:
        for part in parts:
            for inner in part.module.modules():
                uninstall(inner)

    return undo


def uninstall(module: nn.Module) -> bool:
    """Give ``module`` its own forward back; False when it has no installed one.

    One that others have wrapped since cannot be taken out: it becomes idle.
    """
    hidden = installed(module, wrapped=True)
    if hidden is not None:
        hidden.session.log.restored.add(module)
    record = _innermost_record(_theirs(module.__dict__.get("forward")), wrapped=False)
    plain = _without_ours(module.__dict__)
    for name in module.__dict__.keys() - plain.keys():
        del module.__dict__[name]
    if "forward" in plain and plain["forward"] is not module.__dict__["forward"]:
        module.__dict__["forward"] = _rebind(plain["forward"], module)
    return record is not None


def _theirs(forward: Any) -> Any:
    """``forward``, or the trainer's that it replaces."""
    replaced = replaced_forward(forward)
    return forward if replaced is None else replaced


def _is_ours(value: Any) -> bool:
    return hasattr(_function(value), _MARK) or is_training_watch(value)


def _without_ours(attributes: dict[str, Any]) -> dict[str, Any]:
    """What a module's attributes are when nothing of fusewright's is among them."""
    plain = {
        name: value
        for name, value in attributes.items()
        if name not in (_REPLICATE, _GETSTATE, "train") or not _is_ours(value)
    }
    forward = _theirs(plain.get("forward"))
    record = _innermost_record(forward, wrapped=False)
    forward = forward if record is None else record.previous
    if forward is not None:
        plain["forward"] = forward
    else:
        plain.pop("forward", None)
    return plain


def _rebind(method: Any, module: nn.Module) -> Any:
    """``method`` of ``module``, whichever copy of the module it was taken from."""
    if isinstance(method, types.MethodType) and isinstance(method.__self__, type(module)):
        return types.MethodType(method.__func__, module)
    return method


def _install_forward(
    module: nn.Module,
    session: Session,
    kind: str,
    make: Callable[[Original, Callable[..., Any]], Callable[..., Any]],
    results: Results | None = None,
) -> None:
    previous = module.__dict__.get("forward")
    original = Original(previous)

    def compiled(self: nn.Module, variant: Any, code: Hashable) -> Callable[..., Any]:
        function = original.function(self)
        watches = session.state.watches
        masks = code.places if isinstance(code, Masked) else ()
        is_segmented = isinstance(code.code if isinstance(code, Masked) else code, Segmented)
        copies = watches.segmented if is_segmented else watches.opaque
        source: Any = original
        if original.is_method:
            has_kernels = not is_segmented and is_replaced(self)
            source = (None if has_kernels else copies.of(function)) or function

        def build() -> Callable[..., Any]:
            whole = making_masks(source, masks) if masks else source
            target = _with_own_code(whole) if original.is_method else original.__call__
            return captured(target, session, kind)

        return session.compiled(self, (source, code, variant), kind, build)

    forward = make(original, compiled)
    if results is not None:
        forward = callable_from_head(session, results, forward)
    if kind in ("head", "backbone"):
        forward = session.state.segments.entering(forward, original.function(module))
    functools.update_wrapper(forward, original.function(module))
    original.replaced_by = forward
    forward.__name__ = "forward"  # pickle stores a method by this name
    record = Installed(session, kind, previous)
    setattr(forward, _MARK, record)
    session.log.restored.discard(module)
    module.__dict__["forward"] = types.MethodType(forward, module)
    module.__dict__[_REPLICATE] = types.MethodType(_replicate_for(record), module)
    module.__dict__[_GETSTATE] = types.MethodType(_getstate, module)


def _replicate_for(record: Installed) -> Callable[[nn.Module], Any]:
    """What makes a replica for ``nn.DataParallel``, which runs as the module was without us."""
    # Our method would run the original's weights. A replica lives for one call; training on several
    # GPUs is better done with one process for each. The record is set here too, where those who put
    # another forward into the module leave it.

    def replicate(self: nn.Module) -> Any:
        replica = type(self)._replicate_for_data_parallel(self)
        replica.__dict__ = _without_ours(replica.__dict__)
        if "forward" in replica.__dict__:
            replica.__dict__["forward"] = _rebind(replica.__dict__["forward"], replica)
        return replica

    replicate.__name__ = _REPLICATE  # pickle stores a method by this name
    setattr(replicate, _MARK, record)
    return replicate


class _State(dict[str, Any]):
    """The state of a module for a shallow copy or a pickle, and for a deep copy."""

    def __init__(self, state: dict[str, Any]) -> None:
        super().__init__(_without_ours(state))
        self._whole = state

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return copy.deepcopy(self._whole, memo)  # in which methods are those of the copy

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


def _getstate(self: nn.Module) -> Any:
    state = type(self).__getstate__(self)
    return _State(state) if type(state) is dict else state


setattr(_getstate, _MARK, True)
_getstate.__name__ = _GETSTATE

_serial = itertools.count(1)


def _with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of ``function``, and of what it wraps, with new code objects."""
    # Dynamo keeps compiled graphs, and counts recompilations, by code object; and it remembers by
    # file, line and name of the code which sizes have varied, so that a second model with another
    # head size would get a symbolic one. A renamed copy keeps this model's apart from all others'.
    if not isinstance(function, types.FunctionType):
        return function
    inner = getattr(function, "__wrapped__", None)
    clone = None
    if isinstance(inner, types.FunctionType) and function.__closure__ is not None:
        clone = _with_own_code(inner)
    contents = [clone if cell_contents(c) is inner else None for c in function.__closure__ or ()]
    result = clone_function(function, None, contents, f"_fusewright_{next(_serial)}")
    if clone is not None:
        result.__dict__["__wrapped__"] = clone
    return result
