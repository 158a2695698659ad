"""Values that are computed when somebody reads them: logits, and the gradients of logits.

``outputs.logits`` of a training step is read by metrics and by custom losses, and by nobody else;
for a large vocabulary it is the largest tensor of the step. A ``LazyLogits`` takes its place. To
autograd it is a tensor like any other, with a history, hooks and a gradient: only its values are
missing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import enable_reentrant_dispatch
from torch.utils import swap_tensors
from torch.utils._pytree import tree_map

from . import calls
from .changes import KeptLogits
from .deferred import (
    Arrival,
    Change,
    Deferred,
    Family,
    Given,
    Lift,
    Recorded,
    Snapshot,
    await_loss,
)
from .reads import Reads

_add = torch.ops.aten.add.Tensor
_cast = torch.ops.aten._to_copy.default
_clone = torch.ops.aten.clone.default
_detach = torch.ops.aten.detach.default


class LazyLogits(Tensor):
    """A tensor whose values are computed at the first use of them.

    Shape, dtype, device and history are known at once, and hooks can be registered. What is
    ``recorded`` of them answers some calls without the values: rows are chosen, scales noted,
    log-probabilities computed in tiles. Everything else (arithmetic, printing, ``numpy``) computes
    the values, with their history, and keeps them. Casts to another dtype stay lazy, as
    mixed-precision wrappers cast every output; so do the copies that wrappers for several
    processes make.

    ``is_written`` says whether somebody has written to the values.
    """

    is_written = False
    recorded: Recorded | None = None
    _source: Deferred
    _lift: Lift | None = None
    _family: Family
    _view_of: tuple[Tensor, Callable[..., Tensor]] | None = None
    _real_view: Tensor | None = None
    _writes_seen = 0
    _arrival: Arrival | None = None
    _state_when_saved: int | None = None

    @staticmethod
    def __new__(
        cls,
        compute: Callable[[], Tensor] | Deferred,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        strides: tuple[int, ...] | None = None,
    ) -> LazyLogits:
        """Make one; ``compute`` must return such a tensor, contiguous if there are no strides."""
        result: LazyLogits = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, strides=strides, dtype=dtype, device=device
        )
        result._source = compute if isinstance(compute, Deferred) else Deferred(compute)
        result._family = Family()
        return result

    @property
    def is_pending(self) -> bool:
        """Whether nobody has used its values yet, nor those that it is a view of."""
        if not self._source.is_pending or self._view_of is None:
            return self._source.is_pending
        base = self._view_of[0]
        return isinstance(base, LazyLogits) and base.is_pending

    @property
    def writes(self) -> int:
        """How often somebody has written to its values, or to what shares memory with them."""
        return self._family.writes

    @property
    def _is_behind(self) -> bool:
        """Whether somebody has written to what shares memory with this since it was made."""
        return self._family.is_written_since(self._writes_seen)

    def values(self) -> Tensor:
        """The values without a history: computed now, or at the first call."""
        if torch.is_inference_mode_enabled() and self.requires_grad:
            with torch.inference_mode(False), torch.no_grad():  # who reads them later may train
                return self._source.values()
        return self._source.values()

    def changed(self, change: Change, *others: LazyLogits) -> LazyLogits:
        """What an operation makes of this and of ``others``; without a history."""
        sources = [z._source for z in others]
        source = self._source.derive(change.run, *sources, is_view=change.is_view)
        result = LazyLogits(source, change.shape, change.dtype, self.device, change.strides)
        result.recorded = change.recorded
        return result

    def share(self, made: LazyLogits, function: Callable[..., Tensor]) -> None:
        """Note that ``made`` is a view of this: what is written to one is in both."""
        made._view_of, made._family = (self, function), self._family
        made._writes_seen = self._family.writes

    def alias(self) -> LazyLogits:
        """One that shares the values, as ``detach`` does: what is written to one is in both."""
        result = LazyLogits(self._source, tuple(self.shape), self.dtype, self.device, self.stride())
        result.recorded, result._family = self.recorded, self._family
        if self._view_of is not None:
            result._view_of, result._writes_seen = (self, torch.detach), self._family.writes
        return result

    def snapshot(self) -> Snapshot:
        """What the values are now; for a backward pass that needs them."""
        return Snapshot(self._source, self._family)

    def keep(self, kept: KeptLogits, is_done: Callable[[], bool]) -> None:
        """Let the values be among those that are ``kept``."""
        kept.add(self._source, is_done)

    def wait_for_loss(self, reads: Reads) -> None:
        """Note that they are a training call's, whose caller makes the loss."""
        await_loss(self._source, reads)

    def plus(self, other: Any) -> Any:
        """The sum, if it is lazy as well; else NotImplemented."""
        return NotImplemented

    def _derive(self, function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> LazyLogits:
        return self.changed(Change(function, tuple(self.shape), dtype, None))

    def _as_view(self) -> Tensor:
        """What it is now: a real view of what it is a view of, the same one each time."""
        if self._view_of is None:
            return self.materialize()
        if self._real_view is not None:
            return self._real_view
        base, function = self._view_of
        view: Tensor = function(base._as_view() if isinstance(base, LazyLogits) else base)
        if view.requires_grad:
            self._real_view = view
        return view

    def materialize(self) -> Tensor:
        """The values as a tensor whose history leads to this one's.

        Raises:
            RuntimeError: another part of them was written to as a tensor of its own.
        """
        family = self._family
        if self._writes_seen != family.writes and self._view_of is not None:
            return self._as_view()
        with calls.outside_transforms():
            data = self.values()
            self._source.settle()
            family.watch(data)
            if not (self.requires_grad and torch.is_grad_enabled()):
                return data
            lift = self._lift
            if lift is not None and lift.trace.is_written and lift.tensor is not None:
                # its own history has the write, unless there is one into another tensor as well
                family.require_unwritten_parts(lift.trace)
                if family.whole is None or not family.whole.is_written:
                    return lift.tensor
            family.require_unwritten_parts()
            if self._view_of is not None and family.whole is not None and family.whole.is_written:
                # the history of the whole has it, and that of a view of the whole, too
                return self._as_view()
            return self._lifted()

    def _lifted(self) -> Tensor:
        """The tensor that is given out, the same one each time."""
        if self._lift is not None and self._lift.tensor is not None:
            return self._lift.tensor
        with torch._C.DisableTorchFunctionSubclass():
            lifted: Tensor = Given.apply(self, self.values())  # type: ignore[no-untyped-call]
        if self._view_of is not None:
            self._lift = self._family.note_part(lifted)
        else:
            self._lift = Lift(lifted)
            self._family.whole = self._lift.trace
        return lifted

    @classmethod
    # a compiler leaves out what is computed of these: it would trace what is recorded here
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # 2026-11-28: torch has no type
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if calls.depends_on_writes(func, name) and not calls.writes(name):
            originals = args
            args, kwargs = tree_map(functools.partial(_caught_up, name), (args, kwargs))
            if calls.is_gradient(func, name) and args[0] is not originals[0]:
                return originals[0]._gradient_of_written(args[0], func, *args[1:])
        first = args[0] if args else None
        is_for_wrapper = calls.copies_for_wrapper(name, kwargs)
        is_for_autograd = calls.is_for_autograd(func, name)
        if not (is_for_wrapper or is_for_autograd or calls.writes(name)):
            answer = _recorded_answer(func, args, kwargs)
            if answer is not NotImplemented:
                return answer
        if is_for_autograd or is_for_wrapper or calls.only_casts(name, args, kwargs):
            with torch._C.DisableTorchFunctionSubclass():
                result = func(*args, **kwargs)
            if name == "retain_grad" and isinstance(first, LazyLogits):
                first._arrival = Arrival(first._family, first._writes_seen)
                register: Any = first.register_hook
                with torch._C.DisableTorchFunctionSubclass():
                    register(first._arrival.note)
            # a gradient that is asked for is wanted now: later, the graph may be gone
            return tree_map(_materialized, result) if func is torch.autograd.grad else result
        _note_reads(func, (*args, *kwargs.values()))
        if isinstance(first, LazyLogits) and calls.writes(name):
            return first._run_write(func, args, kwargs)
        args, kwargs = tree_map(_materialized, (args, kwargs))
        return func(*args, **kwargs)

    def _require_own_history(self) -> None:
        """Raise where a function has written to a part of them and marked them as dirty."""
        before = None if self._lift is None else self._lift.leads_to
        with torch._C.DisableTorchFunctionSubclass():
            now = self.grad_fn
        if before is not None and now is not None and before is not now:
            raise RuntimeError(
                "an autograd.Function has written to a part of these logits in place: let it "
                "write to logits.clone(), or use fusewright.optimize(model, logits='always')"
            )

    def _require_whole_history(self) -> None:
        """Raise where its own history, all that C++ code sees of it, lacks a write into a part."""
        if self._is_behind and self.requires_grad and self._lacks_write():
            raise RuntimeError(
                "a part of these logits was written to in place since they were made, and an "
                "autograd.Function, a reentrant checkpoint or vmap that takes them, or reads them, "
                "would miss the gradient of that: give it logits.clone(), or use "
                "fusewright.optimize(model, logits='always')"
            )

    def _note_saved(self) -> None:
        """Note that they may be saved now, for a backward pass, as what they are."""
        if self._state_when_saved is None and torch._C._current_graph_task_id() == -1:
            self._state_when_saved = self._family.state

    def _require_unwritten_when_saved(self) -> None:
        """Raise, as eager mode does, where a backward pass may read what it saved earlier."""
        if self.requires_grad and self._state_when_saved not in (None, self._family.state):
            raise RuntimeError(
                "these logits are read in a backward pass, and were modified by an in-place "
                "operation after its forward pass may have saved them: write to logits.clone(), or "
                "use fusewright.optimize(model, logits='always')"
            )

    def _gradient_of_written(self, real: Tensor, access: Any, *value: Any) -> Tensor | None:
        """Read, set or delete the gradient of logits that were written to; ``real``: what they are.

        The own gradient is that of what they were before.
        """
        arrival = self._arrival
        if access.__name__ != "__get__":
            self._arrival = None if arrival is None else Arrival(self._family, self._writes_seen)
            with torch._C.DisableTorchFunctionSubclass():
                access(self, *value)
            return access(real, *value)  # type: ignore[no-any-return]
        with torch._C.DisableTorchFunctionSubclass():
            keeps = self.retains_grad, real.retains_grad  # of the other, PyTorch would warn
            before = self.grad if keeps[0] or not keeps[1] else None
            after = real.grad if keeps[1] or not keeps[0] else None
        if after is not None:
            is_mixed = before is not None and (arrival is None or arrival.is_early)
        else:
            is_mixed = arrival is not None and arrival.is_late and self._lacks_write()
        if is_mixed:
            raise RuntimeError(
                "what retain_grad keeps of these logits came, or began, before a part of them was "
                "written to in place: call retain_grad after the write alone, write to "
                "logits.clone(), or use fusewright.optimize(model, logits='always')"
            )
        return before if after is None else after

    def _lacks_write(self) -> bool:
        with torch.enable_grad():
            real = self.materialize()
        if self._lift is not None and real is self._lift.tensor:
            return self._lift.trace.is_written
        base = None if self._view_of is None else self._view_of[0]
        return not isinstance(base, LazyLogits) or base._lacks_write()

    def _run_write(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Write into the values: from then on this is an ordinary tensor, with its new history."""
        # One of the views that ``chunk`` or ``unbind`` has made may be written to as well, which
        # eager mode refuses: what it is a view of, and its gradient, are known here.
        self._family.before_write()
        with torch.enable_grad():
            real = self._as_view()
        if self._view_of is None and real is self.values():  # which aliases hold, too
            real = real.detach()
        rest, kwargs = tree_map(
            lambda x: real if x is self else _materialized(x), (args[1:], kwargs)
        )
        target, result = real, func(real, *rest, **kwargs)
        self._family.writes += 1
        whole = self._lift.tensor if self._view_of is None and self._lift is not None else None
        self._lift = self._view_of = self._real_view = None
        if real is whole:  # others may have it, or a view of it
            with torch.enable_grad():
                real = real.view_as(real)
        try:
            swap_tensors(self, real)
        except RuntimeError as error:  # autograd holds it, too, as it does in a hook
            if self.requires_grad:
                raise RuntimeError(
                    "these logits cannot be written to in place here: write to logits.clone(), or "
                    "use fusewright.optimize(model, logits='always')"
                ) from error
            values = real.detach()
            self._source, self.is_written = Deferred(lambda: values), True
        return self if result is target else result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # 2026-11-24: torch types it as a method
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        first = args[0] if args else None
        if isinstance(first, LazyLogits):
            if func is not _detach and torch.is_grad_enabled():
                with enable_reentrant_dispatch():  # of vmap, most likely: the others are caught up
                    first._require_whole_history()
            if func is _add and not kwargs:
                total = first.plus(args[1])
                if total is not NotImplemented:
                    return total
            if first._source.is_pending:
                if func is _cast and set(kwargs or ()) == {"dtype"}:
                    dtype: torch.dtype = (kwargs or {})["dtype"]
                    return first._derive(lambda values: values.to(dtype), dtype)
                if func is _detach:
                    return first.alias()
                if func is _clone and not kwargs:
                    return first._derive(torch.clone, first.dtype)
        args, kwargs = tree_map(_as_tensor, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(  # type: ignore[override]  # 2026-11-24: torch calls the argument otherwise
        self, *, tensor_contents: Any = None
    ) -> str:
        return repr(self.materialize())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.materialize().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.materialize().detach().clone()


def _materialized(x: Any) -> Any:
    return x.materialize() if isinstance(x, LazyLogits) else x


def _caught_up(name: str, x: Any) -> Any:
    """What logits are now, if somebody has written to what shares memory with them."""
    if not isinstance(x, LazyLogits):
        return x
    if calls.may_save():
        x._note_saved()
    if not x._is_behind:
        return x
    if name != "__set__":  # which autograd does, and takes no error
        x._require_own_history()
    if calls.is_in_function():
        x._require_whole_history()  # the function has the edges of its arguments already
    elif calls.reads_what_was_saved():
        x._require_unwritten_when_saved()
    if x._view_of is not None and name == "register_hook":  # torch 2.13 would end the process
        raise RuntimeError(
            "register_hook of a part of these logits is too late: they were written to since. Call "
            "it before, or use fusewright.optimize(model, logits='always')."
        )
    if name == "detach":  # which no history matters to
        with torch.no_grad():
            return x.materialize()
    real = x.materialize()
    with torch._C.DisableTorchFunctionSubclass():
        keeps_gradient = x.retains_grad
    if keeps_gradient and real.grad_fn is not None:
        real.retain_grad()  # as in eager mode, where that of what was written is kept from then on
    return real


def _as_tensor(x: Any) -> Any:
    if not isinstance(x, LazyLogits):
        return x
    with enable_reentrant_dispatch():  # below autograd, but the values may be a gradient
        if torch._C._current_graph_task_id() != -1:
            x._require_unwritten_when_saved()
        else:
            x._note_saved()
        values = x.values()
        x._family.watch(values)
        return values


def _recorded_answer(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What is known without values, from the first of the arguments that are lazy."""
    for arg in (*args, *kwargs.values()):
        each = arg if isinstance(arg, (tuple, list)) else (arg,)
        z = next((z for z in each if isinstance(z, LazyLogits)), None)
        if z is None:
            continue
        if z.recorded is None or not z.is_pending:
            break
        if torch._C._are_functorch_transforms_active():  # what a tile computes has no batches
            break
        return z.recorded.answer(func, args, kwargs)
    return NotImplemented


def _note_reads(func: Any, values: Any) -> None:
    for z in values:
        if isinstance(z, (tuple, list)):
            _note_reads(func, z)
        elif isinstance(z, LazyLogits) and z.recorded is not None and z.is_pending:
            z.recorded.note_read(func)
