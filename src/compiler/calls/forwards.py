"""The forwards put into modules: when a call runs its captured graph, and when it does not."""

from __future__ import annotations

import contextlib
import functools
import types
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ...graph.opaque.quantized import restore_states
from ...kernels.direct import is_traced_here
from ...memory.apply_plan import in_backward, inside_checkpoint
from ..bypass import A_CACHE, Hooks, bypass_reason, hidden_hooks, passes_cache
from ..copies.forward_copies import using_copies
from ..regions import first_tensor, leading_sizes, mark_dynamic, unmark
from ..sample_masks import Masked, Places, with_first_keys, with_whole_masks
from ..segments import BlockSegments, Segmented, binding_checkpoints
from ..session import Capture, Session
from ..units import Units, gathered
from ..watch import UNSETTLED, Watch, global_hook_reason
from .input_gradients import input_without_gradient, shown_with_gradient

_NO_CONTEXT = contextlib.nullcontext()
_NO_UNITS = Units(())
_NO_HOOKS = Hooks()


class Original:
    """The original forward of a module: its own, or its class's.

    That is the one that the class has now. A wrapper of the instance's ``forward`` keeps the one
    that the class had when it was put there: nobody tells us when, so the one at its first call.
    """

    def __init__(self, previous: Any) -> None:
        """Make one from ``previous``, the instance's own forward, or None if it has none.

        ``replaced_by`` is the function that is put into the instance.
        """
        self._own = getattr(previous, "__func__", previous)
        # whether it takes the module first; an unpickled module carries its class's forward
        self.is_method = previous is None or isinstance(previous, types.MethodType)
        self.replaced_by: Callable[..., Any] | None = None
        self._under_wrapper: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()

    def function(self, module: nn.Module) -> Any:
        """The function behind it."""
        if self._own is not None:
            return self._own
        now, put = type(module).forward, module.__dict__.get("forward")
        is_method = isinstance(put, types.MethodType)  # PyTorch 2.11 traces no getattr(put, ...)
        if put is None or (is_method and put.__func__ is self.replaced_by):
            self._under_wrapper.pop(module, None)
            return now
        return self._under_wrapper.setdefault(module, now)

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        function = self.function(module)
        return function(module, *args, **kwargs) if self.is_method else function(*args, **kwargs)


def block_forward(
    session: Session, kind: str, original: Original, compiled: Callable[..., Any]
) -> Callable[..., Any]:
    """The forward of a block, or of a module outside (``kind``); a ``compiled`` form per level."""
    inductor = kind == "block" and session.choices.codegen[0] == "inductor"
    is_inactive, segments = inactive_check(session), session.state.segments
    small_blocks = session.choices.small_blocks

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if is_inactive(self):
            return original(self, *args, **kwargs)
        return run(self, *args, **kwargs)

    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        packs = _given(session, original, self, args, kwargs) if kind == "block" else None
        if packs is None or packs.segments is None:  # first: a small call is to cost little
            sizes = leading_sizes(args, kwargs)
            small = small_blocks.reason(first_tensor(args, kwargs), sizes)
            if small is not None:
                session.log.note(self, small, faster=True)
                return _run_original(session, original, self, args, kwargs, packs)
        failed = session.failure(self)
        if failed is not None:
            return _bypassed(session, failed, original, self, args, kwargs, packs)
        if packs is None and passes_cache(args, kwargs):
            # a call for each token, which need not pay for what is watched below the module
            reason = _why_not(kind, args, kwargs, _NO_HOOKS, session.choices.fake)
            if reason is A_CACHE:
                return _bypassed(session, reason, original, self, args, kwargs, packs)
        watch = session.state.watches.get(self)
        hooks = watch.find_hooks(self)
        units = Units(hooks.units.values()) if hooks.units else _NO_UNITS
        reason = _why_not(kind, args, kwargs, hooks, session.choices.fake)
        # in a checkpoint a block runs again as it has run: one that is left is so at a forward
        if reason is None and watch.is_unsettled and not in_backward():
            reason = UNSETTLED
        if reason is not None:
            if reason is UNSETTLED or (hooks.divided and kind == "block"):
                session.leave(self, reason)
            return _bypassed(session, reason, original, self, args, kwargs, packs)
        sizes = leading_sizes(args, kwargs)
        if units:
            args, kwargs = gathered(units, args, kwargs)
        if watch.packed:
            restore_states(watch.packed)
        x = None
        if inductor and torch.is_grad_enabled() and type(self) not in session.state.without_leaf:
            x = input_without_gradient(self, args, kwargs)
        level = _level(session, self, kind, sizes)
        run_original = functools.partial(
            _run_original, session, original, self, args, kwargs, packs
        )
        code: Hashable = watch.code
        if packs is not None and packs.segments is not None:
            code = Segmented(code)

        given, named = args, kwargs
        masks: Places = ()
        if original.is_method:
            given, named, masks = with_first_keys(args, kwargs)
        given, named = with_whole_masks(given, named)
        if masks:
            code = Masked(code, masks)
        mark = functools.partial(_mark, given, named, sizes if kind != "projector" else None, packs)
        capture = Capture(lambda: compiled(self, level(), code), given, named, mark)
        context = functools.partial(_around, session, self, watch, packs)
        with (
            hidden_hooks(hooks.idle) if hooks.idle else _NO_CONTEXT,
            units.hidden() if units else _NO_CONTEXT,
            segments.given(packs) if packs is not None else _NO_CONTEXT,
        ):
            results = session.call(self, capture, run_original, context, x)
        return units.after(results) if units.is_open else results

    return forward


def _given(
    session: Session, original: Original, module: nn.Module, args: Any, kwargs: dict[str, Any]
) -> BlockSegments | None:
    """The segments that a call of a block is given; None where it mixes no positions."""
    mixes = session.state.watches.has_mixers(module, original.function(module))
    if not mixes:
        return None
    if passes_cache(args, kwargs):
        return None
    return session.state.segments.of_block(first_tensor(args, kwargs), kwargs)


def _run_original(
    session: Session,
    original: Original,
    module: nn.Module,
    args: Any,
    kwargs: Any,
    packs: BlockSegments | None,
) -> Any:
    """The original code, but for what takes segments."""
    args, kwargs = with_whole_masks(args, kwargs)
    if packs is None:
        return original(module, *args, **kwargs)
    copies = session.state.watches.segmented if packs.segments is not None else None
    copy = copies.of(original.function(module)) if copies and original.is_method else None
    below = copies.below(module) if copies else []
    run = functools.partial(original if copy is None else copy, module)

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        with session.state.segments.given(packs), using_copies(below):
            yield

    with around(), binding_checkpoints(module, around, packs.segments is not None):
        return run(*args, **kwargs)


def _around(
    session: Session, module: nn.Module, watch: Watch, packs: BlockSegments | None, x: Tensor | None
) -> Any:
    """What surrounds a captured call: copies of forwards, and ``x`` seen as needing a gradient."""
    watches, copies = session.state.watches, None
    if packs is not None and packs.segments is not None:
        copies = watches.segmented.below(module)
    elif watch.copies:
        copies = watches.opaque.below(module)
    around: Any = using_copies(copies) if copies else _NO_CONTEXT
    return around if x is None else shown_with_gradient(x, around)


def _mark(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    sizes: tuple[int, int] | None,
    packs: BlockSegments | None,
) -> None:
    # none of a projector's: it may fold positions into features, and mostly has as many each time
    if sizes is not None:
        mark_dynamic((*args, *kwargs.values(), packs and packs.segments), sizes)
    else:
        unmark((*args, *kwargs.values()))


def _bypassed(
    session: Session,
    reason: str,
    original: Original,
    module: nn.Module,
    args: Any,
    kwargs: Any,
    packs: BlockSegments | None,
) -> Any:
    session.log.note(module, reason)
    return _run_original(session, original, module, args, kwargs, packs)


def _why_not(
    kind: str, args: tuple[Any, ...], kwargs: dict[str, Any], hooks: Hooks, fake: bool
) -> str | None:
    """Why a call of a block, a norm or a projector is not captured, or None."""
    reason = global_hook_reason() or bypass_reason(args, kwargs, hooks, fake)
    if reason is None and kind != "block" and not torch.is_grad_enabled():
        return f"evaluation: a {kind} outside of the blocks costs less than calling a graph for it"
    return reason


def _level(
    session: Session, module: nn.Module, kind: str, sizes: tuple[int, int] | None
) -> Callable[[], str | None]:
    """What tells how much a block keeps for backward; None where nothing is planned."""
    if kind != "block" or not torch.is_grad_enabled():
        return lambda: None
    planner = session.choices.planner
    if inside_checkpoint():  # somebody else's: it has another graph there
        planner.note(_CHECKPOINTED)
        return lambda: "outer"
    planner.begin(module, prod(sizes or ()))
    return lambda: planner.level(module)


_CHECKPOINTED = "inside the caller's checkpoints, blocks keep their input"


def inactive_check(session: Session) -> Callable[[nn.Module], bool]:
    """Makes the check whether a forward is inactive: restored, or inside somebody's compilation."""

    @torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]  # 2026-11-24: untyped
    def warn_once() -> None:
        """Runs while the outer compilation traces, once."""
        session.log.note_outer_compile()
        warnings.warn(OUTER_COMPILE, stacklevel=2)

    def is_inactive(module: nn.Module) -> bool:
        if module in session.log.restored:
            return True
        if is_traced_here():
            if not session.state.in_head:  # a captured head may go through its blocks itself
                warn_once()
            return True
        return False

    return is_inactive


OUTER_COMPILE = (
    "torch.compile was put around a model that fusewright has optimized: inside it the "
    "original code runs. Use one of the two: fusewright.restore(model) before torch.compile, "
    "or optimize(model, codegen='inductor') without it."
)
