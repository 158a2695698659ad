"""Two distributions of each row, as recorded: lazy log-softmaxes, or real log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..changes import Fingerprint, fingerprint, is_unchanged
from ..deferred import Change
from ..lazy_gradient import apply_change
from ..lazy_logits import LazyLogits
from .arguments import WrongArguments
from .rows import HeadRows


@dataclass(frozen=True, eq=False)
class Given:
    """Log-probabilities, (..., vocabulary), that are a real tensor without a gradient."""

    tensor: Tensor
    before: Fingerprint

    @staticmethod
    def of(tensor: Tensor) -> Given:
        """``tensor``, as it is now; as it was, if it was recorded before in this version."""
        version, before = _recorded.get(tensor, (None, None))
        if before is None or version != tensor._version:
            before = fingerprint([tensor])
            _recorded[tensor] = tensor._version, before
        return Given(tensor, before)

    def values(self) -> Tensor:
        """The tensor, unless it was written to since."""
        if not is_unchanged([self.tensor], self.before):
            raise RuntimeError(
                "a divergence cannot be computed: the log-probabilities that logits are compared "
                "with were written to since. Write to a clone() of them, or use "
                "fusewright.optimize(model, logits='always')."
            )
        return self.tensor


_recorded: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Real log-probabilities -> their version and fingerprint, as several steps record the same."""

Side = HeadRows | Given
"""One of the two distributions of each row."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Shifted(HeadRows):
    """Log-probabilities plus the number ``shift``."""

    shift: float


@dataclass(frozen=True, eq=False, kw_only=True)
class Mixed(HeadRows):
    """The log of a mixture of two distributions, or the two stacked.

    ``parts`` are both, and what was added to their log-probabilities; the first has the gradient.
    """

    parts: tuple[tuple[HeadRows, float], tuple[Side, float]]

    @property
    def shares(self) -> tuple[float, float]:
        """Of both in the mixture; what was added to a real tensor is that of the rest."""
        (_, a), (second, b) = self.parts
        return math.exp(a), -math.expm1(a) if isinstance(second, Given) else math.exp(b)

    def is_alike(self, other: Mixed) -> bool:
        """Whether another one mixes the same distributions, in equal shares."""
        (first, a), (second, b) = self.parts
        (other_first, other_a), (other_second, other_b) = other.parts
        is_equal = first.is_same(other_first) and is_same_side(second, other_second)
        return is_equal and (a, b) == (other_a, other_b)


@dataclass(frozen=True, eq=False, kw_only=True)
class Divergence(HeadRows):
    """Sums of ``exp(target) * (target - input)``, class by class.

    ``index`` counts the rows of both distributions; the ``first`` has the gradient. ``terms`` are
    weights in the sum: of ``"forward"``, KL(second || first); ``"reverse"``, KL(first || second);
    ``"first"`` and ``"second"``, KL(... || mixture).
    """

    first: HeadRows
    second: Side
    terms: Mapping[str, float]
    mixture: Mixed | None


def number(x: Any) -> float | None:
    """A number, also one in a tensor without dimensions; None for anything else."""
    if isinstance(x, (int, float)) and not isinstance(x, bool):
        return float(x)
    if type(x) is not Tensor or x.dim() or not x.is_floating_point():
        return None
    return None if x.requires_grad and torch.is_grad_enabled() else x.item()


def has_gradient(x: Tensor) -> bool:
    """Whether a gradient flows to ``x`` from what is made of it now."""
    return torch.is_grad_enabled() and x.requires_grad


def side_of(x: Any, like: Tensor, kind: str = "log_probs") -> tuple[Side, float]:
    """What is known of log-probabilities of the shape of ``like``, and what was added to them."""
    if not isinstance(x, Tensor) or x.shape != like.shape or x.device != like.device:
        raise WrongArguments
    if not isinstance(x, LazyLogits):
        if type(x) is not Tensor or not x.is_floating_point() or kind != "log_probs":
            raise WrongArguments
        if x.is_inference() or has_gradient(x):
            raise WrongArguments
        return Given.of(x), 0.0
    rows = x.recorded
    if not x.is_pending or not isinstance(rows, HeadRows) or rows.weight != 1.0:
        raise WrongArguments
    if rows.kind != kind and not (isinstance(rows, Shifted) and kind == "log_probs"):
        raise WrongArguments
    return rows, rows.shift if isinstance(rows, Shifted) else 0.0


def is_same_side(a: Side, b: Side) -> bool:
    """Whether two are the same log-probabilities, whatever was added to them."""
    if isinstance(a, Given) or isinstance(b, Given):
        return isinstance(a, Given) and isinstance(b, Given) and a.tensor is b.tensor
    return a.is_same(b)


def leading(a: Any, b: Any) -> LazyLogits:
    """The one of two that gets the gradient; the other gets none."""
    lazy = [z for z in (a, b) if isinstance(z, LazyLogits)]
    trained = [z for z in lazy if has_gradient(z)]
    if len(trained) > 1:
        raise WrongArguments
    return trained[0] if trained else lazy[0]


def record(
    function: Callable[..., Tensor], of: Sequence[Any], shape: tuple[int, ...], recorded: HeadRows,
    is_linear: bool = False,
) -> LazyLogits:  # fmt: skip
    """What ``function`` makes of ``of``, some of them lazy."""
    real = [None if isinstance(x, LazyLogits) else Given.of(x) for x in of]
    tiny = [torch.zeros((1, 1), dtype=x.dtype, device=x.device) for x in of]
    dtype = function(*tiny).dtype  # under the autocast at hand

    def run(*values: Tensor) -> Tensor:
        lazy = iter(values)
        result = function(*(next(lazy) if g is None else g.values() for g in real))
        return result.to(dtype)

    change = Change(run, shape, dtype, recorded, is_linear=is_linear)
    return apply_change(change, *(x for x in of if isinstance(x, LazyLogits)))
