"""An optimizer that steps hundreds of small tensors as one.

LoRA on every linear layer of a small model is 420 tensors; an optimizer spends its time on each of
them, not on their numbers. ``FlatOptimizer`` puts the small parameters of a group side by side in
one buffer, and steps that. Parameters, groups and state are those of the optimizer that it wraps.
"""

from __future__ import annotations

import warnings
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..errors import OptimizeError
from .buckets import Bucket, BucketSlice, alignment, cut, join, loose_reasons, signature, why_not

THRESHOLD = 2**18
"""Elements. Above it the arithmetic of a tensor takes longer than its share of the overhead, and a
second copy of its gradient is memory that counts; all adapters of rank 16 are below it."""

_SCALING = ("grad_scale", "found_inf")


def flatten_optimizer(optimizer: Optimizer, threshold: int = THRESHOLD) -> Optimizer:
    """Make ``optimizer`` step its small tensors as one; wrap it before the scheduler is made.

    Args:
        optimizer: over the parameters of a model, fresh or with state.
        threshold: the most elements of a tensor that is gathered.

    Returns:
        A ``FlatOptimizer``; or ``optimizer`` itself, with a warning that says why, where it is
        not an element-wise one (Adafactor, Muon, LAMB).
    """
    if isinstance(optimizer, FlatOptimizer):
        return optimizer
    try:
        return FlatOptimizer(optimizer, threshold)
    except OptimizeError as error:
        warnings.warn(str(error), stacklevel=2)
    return optimizer


class FlatOptimizer(Optimizer):
    """``optimizer``, its small tensors updated as one flat buffer per group, dtype and device.

    - Parameters keep their identity; each ``p.data`` becomes a view of the buffer, and its old
      memory is free. ``p.grad`` stays what autograd made: clipping, ``zero_grad`` either way,
      gradient scalers and hooks see nothing new. ``step`` copies the gradients into one buffer.
    - Parameters without a gradient are not updated, nor do their counts of steps advance.
    - ``param_groups``, ``state`` and ``state_dict`` are those of the wrapped optimizer, by
      parameter: a checkpoint of either loads into the other.
    - Parameters that are moved later (``model.to``, ``p.data = …``) are gathered again.
    - With blockwise 8-bit states (bitsandbytes) each tensor begins at a new block, so that scales
      do not depend on neighbours. Tensors too small for 8 bits stay on their own.

    Tensors above ``threshold``, frozen ones and those that share memory with others are updated
    as before; ``summary()`` says how many and why.

    Args:
        optimizer: an element-wise optimizer. It is part of this one from then on.
        threshold: the most elements of a tensor that is gathered.

    Raises:
        OptimizeError: ``optimizer`` is not known to work element by element.
    """

    def __init__(self, optimizer: Optimizer, threshold: int = THRESHOLD) -> None:
        reason = why_not(optimizer)
        if reason is not None:
            raise OptimizeError(f"{type(optimizer).__name__} is left as it is: {reason}")
        self._set_up(optimizer, threshold)

    def _set_up(self, base: Optimizer, threshold: int, ours: Collection[nn.Parameter] = ()) -> None:
        self.base, self.threshold = base, threshold
        for name in list(vars(base)):
            if name.startswith("_optimizer_"):  # dictionaries of hooks, which both then see
                setattr(self, name, getattr(base, name))
        self._patch_step_function()  # of Optimizer: runs the hooks
        self._buckets: list[Bucket] = []
        self._slices: list[BucketSlice] = []
        self._build(ours)

    # --- what an optimizer shows -----------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of the wrapped optimizer, with the model's own parameters."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._scatter()
        self.base.param_groups = groups
        self._build()

    @property
    def state(self) -> defaultdict[Any, Any]:  # type: ignore[override]
        """The state of each parameter, as views. What is written here counts in the next step."""
        self._scatter()
        return self.base.state

    @state.setter
    def state(self, state: defaultdict[Any, Any]) -> None:
        self._scatter()
        self.base.state = state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The defaults of the wrapped optimizer."""
        return self.base.defaults

    def __getattr__(self, name: str) -> Any:
        if name in ("base", "_inner"):
            raise AttributeError(name)
        return getattr(self._inner if name == "_step_supports_amp_scaling" else self.base, name)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's own: an entry for each parameter; tensors are views."""
        if self._split:
            return self.base.state_dict()
        self.base.state = self._states()
        try:
            return self.base.state_dict()
        finally:
            self.base.state = defaultdict(dict)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what this or the plain optimizer saved."""
        self._scatter()
        self.base.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its small tensors are gathered, too."""
        self._scatter()
        self.base.add_param_group(param_group)
        self._build()

    def summary(self) -> str:
        """Say how many tensors are updated as how many, and why others are not."""
        gathered = sum(len(bucket.params) for bucket in self._buckets)
        text = f"{gathered:,} tensors updated as {len(self._slices)}"
        others = ", ".join(f"{n:,} {why}" for why, n in Counter(self._loose.values()).items())
        return text + (f"; on their own: {others}" if others else "")

    def release(self) -> Optimizer:
        """Give every parameter its own memory and every state its own tensors again.

        Returns the wrapped optimizer, which continues where this one stopped. Needed before another
        ``FlatOptimizer`` is made of the same parameters, which share their memory otherwise.
        """
        self._scatter()
        for bucket in self._buckets:
            for p in bucket.params:
                p.data = p.data.clone()
                state = self.base.state.get(p, {})
                state.update({k: v.clone() for k, v in state.items() if torch.is_tensor(v)})
        return self.base

    def __getstate__(self) -> dict[str, Any]:
        self._scatter()
        ours = [p for bucket in self._buckets for p in bucket.here()]
        return {"base": self.base, "threshold": self.threshold, "ours": ours}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._set_up(**state)

    # --- the step --------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Step every parameter that has a gradient; returns what ``closure`` returned.

        ``closure`` computes the loss and its gradients again, as in ``torch.optim``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        here = [bucket.here() for bucket in self._buckets]
        if any(len(h) < len(b.params) for h, b in zip(here, self._buckets, strict=True)):
            self._scatter()
            self._build()
        if self._split:
            self._gather()
        self._collect()
        for visible, inner in zip(self.base.param_groups, self._inner.param_groups, strict=True):
            inner.update({k: v for k, v in visible.items() if k != "params"})
        scaling = {name: vars(self)[name] for name in _SCALING if name in vars(self)}
        vars(self._inner).update(scaling)
        try:
            self._inner.step()
            # the writes went past the parameters; autograd must see that saved ones have changed
            updated = [
                p
                for piece in self._slices
                if piece.tensor.grad is not None
                for p, _ in piece.places()
            ]
            torch.autograd.graph.increment_version(updated)
        finally:
            for name in scaling:
                delattr(self._inner, name)
            for piece in self._slices:
                piece.tensor.grad = None
            for bucket in self._buckets:
                bucket.drop()
        return loss

    def _collect(self) -> None:
        """Give each slice its gradient; cut a slice where some parameters have none."""
        there = {id(bucket): bucket.collect() for bucket in self._buckets}
        for piece in self._slices:
            has = there[id(piece.bucket)][piece.first : piece.last]
            if any(has) and not all(has):
                self._slices = [part for r in self._slices for part in self._parts(r, there)]
                self._list_slices()
                break
        for piece in self._slices:
            if there[id(piece.bucket)][piece.first]:
                piece.tensor.grad = piece.bucket.gradient(piece.start, piece.stop)

    def _parts(self, piece: BucketSlice, there: dict[int, list[bool]]) -> list[BucketSlice]:
        parts = piece.split(there[id(piece.bucket)])
        if len(parts) == 1:
            return [piece]
        state, size = self._inner.state.pop(piece.tensor, {}), piece.stop - piece.start
        for part in parts:
            if state:
                start, stop = part.start - piece.start, part.stop - piece.start
                self._inner.state[part.tensor] = cut(state, size, start, stop)
        return parts

    # --- from the parameters to the buffers, and back --------------------------------------------

    def _build(self, ours: Collection[nn.Parameter] = ()) -> None:
        """Gather the parameters, and the state, which the wrapped optimizer holds."""
        groups = self.base.param_groups
        ours = [*ours, *(p for bucket in self._buckets for p in bucket.here())]
        self._loose = loose_reasons(self.base, self.threshold, ours)
        self._buckets = []
        self._groups: list[int] = []  # of each bucket
        for number, group in enumerate(groups):
            alike: dict[Any, list[nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                if p not in self._loose:
                    alike[p.dtype, p.device].append(p)
            for (dtype, _), params in alike.items():
                if len(params) == 1:
                    self._loose[params[0]] = "the only one of its kind"
                    continue
                self._buckets.append(Bucket(params, alignment(self.base, dtype)))
                self._groups.append(number)
        self._inner = object.__new__(type(self.base))
        vars(self._inner).update({k: v for k, v in vars(self.base).items() if k != "step"})
        for name, value in vars(self).items():  # the hooks run once, with this optimizer
            if name.startswith("_optimizer_") and isinstance(value, OrderedDict):
                setattr(self._inner, name, OrderedDict())
        self._inner.state = defaultdict(dict)
        self._inner.param_groups = [dict(group) for group in groups]
        self._gather()

    def _gather(self) -> None:
        """Make slices of neighbours with equal step counts; move their state to the flat side."""
        states, self.base.state = self.base.state, defaultdict(dict)
        self._inner.state = defaultdict(dict)
        gathered = {p for bucket in self._buckets for p in bucket.params}
        self._inner.state.update({k: v for k, v in states.items() if k not in gathered})
        self._slices = []
        for bucket in self._buckets:
            kinds = [signature(states.get(p, {}), p.shape) for p in bucket.params]
            first = 0
            for last in range(1, len(kinds) + 1):
                if last < len(kinds) and kinds[last] == kinds[first]:
                    continue
                piece = BucketSlice(bucket, first, last)
                piece_states: list[Any] = [states.get(p, {}) for p in bucket.params[first:last]]
                if piece_states[0]:
                    self._inner.state[piece.tensor] = join(piece, piece_states)
                self._slices.append(piece)
                first = last
        self._list_slices()
        self._split = False

    def _list_slices(self) -> None:
        """Tell the inner optimizer what to update: the slices, and the tensors on their own."""
        for number, group in enumerate(self.base.param_groups):
            here = {id(b) for b, g in zip(self._buckets, self._groups, strict=True) if g == number}
            slices = [piece.tensor for piece in self._slices if id(piece.bucket) in here]
            loose = [p for p in group["params"] if p in self._loose]
            self._inner.param_groups[number]["params"] = loose + slices

    def _states(self) -> defaultdict[Any, Any]:
        """The state of each parameter: views of the flat state, and separate counts."""
        states = defaultdict[Any, Any](dict, self._inner.state)
        for piece in self._slices:
            state, size = states.pop(piece.tensor, None), piece.stop - piece.start
            if state:
                for p, start in piece.places():
                    states[p] = cut(state, size, start, start + p.numel(), p.shape)
        return states

    def _scatter(self) -> None:
        """Move the state to the parameters; ``_gather`` takes it back at the next step."""
        if not self._split:
            self.base.state = self._states()
            self._inner.state = defaultdict(dict)
            self._split = True
