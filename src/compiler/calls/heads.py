"""The forwards of a causal LM and of its backbone: head, shift and loss become one graph."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import label_counts
from ...kernels.direct import is_traced_here
from ...memory.oom_retry import retrying
from ..bypass import CACHE_ARGUMENTS, Hooks, hidden_hooks, transform_reason
from ..logits.head_call import calling
from ..regions import leading_sizes, mark_dynamic
from ..session import CallState, Capture, Replay, Session
from ..units import Units, gathered
from ..watch import UNSETTLED, Watch, global_hook_reason
from .default_cache import DefaultCache
from .forwards import Original, inactive_check
from .opaque_blocks import Results
from .trainer_heads import ASKED, TrainerHead


class _Signature:
    """The parameters of a causal LM's forward."""

    def __init__(self, forward: Any, is_method: bool) -> None:
        self.forward = forward
        parameters = inspect.signature(forward).parameters
        positional = [n for n, p in parameters.items() if p.kind in _POSITIONAL]
        self._positional = positional[1:] if is_method else positional

    def by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """All arguments by name; None where the call is a wrong one."""
        arguments = dict(zip(self._positional, args, strict=False))
        wrong = len(arguments) < len(args) or arguments.keys() & kwargs.keys()
        return None if wrong else {**arguments, **kwargs}


class _Signatures:
    """The signature of a module's original forward, read again where somebody has replaced it."""

    def __init__(self, original: Original) -> None:
        self._original = original
        self._last: _Signature | None = None

    def of(self, head: nn.Module) -> _Signature:
        function = self._original.function(head)
        if self._last is None or self._last.forward is not function:
            self._last = _Signature(function, self._original.is_method)
        return self._last


def head_forward(
    session: Session,
    outside: Sequence[tuple[str, ...]],
    results: Results | None,
    fused: TrainerHead,
    session_of: Callable[[nn.Module], Session | None],
    original: Original,
    compiled: Callable[..., Any],
) -> Callable[..., Any]:
    """The forward of a causal LM: head, shift and loss in one graph, in calls of a training step.

    ``outside`` are the paths, name by name, to the submodules that are not captured with it;
    ``results`` says what the blocks return, where the head calls them itself. ``session_of`` gives
    another session where a second model that has the same backbone was optimized later. There is
    one ``compiled`` form for each set of arguments.
    """
    is_inactive, signatures = inactive_check(session), _Signatures(original)
    passed_on = outside if results is None else ()
    cache = DefaultCache(session, original, lambda head: _submodules(head, passed_on))
    lazy = session.choices.options.logits == "lazy" and results is None

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if is_inactive(self):
            return original(self, *args, **kwargs)
        parameters = signatures.of(self)
        arguments = parameters.by_name(args, kwargs)
        if arguments is None:
            return original(self, *args, **kwargs)  # raises the TypeError that it always raised
        if arguments.get(ASKED):
            return fused.function(original, self)(self, **arguments)
        if not _is_captured(session, self, outside, arguments, lazy):
            return original(self, **arguments)
        if cache.is_unwanted(self, (), arguments):
            return cache.replaced(call(self, {**arguments, "use_cache": False}))
        return call(self, arguments)

    def call(self: nn.Module, kwargs: dict[str, Any]) -> Any:
        training = self.training and torch.is_grad_enabled()
        small = session.choices.small_blocks.reason_of_head(self, kwargs)
        if small is not None:
            session.log.note(self, small, faster=True)
            return original(self, **kwargs)
        watch = session.state.watches.get(self, outside)
        hooks = watch.find_hooks(self)
        if results is not None and hooks.units:  # nothing says where its own part begins
            hooks.others = hooks.others or next(iter(hooks.units))
        reason = _why_not(session, self, kwargs, hooks.others, watch)
        if reason is None and results is not None:
            if results.any_unknown(watch.blocks):  # the first call shows what they return
                if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
                    return original(self, **kwargs)
                # a checkpoint around it runs it once more, and must find the same operations
                session.log.note(self, "hooks on saved tensors, as a checkpoint's, are around it")
                results.is_recording = False
                try:
                    return original(self, **kwargs)
                finally:
                    results.is_recording = True
            reason = results.unsupported_reason(watch.blocks)
        if reason is not None:
            session.log.note(self, reason)
            return original(self, **kwargs)
        _mark_sizes(kwargs)

        def find_compiled() -> Any:
            return compiled(self, _given(kwargs), watch.code)

        sessions = (session, *map(session_of, _submodules(self, outside)))
        states = list(dict.fromkeys(s.state for s in sessions if s is not None))
        run = functools.partial(_run, session, states, self, kwargs, hooks, find_compiled, original)
        return retrying(session.choices.planner, run) if training else run()

    return forward


_TOKENS = ("labels", "input_ids", "inputs_embeds")


def _given(kwargs: dict[str, Any]) -> tuple[str, ...]:
    """The arguments of a call: each set of them has its own graphs."""
    # a guard on one that is not there cannot fail
    return tuple(sorted(k for k, v in kwargs.items() if v is not None))


def _mark_sizes(kwargs: dict[str, Any]) -> None:
    """Tell Dynamo which sizes are batch and sequence."""
    ids = next((v for v in map(kwargs.get, _TOKENS) if v is not None), None)
    if isinstance(ids, Tensor) and ids.dim() >= 2:
        mark_dynamic(kwargs.values(), (ids.shape[0], ids.shape[1]))


def _is_captured(
    session: Session, head: nn.Module, outside: Sequence[tuple[str, ...]], kwargs: Any, lazy: bool
) -> bool:
    """Whether a call is one that a graph may run: none has failed, and it trains or evaluates."""
    failed = session.log.failed.get(head)
    if failed is not None:
        session.log.note(head, failed)
        return False
    labelled = kwargs.get("labels") is not None
    return labelled or (lazy and is_step(head, kwargs))


def _why_not(
    session: Session, head: nn.Module, kwargs: Any, hooked: str | None, watch: Watch
) -> str | None:
    """Why a call with labels is not captured, as far as the blocks have no say in it."""
    reason = global_hook_reason() or transform_reason((), kwargs, session.choices.fake)
    if reason is None and hooked:
        return f"a hook is registered on its submodule {hooked}"
    if reason is None and watch.is_unsettled:
        reason = UNSETTLED
        session.log.fail(head, reason)
    return reason


def _run(
    session: Session,
    states: Sequence[CallState],
    head: nn.Module,
    kwargs: dict[str, Any],
    hooks: Hooks,
    find_compiled: Callable[[], Any],
    original: Original,
) -> Any:
    """The captured form; the original one where the capture fails."""
    label_counts.send(kwargs.get("labels"))
    units = Units(hooks.units.values())
    replay = Replay(session.choices.planner.meter.device, kwargs.get("labels") is not None)

    def run_original() -> Any:
        _enter_head(states, False, None, replay)
        replay.start()
        with units.shown():
            return original(head, **kwargs)

    outer = [(s.in_head, s.units, s.replay) for s in states]
    _enter_head(states, True, units, replay)
    try:
        with (
            hidden_hooks(hooks.idle),
            units.hidden(),
            calling(head),
            _logging_ignored(),
        ):
            outputs = session.call(head, Capture(find_compiled, (), kwargs), run_original)
    finally:
        label_counts.forget()  # its loss has been computed: nothing is kept until the next
        for state, before in zip(states, outer, strict=True):
            state.in_head, state.units, state.replay = before
            if state.replay is None:
                while state.on_return:
                    state.on_return.pop()()
    return units.after(outputs) if units.is_open else outputs


def _enter_head(
    states: Sequence[CallState], in_head: bool, units: Units | None, replay: Replay
) -> None:
    for state in states:
        state.in_head, state.units, state.replay = in_head, units, replay


def _submodules(module: nn.Module, paths: Sequence[tuple[str, ...]]) -> list[nn.Module]:
    submodules = []
    for path in paths:
        m: nn.Module | None = module
        for name in path:
            m = None if m is None else m._modules.get(name)
        submodules += [] if m is None else [m]
    return submodules


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@contextmanager
def _logging_ignored() -> Iterator[None]:
    """Let log calls break no graph."""
    # PyTorch 2.11 cannot write functions that it ignores into its records of a compilation, and
    # logs a traceback about that, each time
    logger = logging.getLogger("torch._dynamo.metrics_context")
    disabled, logger.disabled = logger.disabled, True  # a level would empty all loggers' caches
    try:
        with torch._dynamo.config.patch(ignore_logger_methods=_logger_methods()):
            yield
    finally:
        logger.disabled = disabled


def _logger_methods() -> set[Any]:
    """Log calls, which do not break a head's graph; transformers adds the ``_once`` methods."""
    names = ("warning_once", "warning_advice", "info_once", "warning", "info", "debug")
    return {getattr(logging.Logger, n) for n in names if hasattr(logging.Logger, n)}


def _gathered(outputs: Any, units: Units) -> Any:
    """The backbone's outputs, once the parameters of the head's units are gathered."""
    if isinstance(outputs, MutableMapping):
        for name, value in gathered(units, (), dict(outputs))[1].items():
            if value is not outputs[name]:
                outputs[name] = value
        return outputs
    if isinstance(outputs, tuple):
        return gathered(units, outputs, {})[0]
    return gathered(units, (outputs,), {})[0][0]


def backbone_forward(
    session: Session,
    fused: TrainerHead | None,
    original: Original,
    compiled: Callable[..., Any],
) -> Callable[..., Any]:
    """The backbone inside a head: a graph break while the head is captured, itself otherwise.

    ``fused`` is that of a backbone that a trainer's head may call.
    """

    def run_in_step(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        function = original.function(self) if original.is_method else None
        packs = session.choices.options.packs or session.state.watches.has_mixers(self, function)
        return session.state.segments.run_backbone(original, function, self, args, kwargs, packs)

    cache = DefaultCache(session, original)

    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not cache.is_unwanted(self, args, kwargs):
            return run_in_step(self, *args, **kwargs)
        return cache.replaced(run_in_step(self, *args, **{**kwargs, "use_cache": False}))

    @torch._dynamo.disable  # type: ignore[untyped-decorator]  # 2026-11-24: torch has no types here
    def run_uncaptured(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        session.state.in_head = False
        try:
            outputs = run(self, *args, **kwargs)
        finally:
            session.state.in_head = True
        if session.state.units:
            outputs = _gathered(outputs, session.state.units)
        if session.state.replay is not None:
            session.state.replay.note(self, outputs)
        values = tuple(outputs.values()) if isinstance(outputs, Mapping) else outputs
        values = values if isinstance(values, tuple) else (values,)
        sizes = leading_sizes(values, {})
        if sizes is not None:
            mark_dynamic(values, sizes)
        return outputs

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if session.state.in_head and self not in session.log.restored:
            return run_uncaptured(self, *args, **kwargs)
        if fused is not None and self not in session.log.restored and not is_traced_here():
            fused.adopt(self)
        saved = session.state.replayed(self)
        if saved is not None:
            return saved[0]
        if self in session.log.restored or is_traced_here():
            return original(self, *args, **kwargs)
        return run(self, *args, **kwargs)

    return forward


# --- calls without labels that are a part of training ---------------------------------------------


def is_step(head: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether a call without labels is a part of training: its caller makes the loss."""
    # One without gradients (a reference) says that it wants no cache: else it may be generation.
    if any(kwargs.get(name) is not None for name in CACHE_ARGUMENTS):
        return False
    return head.training and (torch.is_grad_enabled() or kwargs.get("use_cache") is False)
