"""Single logits that were given out, and the logits that are made as a real tensor after them.

A product of one row and one column rounds otherwise than the same number in a product of matrices.
Who asks which logits equal the highest one, or keeps those that are not below the k-th, compares
the two: so the numbers that were given out are written into what is made later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .rows import HeadRows


@dataclass(frozen=True, eq=False)
class Picks:
    """Some columns of some rows of one call, as they were given out.

    Attributes:
        key: of the operations that they are of.
        index: (N,), which rows of the call; None for all of them.
        columns: (N, K).
        values: (N, K); None where only the classes were given out.
        is_top: whether no other column of the row is higher.
    """

    key: tuple[Any, ...]
    index: Tensor | None
    columns: Tensor
    values: Tensor | None
    is_top: bool


def _key(rows: HeadRows, dtype: torch.dtype) -> tuple[Any, ...]:
    return rows.kind, rows.factor, rows.weight, dtype


def is_known(rows: HeadRows) -> bool:
    """Whether the logits of the call were made: then all that is given out must be of them."""
    return rows.call.reads > 0


def remember(
    rows: HeadRows, dtype: torch.dtype, columns: Tensor, values: Tensor | None, is_top: bool
) -> None:
    """Note what was given out of ``rows``; ``columns`` and ``values`` (..., K)."""
    index = None if rows.index is None else rows.index.reshape(-1)
    count = columns.shape[-1]
    # copies, as who has got them may write to them
    kept = None if values is None else values.detach().reshape(-1, count).clone()
    own = columns.detach().reshape(-1, count).clone()
    rows.call.picked.append(Picks(_key(rows, dtype), index, own, kept, is_top))


def write_into(values: Tensor, rows: HeadRows) -> None:
    """Write what was given out into logits that were just made.

    Args:
        values: (..., vocabulary), that nobody has seen yet.
        rows: what is recorded of them.
    """
    key = _key(rows, values.dtype)
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
    """Where the rows of picks are among those of a tensor, which may have a row twice."""

    def __init__(self, flat: Tensor, index: Tensor | None) -> None:
        own = torch.arange(len(flat), device=flat.device) if index is None else index.reshape(-1)
        self._sorted, self._order = own.sort()
        self._every = own

    def places(self, picks: Picks) -> tuple[Tensor, Tensor]:
        """(P,) and (P,): rows of the tensor, and which of the picks' each of them is."""
        wanted = picks.index
        if wanted is None:
            wanted = torch.arange(len(picks.columns), device=self._every.device)
        first = torch.searchsorted(self._sorted, wanted)
        count = torch.searchsorted(self._sorted, wanted, right=True) - first
        of = torch.arange(len(wanted), device=wanted.device).repeat_interleave(count)
        within = torch.arange(len(of), device=wanted.device) - (count.cumsum(0) - count)[of]
        return self._order[first[of] + within], of
