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


class WriteTrace:
    """Tells of a tensor that was given out whether it was written to, without keeping its graph."""

    def __init__(self, tensor: Tensor) -> None:
        self.reference = weakref.ref(tensor)
        self._alias, self._version = tensor.detach(), tensor._version

    @property
    def writes(self) -> int:
        """How often somebody has written to it, or to a view of it, also if it is gone by now."""
        return self._alias._version - self._version

    @property
    def is_written(self) -> bool:
        """Whether somebody has."""
        return self.writes > 0


class Lift:
    """A tensor that is given out for logits: its history leads to them, it shares their memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor
        self.history = tensor.grad_fn
        self.trace = WriteTrace(tensor)


class Family:
    """Logits and their views, which share memory; ``is_shared``: others may write to it, too."""

    def __init__(self) -> None:
        self.writes, self.is_shared = 0, False
        # of the logits, and of their views; weak, as a lift's graph leads to what leads to these
        self.whole: WriteTrace | None = None
        self._parts: list[tuple[weakref.ref[Lift], WriteTrace]] = []

    @property
    def is_written(self) -> bool:
        """Whether somebody has written to a tensor that was given out."""
        whole = self.whole is not None and self.whole.is_written
        return whole or any(trace.is_written for _, trace in self._parts)

    @property
    def state(self) -> int:
        """What grows with each write into any of them."""
        traces = [trace for _, trace in self._parts]
        traces += [] if self.whole is None else [self.whole]
        return self.writes + sum(trace.writes for trace in traces)

    def is_written_since(self, writes: int) -> bool:
        """Whether somebody has written to any of them since there were so many ``writes``."""
        return self.writes != writes or self.is_written

    def note_part(self, tensor: Tensor) -> Lift:
        """Note what readers of a view get."""
        lift = Lift(tensor)
        # nobody can write any more to those that are gone, nor to a view of them
        self._parts = [
            (of, trace)
            for of, trace in self._parts
            if trace.is_written or trace.reference() is not None
        ]
        self._parts.append((weakref.ref(lift), lift.trace))
        return lift

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

    def require_unwritten_parts(self, besides: WriteTrace | None = None) -> None:
        """Raise where a part was written to as a tensor of its own: no other history sees that."""
        if any(trace.is_written for _, trace in self._parts if trace is not besides):
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
