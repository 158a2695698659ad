"""The forwards that are put into modules: when a call is captured, and when it passes by."""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from .bypass import bypass_reason, hidden_hooks, transformed
from .leaves import scanning, scans_whole
from .memory.plans import inside_checkpoint
from .memory.retry import retrying
from .regions import leading_sizes, mark_dynamic
from .session import Session
from .watch import of_all_modules

_NOTHING = contextlib.nullcontext()


def block_forward(
    session: Session, kind: str, plain: Callable[..., Any], compiled: Callable[..., Any]
) -> Callable[..., Any]:
    """The forward of a decoder block, or of a norm outside the blocks: one graph.

    Args:
        session: whose it is.
        kind: ``"block"`` or ``"norm"``.
        plain: the forward as it was.
        compiled: the captured form; one for each level of what is kept for backward.
    """
    inductor = kind == "block" and session.codegen[0] == "inductor"

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if _stands_aside(session, self):
            return plain(self, *args, **kwargs)
        watch = session.watches.of(self)
        hooked, idle = watch.hooked(self)
        reason = session.failure(self) or of_all_modules() or bypass_reason(args, kwargs, hooked)
        if reason is None and kind == "norm" and not torch.is_grad_enabled():
            reason = "evaluation: a lone norm is not worth a graph of its own"
        if reason is not None:
            session.note(self, reason)
            return plain(self, *args, **kwargs)
        graph_args, graph_kwargs = args, kwargs
        if inductor and torch.is_grad_enabled():
            graph_args, graph_kwargs = _with_gradient(self, args, kwargs)
        sizes = leading_sizes(args, kwargs)
        if sizes is not None:
            mark_dynamic((*graph_args, *graph_kwargs.values()), sizes)

        planned = kind == "block" and torch.is_grad_enabled()
        outer = planned and inside_checkpoint()
        if planned and not outer:
            session.planner.begin(self, prod(sizes or ()))

        def variant() -> Any:
            # a block inside of somebody else's checkpoint has a graph of its own
            level = "outer" if outer else session.planner.level(self) if planned else None
            return compiled(self, level, watch.code)

        def as_it_was() -> Any:
            return plain(self, *args, **kwargs)

        def around() -> Any:
            scans = scanning(self) if watch.scans else None
            return scans_whole(scans) if scans else _NOTHING

        with hidden_hooks(idle) if idle else _NOTHING:
            return session.call(self, variant, graph_args, graph_kwargs, as_it_was, around)

    return forward


def _stands_aside(session: Session, module: nn.Module) -> bool:
    """Whether a forward has nothing to do: its module was restored, or another compiler traces."""
    if module in session.retired:
        return True
    if torch.compiler.is_compiling():
        _warn_outer_compile()
        return True
    return False


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


def head_forward(
    session: Session,
    outside: str,
    plain: Callable[..., Any],
    compiled: Callable[..., Any],
) -> Callable[..., Any]:
    """The forward of a causal LM: head, shift and loss in one graph, in calls with labels.

    Args:
        session: whose it is.
        outside: the name of the child that is not captured with it, the backbone.
        plain: the forward as it was.
        compiled: the captured form; one for each set of given arguments.
    """
    parameters: dict[str, inspect.Parameter] = {}
    positional: list[str] = []

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if _stands_aside(session, self):
            return plain(self, *args, **kwargs)
        if not parameters:
            own = inspect.signature(forward).parameters
            positional.extend([n for n, p in own.items() if p.kind in _POSITIONAL][1:])
            parameters.update(_parameters(own, self._modules.get(outside)))
        if args:
            named = dict(zip(positional, args, strict=False))
            if len(named) < len(args) or named.keys() & kwargs.keys():
                return plain(self, *args, **kwargs)  # raises the TypeError that it always raised
            args, kwargs = (), {**named, **kwargs}
        training = self.training and torch.is_grad_enabled()
        if (training or kwargs.get("labels") is not None) and _cache_is_idle(parameters, kwargs):
            kwargs["use_cache"] = False
        if kwargs.get("labels") is None:
            return plain(self, *args, **kwargs)
        watch = session.watches.of(self, (outside,))
        hooked, idle = watch.hooked(self)
        reason = session.failed.get(self) or transformed((), kwargs) or of_all_modules()
        if reason is None and hooked:
            reason = f"a hook is registered on its submodule {hooked}"
        if reason is not None:
            session.note(self, reason)
            return plain(self, *args, **kwargs)
        labels = kwargs["labels"]
        if isinstance(labels, Tensor) and labels.dim() == 2:
            mark_dynamic(kwargs.values(), (labels.shape[0], labels.shape[1]))
        # each set of arguments has its own graphs: a guard on one that is not there cannot fail
        given = tuple(sorted(k for k, v in kwargs.items() if v is not None))

        def variant() -> Any:
            return compiled(self, given, watch.code)

        def captured() -> Any:
            session.head_active = True
            try:
                with (
                    hidden_hooks(idle),
                    torch._dynamo.config.patch(ignore_logger_methods=_loggers()),
                ):
                    return session.call(
                        self,
                        lambda: compiled(self, given, watch.code),
                        args,
                        kwargs,
                        lambda: plain(self, **kwargs),
                    )
            finally:
                session.head_active = False

        return retrying(session.planner, captured) if training else captured()

    return forward


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _parameters(
    head: Mapping[str, inspect.Parameter], backbone: Any
) -> dict[str, inspect.Parameter]:
    """The parameters of a head, and of the backbone where the head passes on what it is given."""
    own = dict(head)
    passes_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in own.values())
    if passes_on and backbone is not None:
        own |= {n: p for n, p in inspect.signature(backbone.forward).parameters.items()
                if n not in own}  # fmt: skip
    return own


def _cache_is_idle(parameters: Mapping[str, Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a cache would be filled by default, and be read by nobody.

    Not so where its absence shows: transformers finds packed samples in ``position_ids`` only
    without a cache, and a tuple of outputs would be shorter.
    """
    names = ("cache", "past_key_values", "cache_params")
    return (
        "use_cache" in parameters
        and kwargs.get("use_cache") is None
        and all(kwargs.get(n) is None for n in names)
        and (kwargs.get("position_ids") is None or kwargs.get("attention_mask") is not None)
        and kwargs.get("return_dict") is not False
    )


def _loggers() -> set[Any]:
    """Log calls, which do not break a head's graph; transformers adds the ``_once`` methods."""
    names = ("warning_once", "warning_advice", "info_once", "warning", "info", "debug")
    return {getattr(logging.Logger, n) for n in names if hasattr(logging.Logger, n)}


def backbone_forward(
    session: Session, plain: Callable[..., Any], compiled: Callable[[], Any]
) -> Callable[..., Any]:
    """The backbone inside a head: a graph break while the head is captured, itself otherwise."""

    @torch._dynamo.disable  # type: ignore[untyped-decorator]  # 2026-11-24: torch has no types here
    def outside(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        session.head_active = False
        try:
            outputs = plain(self, *args, **kwargs)
        finally:
            session.head_active = True
        values = tuple(outputs.values()) if isinstance(outputs, Mapping) else outputs
        values = values if isinstance(values, tuple) else (values,)
        sizes = leading_sizes(values, {})
        if sizes is not None:
            mark_dynamic(values, sizes)
        return outputs

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if session.head_active and self not in session.retired:
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
