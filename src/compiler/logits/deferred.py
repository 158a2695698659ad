"""Values that are computed at the first use of them, and what operations make of these."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .calls import outside_transforms
from .reads import Reads


class Deferred:
    """Values that are computed at the first use of them, and what is derived from them.

    ``recompute`` computes them once more, whatever was written to them; None once they are there.
    """

    def __init__(
        self,
        compute: Callable[[], Tensor],
        recompute: Callable[[], Tensor] | None = None,
        is_view: bool = False,
    ) -> None:
        """Make one; ``is_view`` of the values that these are derived from."""
        self._compute: Callable[[], Tensor] | None = compute
        self.recompute = recompute
        self._values: Tensor | None = None
        self._is_view = is_view
        self._derived: list[weakref.ref[Deferred]] = []

    @property
    def is_pending(self) -> bool:
        """Whether nobody has used them yet."""
        return self._values is None

    def values(self) -> Tensor:
        """The values, without a history."""
        if self._values is None:
            assert self._compute is not None
            with outside_transforms():
                self._values, self._compute = self._compute().detach(), None
                self.recompute = None
        return self._values

    def derive(
        self, function: Callable[..., Tensor], *others: Deferred, is_view: bool = False
    ) -> Deferred:
        """What ``function`` makes of the values, and of those of ``others``; deferred as well."""

        def compute() -> Tensor:
            return function(self.values(), *(o.values() for o in others))

        computations = [source.recompute or source.values for source in (self, *others)]
        derived = Deferred(compute, lambda: function(*(each() for each in computations)), is_view)
        for source in (self, *others):
            source._derived.append(weakref.ref(derived))
        return derived

    def settle(self) -> None:
        """Compute what was derived, for somebody gets the values and may write to them."""
        derived, self._derived = self._derived, []
        for reference in derived:
            value = reference()
            if value is not None:
                value.values()
                if value._is_view:  # what was derived from it would change, too
                    value.settle()


class Recorded(Protocol):
    """What is known of lazy logits besides their values: what they are made of."""

    def answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What ``func`` returns, where that needs no values; else NotImplemented."""

    def note_read(self, func: Any) -> None:
        """Remember that ``func`` needs the values."""

    def finish(self, values: Tensor) -> None:
        """Let the values, just made, agree with what was given out without them."""


@dataclass(frozen=True, eq=False)
class Change:
    """An operation that makes lazy logits of others; ``function`` computes its values from theirs.

    ``shape``, ``dtype``, ``strides`` (None if contiguous) and ``recorded`` are those of the result.
    ``is_view``: it is a view of the first of the others. ``is_linear``: its derivative does not
    depend on values. ``backward`` computes the gradient from its own and from the values that were
    made; None where autograd is to find it.
    """

    function: Callable[..., Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype
    recorded: Recorded | None
    is_view: bool = False
    is_linear: bool = True
    backward: Callable[[Tensor, Tensor], Tensor] | None = None
    strides: tuple[int, ...] | None = None

    def run(self, *values: Tensor) -> Tensor:
        """The values that are given out."""
        result = self.function(*values)
        if self.recorded is not None and not self.is_view:  # a view has those of its base
            self.recorded.finish(result)
        return result


class Given(torch.autograd.Function):
    """What is given out for logits ``z``: their ``values``, with a history that leads to them.

    All that is given out shares one version counter. So autograd sees, of what it has saved of it,
    any write into what shares its memory. The logits themselves have another one.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, values: Tensor) -> Tensor:
        """``z``: (..., vocabulary), lazy; ``values``: the same shape and dtype."""
        return values.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Pass the gradient on to the logits."""
        return grad, None


class HistoryTrace:
    """Tells of a tensor that was given out whether its history has a write; does not keep it."""

    def __init__(self, tensor: Tensor) -> None:
        self.reference, self._is_written = weakref.ref(tensor), False

    @property
    def is_written(self) -> bool:
        """Whether somebody has written to it, or to a view of it, with a history."""
        tensor = self.reference()
        if tensor is not None and getattr(tensor.grad_fn, "_forward_cls", None) is not Given:
            self._is_written = True
        return self._is_written


class Lift:
    """A tensor that was given out for logits, and what its history led to then."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor
        history = tensor.grad_fn  # asked now: in PyTorch 2.11 it may go before this does
        self.leads_to = None if history is None else history.next_functions[0][0]
        self.trace = HistoryTrace(tensor)


class Family:
    """Logits and their views, which share memory; ``is_shared``: others may write to it, too."""

    def __init__(self) -> None:
        self.writes, self.is_shared = 0, False
        # of the logits, and of their views; weak, as a lift's graph leads to what leads to these
        self.whole: HistoryTrace | None = None
        self._parts: list[tuple[weakref.ref[Lift], HistoryTrace]] = []
        self._memory: Tensor | None = None
        self._first = self._last = 0  # versions: when it was given out, and at the last look
        self._is_lost = False

    def watch(self, values: Tensor) -> None:
        """Note that ``values`` are given out."""
        if self._memory is None and not values.is_inference():  # those have no versions
            self._memory = values.detach()
            self._first = self._last = self._memory._version
        self.is_shared = True
        self._look()

    @property
    def state(self) -> int:
        """What grows, by one or more, with each write into any of them."""
        return self.writes + (0 if self._memory is None else self._memory._version - self._first)

    def is_written_since(self, writes: int) -> bool:
        """Whether somebody has written to any of them since there were so many ``writes``."""
        return self.writes != writes or self.state > self.writes

    def note_part(self, tensor: Tensor) -> Lift:
        """Note what readers of a view get."""
        self._look()
        lift = Lift(tensor)
        self._parts.append((weakref.ref(lift), lift.trace))
        return lift

    def _look(self) -> None:
        """Forget parts that are gone; they are lost if somebody may have written to them."""
        now = self._last if self._memory is None else self._memory._version
        kept = [(of, t) for of, t in self._parts if t.is_written or t.reference() is not None]
        if now != self._last and len(kept) < len(self._parts):
            self._is_lost = True  # to one of those that are gone since, maybe, or to another
        self._parts, self._last = kept, now

    def before_write(self) -> None:
        """Raise where a part was written to, or is there, as a tensor whose history misses this."""
        self.require_unwritten_parts()
        for lift, _ in self._parts:
            if (of := lift()) is not None:
                of.tensor = None
        if any(trace.reference() is not None for _, trace in self._parts):
            raise RuntimeError(
                "these logits cannot be written to in place here, as a part of a part of them is "
                "there as a tensor of its own: write to logits.clone(), or use "
                "fusewright.optimize(model, logits='always')"
            )
        self._parts.clear()

    def require_unwritten_parts(self, besides: HistoryTrace | None = None) -> None:
        """Raise where a part was written to as a tensor of its own: no other history sees that."""
        self._look()
        if self._is_lost or any(t.is_written for _, t in self._parts if t is not besides):
            raise RuntimeError(
                "these logits cannot be read any more, as a part of them was written to in place: "
                "write to a clone() of it, or use fusewright.optimize(model, logits='always')"
            )


class Arrival:
    """When gradients that are kept came: ``is_early`` before a write, ``is_late`` after it."""

    def __init__(self, family: Family, writes: int) -> None:
        # weak, as a graph keeps the hook, and traces of writes keep the values
        self._family, self._writes = weakref.ref(family), writes
        self.is_early = self.is_late = False

    def note(self, grad: Tensor) -> None:
        """A hook of the logits."""
        family = self._family()
        if family is not None:
            is_late = family.is_written_since(self._writes)
            self.is_early, self.is_late = self.is_early or not is_late, self.is_late or is_late


class Snapshot:
    """What the values of pending logits are now, whatever is written to them later."""

    def __init__(self, source: Deferred, family: Family) -> None:
        self._source, self._family, self._recompute = source, family, source.recompute

    def values(self) -> Tensor:
        """The values; computed once more where somebody may have written to them."""
        if not self._family.is_shared or self._recompute is None:
            return self._source.values()
        with outside_transforms():
            return self._recompute().detach()


# ------------------------------------------------------------------ logits that wait for their loss
#
# A model that is called in evaluation mode meanwhile, without labels, is a teacher or a reference:
# its logits are for the same loss, and can be lazy, too.


_pending: weakref.WeakKeyDictionary[Deferred, weakref.ref[Reads]] = weakref.WeakKeyDictionary()


def await_loss(logits: Deferred, reads: Reads) -> None:
    """Note that a training call returned ``logits`` without a loss; earlier ones no longer wait."""
    stop_waiting(reads)
    _pending[logits] = weakref.ref(reads)


def stop_waiting(reads: Reads) -> None:
    """Note that a model's backward pass has begun."""
    for logits, of in list(_pending.items()):
        if of() is reads or of() is None:
            del _pending[logits]


def another_awaits(reads: Reads) -> bool:
    """Whether a model other than that of ``reads`` has logits that wait for their loss."""
    return any(
        logits.is_pending and of() is not None and of() is not reads
        for logits, of in list(_pending.items())
    )
