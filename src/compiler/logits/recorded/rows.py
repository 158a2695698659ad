"""Lazy logits as (rows, head, pending operations): what is recorded instead of computed.

Which rows, in which shape, is an ``index`` into the rows of the call: to choose, reshape or iterate
over rows is to do so with the index. Scales and casts are noted. Log-probabilities, probabilities
and their products are ``kinds`` of the same rows: what a sum or a choice among them needs is known
without them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..lazy_logits import LazyLogits
from .arguments import WrongArguments, binding
from .picks import write_into

if TYPE_CHECKING:
    from ..head_call import HeadCall

Handlers = dict[str, Callable[..., Any]]


@dataclass(frozen=True, eq=False)
class HeadRows:
    """What lazy logits, or what was made of them, consist of.

    Attributes:
        call: the call of the head that they are from.
        inputs: of its logits.
        handlers: answers functions, by their names.
        index: which rows of the call, in the leading shape; None for all of them.
        kind: ``"logits"``, ``"log_probs"``, ``"probs"``, or a product: ``"p_log_p"``, ``"p_z"``,
            ``"p_p"``.
        factor: of the logits, after the soft cap and before a softmax.
        weight: of everything, after it.
    """

    call: HeadCall
    inputs: tuple[Any, ...]
    handlers: Handlers
    index: Tensor | None = None
    kind: str = "logits"
    factor: float = 1.0
    weight: float = 1.0

    def answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What ``func`` returns, where that needs no values; else NotImplemented."""
        handler = self.handlers.get(getattr(func, "__name__", ""))
        if handler is None or self.call.plan.head is None:
            return NotImplemented
        kwargs = dict(kwargs)
        if kwargs.pop("out", None) is not None:  # values are written into it
            return NotImplemented
        try:
            return handler(*args, **kwargs)
        except WrongArguments:
            return NotImplemented

    def note_read(self, func: Any) -> None:
        """Remember that ``func`` needs the values."""
        self.call.plan.reads.note_tensor(func, self.kind)

    def finish(self, values: Tensor) -> None:
        """Let ``values``, which are these and were just made, agree with what was given out."""
        if self.call.picked:
            write_into(values, self)

    def leading_index(self, shape: torch.Size) -> Tensor:
        """The index, also where all rows are meant."""
        if self.index is not None:
            return self.index
        return torch.arange(prod(shape[:-1]), device=self.call.device).view(shape[:-1])

    def is_same(self, other: HeadRows) -> bool:
        """Whether two are about the same logits."""
        return self.call is other.call and self.index is other.index and self.factor == other.factor


def handler(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function of lazy logits pass on what it is not called for."""
    bound = binding(function)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not args and "input" in kwargs:
            args = (kwargs.pop("input"),)
        if not args or not isinstance(args[0], LazyLogits):
            raise WrongArguments
        z = args[0]
        if not isinstance(z.recorded, HeadRows) or not z.is_pending:
            raise WrongArguments
        return bound(*args, **kwargs)

    return run


def rows_of(z: LazyLogits) -> HeadRows:
    """What is recorded of ``z``."""
    assert isinstance(z.recorded, HeadRows)
    return z.recorded


def require_kind(z: LazyLogits, *kinds: str) -> str:
    """The kind of ``z``, which is one of ``kinds``; raises WrongArguments where it is not."""
    kind = rows_of(z).kind
    if kind not in kinds:
        raise WrongArguments
    return kind


def is_last(z: Tensor, dim: Any) -> bool:
    """Whether ``dim`` is the dimension of the vocabulary."""
    return isinstance(dim, int) and dim in (-1, z.dim() - 1)


def result_dtype(function: Callable[[Tensor], Tensor], z: Tensor) -> torch.dtype:
    """The dtype of what ``function`` makes of logits, under the autocast at hand."""
    return function(torch.zeros((1, 1), dtype=z.dtype, device=z.device)).dtype
