"""One call of a head: how its logits are computed, and what they are computed from."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import get_gradient_edge

from ...graph import facts
from ...passes.linear_cross_entropy import HEAD, is_bias
from ...rewrite.matcher import Trace
from ...sharding import in_zero3, is_released
from .fingerprints import Fingerprint, WeightsChanged, is_unchanged, remembered, unchanged
from .reads import Reads
from .sharded import gathered

# -------------------------------------------------------------------------- what logits are made of


class Operands(NamedTuple):
    """The operands of ``linear_logprob``, with rows already chosen.

    ``x``: (N, H), ``weight``: (V, H), ``bias``: (V,). ``scale``, a number or one that is learnt,
    multiplies the logits before the soft cap; ``temperature`` divides them after it.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: Any
    softcap: float | None
    temperature: float


@dataclass(frozen=True)
class HeadParts:
    """Which inputs of the logits are what, by place, and the constants between them.

    ``factor`` is the place of a scale that is learnt; ``scale`` and ``softcap`` are constants.
    """

    x: int
    weight: int
    bias: int | None
    factor: int | None
    scale: float
    softcap: float | None

    def of(self, inputs: Sequence[Any], index: Tensor | None, factor: float) -> Operands:
        """The operands for rows ``index`` (None: all); a ``factor`` above 0 comes afterwards."""
        x = inputs[self.x]
        x = x.reshape(-1, x.shape[-1])
        if index is not None:
            x = x.index_select(0, index.reshape(-1))
        bias = None if self.bias is None else inputs[self.bias].reshape(-1)
        scale = self.scale if self.factor is None else inputs[self.factor].reshape(())
        return Operands(x, inputs[self.weight], bias, scale, self.softcap, 1.0 / factor)

    def with_rows(self, inputs: Sequence[Any], index: Tensor) -> tuple[Any, ...]:
        """The inputs with the rows ``index`` alone."""
        rows = inputs[self.x]
        rows = rows.reshape(-1, rows.shape[-1]).index_select(0, index)
        return tuple(rows if i == self.x else t for i, t in enumerate(inputs))

    def is_plain(self, inputs: Sequence[Any]) -> bool:
        """Whether rows and head are ordinary tensors that are whole on this process."""
        places = (self.x, self.weight, self.bias, self.factor)
        return all(type(inputs[i]) in (Tensor, nn.Parameter) for i in places if i is not None)


def head_parts(logits: fx.Node, inputs: Sequence[fx.Node]) -> HeadParts | None:
    """The parts of the head that makes ``logits``; None where they are another formula."""
    places = {node: i for i, node in enumerate(inputs)}
    for m in HEAD.find(logits, Trace()):
        if m.get("head_lora_b") is not None:
            continue
        factor = m.get("factor")
        operands = [m.x, m.w, *(n for n in (m.bias, factor) if n is not None)]
        if not all(isinstance(n, fx.Node) and n in places for n in operands):
            continue
        if factor is not None and (
            m.bias is not None or getattr(facts.tensor(factor), "numel", lambda: 0)() != 1
        ):
            continue
        cap, scale = m.get("cap"), float(m.get("scale", 1.0))
        if factor is not None and scale != 1.0:
            continue
        if cap is not None and (not isinstance(cap, (int, float)) or cap <= 0):
            continue
        if facts.ndim(m.w) != 2 or facts.dtype(logits) not in _DTYPES:
            continue
        if m.bias is not None and not is_bias(m.bias, m.w):
            continue
        return HeadParts(
            places[m.x], places[m.w],
            None if m.bias is None else places[m.bias],
            None if factor is None else places[factor],
            1.0 / scale if m.get("divided") is not None else scale,
            None if cap is None else float(cap),
        )  # fmt: skip
    return None


_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def as_leaf(x: Any) -> Any:
    """A tensor without its history, whose gradient is wanted where the one of ``x`` is."""
    return x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


Body = Callable[..., Tensor]


@dataclass(frozen=True)
class Plan:
    """What of a loss and its logits is known from the graph."""

    lazy: bool
    keeps: bool  # whether the logits' history keeps nothing of their size, so that it may stay
    dtype: torch.dtype
    inputs: int  # how many inputs the logits have
    others: int  # how many inputs the loss has besides its logits
    # gives a model that the graph is of, or None once that is gone
    model: Callable[[], nn.Module | None]
    head: HeadParts | None  # what of the inputs is what; None where the logits are another formula
    reads: Reads


@dataclass(eq=False)
class HeadCall:
    """One call: its two formulas, and what they are computed in."""

    plan: Plan
    logits: Body  # computes the logits from their inputs
    loss: Body  # computes the loss from the logits and its other inputs, as the model does
    shape: tuple[int, ...]
    device: torch.device
    autocast: tuple[bool, torch.dtype]  # (whether it is on, its dtype), as in the forward pass
    before: Fingerprint
    # of the inputs, which tell them from what a checkpoint computes in their place
    storages: list[int | None]
    # gives the model that was called, or None once that is gone
    model: Callable[[], nn.Module | None]
    call: str  # names it on every process
    reads: int = 0  # how often the logits were computed; it tells the reads of one call apart
    # the inputs of the logits and the history that leads to them, if they were computed
    made: tuple[list[Any], Any] | None = None
    # aliases without a history, which may be kept across an optimizer's step
    detached: list[weakref.ref[Any]] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """The number of rows."""
        return prod(self.shape[:-1])

    @contextmanager
    def mode(self, grad: bool) -> Iterator[None]:
        """The mode of the forward pass, with gradients or without."""
        enabled, dtype = self.autocast
        autocast = torch.autocast(self.device.type, dtype, enabled)
        if not grad:  # nothing is kept
            with torch.no_grad(), autocast:
                yield
            return
        with (
            torch.enable_grad(),
            autocast,
            # what is kept here is nothing that a checkpoint around a reader should count; autograd
            # does not look at the versions of what hooks keep
            torch.autograd.graph.saved_tensors_hooks(remembered, unchanged),
        ):
            yield

    def compute(self, inputs: tuple[Any, ...], keep: bool, index: Tensor | None = None) -> Tensor:
        """The values of the logits, or of the rows ``index``, without a history.

        With ``keep``, the history that leads to the inputs is kept for backward where it is small.
        """
        self.reads += 1
        with gathered(self.model(), inputs, f"{self.call}-{self.reads}"):
            if not is_unchanged(inputs, self.before):
                raise WeightsChanged
            if index is not None:
                assert self.plan.head is not None
                inputs = self.plan.head.with_rows(inputs, index)
            if not (keep and self.plan.keeps and _may_keep_history()):
                with self.mode(False):
                    return self.logits(*inputs)
            leaves = [as_leaf(t) for t in inputs]
            with self.mode(True):
                logits = self.logits(*leaves)
            self.made = leaves, get_gradient_edge(logits)
            return logits.detach()

    def can_end_in_tiles(self, inputs: tuple[Any, ...]) -> bool:
        """Whether the head's operands are known, whole, and what they were in the forward pass."""
        return (
            self.plan.head is not None
            and self.plan.head.is_plain(inputs)
            and not any(isinstance(t, Tensor) and is_released(t) for t in inputs)
            and is_unchanged(inputs, self.before)
        )

    def gradient(
        self, inputs: tuple[Any, ...], others: tuple[Any, ...], grad: Tensor, differentiable: bool
    ) -> Tensor:
        """The gradient of the logits from the one of the loss."""
        with gathered(self.model(), inputs, f"{self.call}-loss"):
            pairs = zip(inputs, self.storages, strict=True)
            ours = [t if storage(t) == place else None for t, place in pairs]
            if not is_unchanged(ours, self.before):
                raise WeightsChanged
            with self.mode(differentiable):
                logits = self.logits(*inputs)
        if not logits.requires_grad:
            logits = logits.detach().requires_grad_()
        with self.mode(True):
            loss = self.loss(logits, *others)
        grads = torch.autograd.grad(loss, logits, grad.to(loss.dtype), create_graph=differentiable)
        return grads[0]


def aliases(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs of logits for a late read: ``p.data = ...`` leaves them what they are."""
    return tuple(
        # DeepSpeed knows its parameters by their attributes, and takes their memory away
        t.detach().requires_grad_(t.requires_grad)
        if isinstance(t, Tensor) and not in_zero3(t)
        else t
        for t in inputs
    )


def _may_keep_history() -> bool:
    """False where a transform forbids hooks on saved tensors."""
    refused = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()
    return refused is None


def storage(t: Any) -> int | None:
    """What identifies the memory of a plain tensor."""
    return t.untyped_storage()._cdata if type(t) in (Tensor, nn.Parameter) else None


_running = threading.local()


@contextmanager
def calling(model: nn.Module) -> Iterator[None]:
    """While it lasts, calls of heads are of this model, among those that have the same graph."""
    outer, _running.model = getattr(_running, "model", None), model
    try:
        yield
    finally:
        _running.model = outer


def called_model(plan: Plan) -> Callable[[], nn.Module | None]:
    """Gives the model that is called now."""
    model = getattr(_running, "model", None)
    return plan.model if model is None else weakref.ref(model)
