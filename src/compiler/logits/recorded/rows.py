"""Lazy logits as (rows, head, pending operations): what is recorded instead of computed.

Which rows, in which shape, is an ``index`` into the rows of the call: to choose, reshape or iterate
over rows is to do so with the index. Scales and casts are noted. Log-probabilities, probabilities
and their products are ``kinds`` of the same rows: what a sum or a choice among them needs is known
without them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..head_call import HeadCall, Picks
from ..lazy_logits import LazyLogits

Handlers = dict[str, Callable[..., Any]]


@dataclass(frozen=True, eq=False)
class HeadRows:
    """What lazy logits, or what was made of them, consist of."""

    call: HeadCall
    inputs: tuple[Any, ...]
    handlers: Handlers  # answers functions, by their names
    # which rows of the call, in the leading shape; None for all of them
    index: Tensor | None = None
    # ``"logits"``, ``"log_probs"``, ``"probs"``, or a product: ``"p_log_p"``, ``"p_z"``, ``"p_p"``
    kind: str = "logits"
    factor: float = 1.0  # of the logits, after the soft cap and before a softmax
    weight: float = 1.0  # of everything, after it

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


# ------------------------------------------------------------------------------------ single logits
#
# A product of one row and one column rounds otherwise than the same number in a product of
# matrices. A caller that asks which logits equal the highest one, or keeps those that are not below
# the k-th, compares the two: so the numbers that were given out are written into the real tensor
# that is made later.


def _pick_key(rows: HeadRows, dtype: torch.dtype) -> tuple[Any, ...]:
    return rows.kind, rows.factor, rows.weight, dtype


def logits_exist(rows: HeadRows) -> bool:
    """Whether the logits of the call were made: then all that is given out must be of them."""
    return rows.call.reads > 0


def remember_pick(
    rows: HeadRows, dtype: torch.dtype, columns: Tensor, values: Tensor | None, is_top: bool
) -> None:
    """Note what was given out of ``rows``; ``columns`` and ``values`` (..., K)."""
    index = None if rows.index is None else rows.index.reshape(-1)
    count = columns.shape[-1]
    # copies, as who has got them may write to them
    values_copy = None if values is None else values.detach().reshape(-1, count).clone()
    columns_copy = columns.detach().reshape(-1, count).clone()
    rows.call.picked.append(Picks(_pick_key(rows, dtype), index, columns_copy, values_copy, is_top))


def write_into(values: Tensor, rows: HeadRows) -> None:
    """Write what was given out into ``values``: (..., vocabulary), that nobody has seen yet."""
    key = _pick_key(rows, values.dtype)
    ours = [p for p in rows.call.picked if p.values is not None and p.key == key]
    # what is made of these keeps their order
    is_first = rows.index is None and key[:3] == ("logits", 1.0, 1.0)
    classes = [p for p in rows.call.picked if p.values is None] if is_first else []
    if not ours and not classes:
        return
    flat = values.reshape(-1, values.shape[-1])
    join = _Join(flat, rows.index)
    if classes:
        highest = flat.amax(-1, keepdim=True)
        for p in classes:
            place, of = join.places(p)
            flat[place.unsqueeze(1), p.columns[of]] = highest[place]
    _bound(flat, join, [p for p in ours if p.is_top])
    for p in ours:
        place, of = join.places(p)
        assert p.values is not None
        flat[place.unsqueeze(1), p.columns[of]] = p.values[of]
    if flat.data_ptr() != values.data_ptr():
        values.copy_(flat.view(values.shape))


def _bound(flat: Tensor, join: _Join, tops: Sequence[Picks]) -> None:
    """Let nothing that was not among the highest be above the lowest of these."""
    if not tops:
        return
    dtype = torch.promote_types(flat.dtype, torch.float32)
    bound = torch.full(flat.shape[:1], torch.inf, dtype=dtype, device=flat.device)
    for p in tops:
        assert p.values is not None
        place, of = join.places(p)
        lowest = p.values.amin(-1)[of].to(dtype)
        lowest = lowest.masked_fill(lowest.isnan(), torch.inf)
        bound.scatter_reduce_(0, place, lowest, "amin")
    torch.minimum(flat, bound.to(flat.dtype).unsqueeze(1), out=flat)


class _Join:
    """Where the rows of picks are in a tensor, which may have a row twice."""

    def __init__(self, flat: Tensor, index: Tensor | None) -> None:
        rows = torch.arange(len(flat), device=flat.device) if index is None else index.reshape(-1)
        self._sorted, self._order = rows.sort()
        self._every = rows

    def places(self, picks: Picks) -> tuple[Tensor, Tensor]:
        """(P,) and (P,): rows of the tensor, and which of the picks' each of them is."""
        indices = picks.index
        if indices is None:
            indices = torch.arange(len(picks.columns), device=self._every.device)
        first = torch.searchsorted(self._sorted, indices)
        count = torch.searchsorted(self._sorted, indices, right=True) - first
        of = torch.arange(len(indices), device=indices.device).repeat_interleave(count)
        within = torch.arange(len(of), device=indices.device) - (count.cumsum(0) - count)[of]
        return self._order[first[of] + within], of


# ---------------------------------------------------------------------------------- their arguments


class WrongArguments(Exception):
    """A call that no handler is for."""


def binding(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function raise ``WrongArguments`` for a call with other arguments than its own."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            signature.bind(*args, **kwargs)
        except TypeError:
            raise WrongArguments from None
        return function(*args, **kwargs)

    return run
