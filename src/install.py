"""Putting captured forwards into one model instance, and taking them out again.

A region's module gets an instance attribute ``forward``: a bound method of a plain function. So
``deepcopy`` gives an optimized copy (methods are rebound to the copy), pickling gives a plain one
(a method is stored by name and found in the class), and signatures, hooks, ``isinstance``,
parameters and ``state_dict`` are what they were.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .capture import Session, backend
from .regions import Region, bypass_reason, leading_sizes, mark_dynamic

_MARK = "__fusewright__"
_LIMIT = 64
"""Recompilations allowed for a head: its frames are shared by all models of its class."""


@dataclass(frozen=True)
class Installed:
    """What an installed forward knows.

    Attributes:
        session: the session that it belongs to.
        kind: the region's kind, or ``"backbone"``.
        previous: the instance's own forward before, or None when the class's was in use.
    """

    session: Session
    kind: str
    previous: Any


def installed(module: nn.Module) -> Installed | None:
    """The record of the forward that fusewright put into ``module``, or None."""
    method = module.__dict__.get("forward")
    found: Installed | None = getattr(getattr(method, "__func__", None), _MARK, None)
    return found


def install(region: Region, session: Session) -> None:
    """Give ``region.module`` a captured forward."""
    make = _head_forward if region.kind == "head" else _block_forward
    _put(region.module, session, region.kind, make)
    if region.backbone is not None:
        _put(region.backbone, session, "backbone", _backbone_forward)


def uninstall(module: nn.Module) -> bool:
    """Give ``module`` its own forward back; False when it has no installed one."""
    record = installed(module)
    if record is None:
        return False
    if record.previous is None:
        del module.__dict__["forward"]
    else:
        module.__dict__["forward"] = record.previous
    return True


def _put(
    module: nn.Module,
    session: Session,
    kind: str,
    make: Callable[[Session, str, Callable[..., Any], Callable[..., Any]], Callable[..., Any]],
) -> None:
    previous = module.__dict__.get("forward")
    original = previous if previous is not None else type(module).forward

    def plain(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if previous is not None:
            return previous(*args, **kwargs)
        return type(self).forward(self, *args, **kwargs)

    def compiled() -> Callable[..., Any]:
        target = plain if previous is not None else _own_code(original)
        return torch.compile(target, backend=backend(session, kind), fullgraph=kind != "head")

    key = plain if previous is not None else original
    forward = make(session, kind, plain, lambda: session.compiled(key, kind, compiled))
    functools.update_wrapper(forward, getattr(original, "__func__", original))
    forward.__name__ = "forward"  # pickle stores a method by this name
    setattr(forward, _MARK, Installed(session, kind, previous))
    module.__dict__["forward"] = types.MethodType(forward, module)


_serial = itertools.count(1)


def _own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of ``function`` with a code object of its own.

    Dynamo keeps compiled graphs, and counts recompilations, by code object; and it remembers by
    file, line and name of the code which sizes have varied, so that a second model with another
    head size would get a symbolic one. A renamed copy keeps this model's apart from all others'.
    """
    if not isinstance(function, types.FunctionType):
        return function
    name = f"{function.__code__.co_name}_fusewright_{next(_serial)}"
    copy = types.FunctionType(
        function.__code__.replace(co_name=name), function.__globals__, function.__name__,
        function.__defaults__, function.__closure__,
    )  # fmt: skip
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _block_forward(
    session: Session, kind: str, plain: Callable[..., Any], compiled: Callable[[], Any]
) -> Callable[..., Any]:
    inductor = kind == "block" and session.codegen[0] == "inductor"

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            _warn_outer_compile()
            return plain(self, *args, **kwargs)
        reason = session.failed.get(self) or bypass_reason(self, args, kwargs)
        if reason is None and kind == "norm" and not torch.is_grad_enabled():
            reason = "evaluation: a lone norm is not worth a graph of its own"
        if reason is not None:
            session.note(self, reason)
            return plain(self, *args, **kwargs)
        if inductor and torch.is_grad_enabled():
            args, kwargs = _with_gradient(self, args, kwargs)
        sizes = leading_sizes(args, kwargs)
        if sizes is not None:
            mark_dynamic((*args, *kwargs.values()), sizes)
        return session.call(self, compiled(), plain, args, kwargs)

    return forward


def _with_gradient(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Let the first block's input need a gradient too, so that all blocks share one graph.

    The embedding below a LoRA model is frozen, so its output needs none. The extra gradient costs
    less than compiling a second graph for one block; it ends in a leaf that nobody sees.
    """
    name: str | None = None
    x = args[0] if args else None
    if not isinstance(x, Tensor):
        tensors = ((k, v) for k, v in kwargs.items() if isinstance(v, Tensor))
        name, x = next(tensors, (None, None))
    # asked in this order because only the first block gets past it
    if x is None or x.requires_grad or x.dim() != 3 or not x.is_floating_point():
        return args, kwargs
    if not any(p.requires_grad for p in module.parameters()):
        return args, kwargs
    leaf = x.detach().requires_grad_()
    return ((leaf, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: leaf})


def _head_forward(
    session: Session, kind: str, plain: Callable[..., Any], compiled: Callable[[], Any]
) -> Callable[..., Any]:
    parameters: dict[str, inspect.Parameter] = {}

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            _warn_outer_compile()
            return plain(self, *args, **kwargs)
        if not parameters:
            parameters.update(inspect.signature(forward).parameters)
        if args:
            named = dict(zip(list(parameters)[1:], args, strict=False))
            if len(named) < len(args) or named.keys() & kwargs.keys():
                return plain(self, *args, **kwargs)  # raises the TypeError that it always raised
            args, kwargs = (), {**named, **kwargs}
        training = self.training and torch.is_grad_enabled()
        # a cache filled by a training step is read by nobody, and keeps every key and value
        wanted = "use_cache" in parameters and kwargs.get("use_cache") is None
        if wanted and (training or kwargs.get("labels") is not None) and not _given_cache(kwargs):
            kwargs["use_cache"] = False
        reason = session.failed.get(self)
        if reason is None and kwargs.get("labels") is None:
            return plain(self, *args, **kwargs)
        if reason is not None:
            session.note(self, reason)
            return plain(self, *args, **kwargs)
        labels = kwargs["labels"]
        if isinstance(labels, Tensor) and labels.dim() == 2:
            mark_dynamic(kwargs.values(), (labels.shape[0], labels.shape[1]))
        session.head_active = True
        try:
            with torch._dynamo.config.patch(
                recompile_limit=_LIMIT, ignore_logger_methods=_loggers()
            ):
                return session.call(self, compiled(), plain, args, kwargs)
        finally:
            session.head_active = False

    return forward


def _loggers() -> set[Any]:
    """Log calls, which do not break a head's graph; transformers adds the ``_once`` methods."""
    names = ("warning_once", "warning_advice", "info_once", "warning", "info", "debug")
    return {getattr(logging.Logger, n) for n in names if hasattr(logging.Logger, n)}


def _given_cache(kwargs: dict[str, Any]) -> bool:
    names = ("cache", "past_key_values", "cache_params")
    return any(kwargs.get(n) is not None for n in names)


def _backbone_forward(
    session: Session, kind: str, plain: Callable[..., Any], compiled: Callable[[], Any]
) -> Callable[..., Any]:
    """The backbone inside a head: a graph break while the head is captured, itself otherwise."""

    @torch._dynamo.disable  # type: ignore[untyped-decorator]  # 2026-11-24: torch has no types here
    def outside(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        session.head_active = False
        try:
            outputs = plain(self, *args, **kwargs)
        finally:
            session.head_active = True
        values = tuple(outputs.values()) if hasattr(outputs, "values") else outputs
        values = values if isinstance(values, tuple) else (values,)
        sizes = leading_sizes(values, {})
        if sizes is not None:
            mark_dynamic(values, sizes)
        return outputs

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if session.head_active:
            return outside(self, *args, **kwargs)
        return plain(self, *args, **kwargs)

    return forward


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]  # 2026-11-24: as above
def _warn_outer_compile() -> None:
    """Warn; runs while the outer compilation traces, once."""
    warnings.warn(
        "torch.compile was put around a model that fusewright has optimized: inside it the "
        "original code runs. Use one of the two: fusewright.restore(model) before torch.compile, "
        "or optimize(model, codegen='inductor') without it.",
        stacklevel=2,
    )
