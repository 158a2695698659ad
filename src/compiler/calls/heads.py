"""The forwards of a causal LM and of its backbone: head, shift and loss become one graph."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...memory.oom_retry import retrying
from ..bypass import hidden_hooks, transformed
from ..regions import leading_sizes, mark_dynamic
from ..session import Session
from ..watch import of_all_modules
from .default_cache import SharedPlaces, has_switch, is_idle, is_on, parameters_of
from .forwards import Original, stands_aside
from .opaque_blocks import Results


class _Signature:
    """What a causal LM's forward takes, and whether it can fill a cache by default."""

    def __init__(self, forward: Any, is_method: bool, backbone: Any) -> None:
        self.forward = forward
        own = inspect.signature(forward).parameters
        positional = [n for n, p in own.items() if p.kind in _POSITIONAL]
        self._positional = positional[1:] if is_method else positional
        self.has_cache = has_switch(forward, parameters_of(forward, backbone))

    def by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """All arguments by name; None where the call is a wrong one."""
        named = dict(zip(self._positional, args, strict=False))
        wrong = len(named) < len(args) or named.keys() & kwargs.keys()
        return None if wrong else {**named, **kwargs}


def head_forward(
    session: Session,
    outside: Sequence[str],
    results: Results | None,
    original: Original,
    compiled: Callable[..., Any],
) -> Callable[..., Any]:
    """The forward of a causal LM: head, shift and loss in one graph, in calls with labels.

    Args:
        session: whose it is.
        outside: the path, name by name, to the submodule that is not captured with it.
        results: what the blocks return, where the head calls them itself.
        original: the forward as it was.
        compiled: the captured form; one for each set of given arguments.
    """
    known: list[_Signature] = []
    places, aside = SharedPlaces(), stands_aside(session)

    def signature(self: nn.Module) -> _Signature:
        function = original.function(self)
        if not known or known[0].forward is not function:
            backbone = None if results is not None else _at(self, outside)
            known[:] = [_Signature(function, original.is_method, backbone)]
        return known[0]

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if aside(self):
            return original(self, *args, **kwargs)
        sign = signature(self)
        if args:
            named = sign.by_name(args, kwargs)
            if named is None:
                return original(self, *args, **kwargs)  # raises the TypeError that it always raised
            args, kwargs = (), named
        if kwargs.get("labels") is None:
            return original(self, *args, **kwargs)
        training = self.training and torch.is_grad_enabled()
        idle_cache = training and sign.has_cache and is_on(self) and is_idle(kwargs)
        if idle_cache and not places.any_in(self):
            kwargs["use_cache"] = False
        watch = session.state.watches.of(self, outside)
        hooked, idle = watch.hooked(self)
        reason = session.log.failed.get(self) or transformed((), kwargs) or of_all_modules()
        if reason is None and hooked:
            reason = f"a hook is registered on its submodule {hooked}"
        if reason is None and results is not None:
            if results.waits(watch.blocks):  # the first call shows what they return
                return original(self, **kwargs)
            reason = results.gap(watch.blocks)
        if reason is not None:
            session.log.note(self, reason)
            return original(self, *args, **kwargs)
        labels = kwargs["labels"]
        if isinstance(labels, Tensor) and labels.dim() == 2:
            mark_dynamic(kwargs.values(), (labels.shape[0], labels.shape[1]))
        # each set of arguments has its own graphs: a guard on one that is not there cannot fail
        given = tuple(sorted(k for k, v in kwargs.items() if v is not None))

        def variant() -> Any:
            return compiled(self, given, watch.code)

        def as_it_was() -> Any:
            session.state.in_head = False
            return original(self, **kwargs)

        def captured() -> Any:
            session.state.in_head = True
            try:
                with (
                    hidden_hooks(idle),
                    torch._dynamo.config.patch(ignore_logger_methods=_loggers()),
                ):
                    return session.call(self, variant, args, kwargs, as_it_was)
            finally:
                session.state.in_head = False

        return retrying(session.choices.planner, captured) if training else captured()

    return forward


def _at(module: nn.Module, path: Sequence[str]) -> nn.Module | None:
    found: nn.Module | None = module
    for name in path:
        found = None if found is None else found._modules.get(name)
    return found


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _loggers() -> set[Any]:
    """Log calls, which do not break a head's graph; transformers adds the ``_once`` methods."""
    names = ("warning_once", "warning_advice", "info_once", "warning", "info", "debug")
    return {getattr(logging.Logger, n) for n in names if hasattr(logging.Logger, n)}


def backbone_forward(
    session: Session, original: Original, compiled: Callable[..., Any]
) -> Callable[..., Any]:
    """The backbone inside a head: a graph break while the head is captured, itself otherwise."""

    @torch._dynamo.disable  # type: ignore[untyped-decorator]  # 2026-11-24: torch has no types here
    def outside(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        session.state.in_head = False
        try:
            outputs = original(self, *args, **kwargs)
        finally:
            session.state.in_head = True
        values = tuple(outputs.values()) if isinstance(outputs, Mapping) else outputs
        values = values if isinstance(values, tuple) else (values,)
        sizes = leading_sizes(values, {})
        if sizes is not None:
            mark_dynamic(values, sizes)
        return outputs

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if session.state.in_head and self not in session.log.restored:
            return outside(self, *args, **kwargs)
        return original(self, *args, **kwargs)

    return forward
