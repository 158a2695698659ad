"""Samples that share a row, and functions of one sequence that are run over each of them apart.

A row of a batch may hold several samples, its *segments*. ``segments`` (B, L), int32, says of each
position at which position its segment begins: position j belongs to that of i >= j if and only if
``j >= segments[i]``.

A function of a sequence that is causal and starts from nothing gives the same for a segment in a
row that is as long as it, or that has zeros after it. So segments become rows, a few lengths at a
time, and what the function returns goes back to where the segments were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_SHORTEST = 64
"""Segments of up to so many positions are rows of one length: chunks of scans are as long."""

_ROWS = "_fusewright_rows"


@dataclass(frozen=True)
class SegmentRows:
    """The rows of some segments, by length.

    Attributes:
        groups: for each length, the places (R, M) in the batch, flat, of the rows' positions, and
            which of these are inside of the segments, or None where all are.
        back: for each position of the batch, its place among those of all rows.
    """

    groups: tuple[tuple[Tensor, Tensor | None], ...]
    back: Tensor

    @classmethod
    def of(cls, segments: Tensor) -> SegmentRows:
        """The layout of ``segments``, which is made once for the tensor: it reads its values."""
        layout: SegmentRows | None = segments.__dict__.get(_ROWS)
        if layout is None:
            layout = _layout(segments)
            segments.__dict__[_ROWS] = layout
        return layout


def _layout(segments: Tensor) -> SegmentRows:
    first = segments.cpu().numpy()
    batch, length = first.shape
    begins = np.flatnonzero(first == np.arange(length))
    lengths = np.diff(begins, append=batch * length)
    groups, back, filled = [], np.empty(batch * length, np.int64), 0
    # no row is more than twice as long as its segment, but for short ones
    exponents = np.ceil(np.log2(np.maximum(lengths, _SHORTEST))).astype(np.int64)
    for exponent in np.unique(exponents):
        chosen = np.flatnonzero(exponents == exponent)
        width = int(lengths[chosen].max())
        steps = np.arange(width)
        inside = steps < lengths[chosen, None]
        places = begins[chosen, None] + steps
        rows = filled + np.arange(inside.size).reshape(inside.shape)
        back[places[inside]] = rows[inside]
        filled += inside.size
        mask = None if inside.all() else torch.from_numpy(inside).to(segments.device)
        flat = torch.from_numpy(np.where(inside, places, begins[chosen, None])).flatten()
        groups.append((flat.to(segments.device).view(inside.shape), mask))
    return SegmentRows(tuple(groups), torch.from_numpy(back).to(segments.device))


def run_apart(
    function: Callable[..., Any],
    segments: Tensor,
    arguments: Mapping[str, Any],
    sequences: Mapping[str, int],
    time: int,
) -> Any:
    """What ``function`` gives for each segment, where the segments are.

    ``sequences`` names those of the arguments that are sequences, with their dimension of time;
    ``time`` is that of the result, or of the first of several, of which the others must be None.
    """
    layout, outputs, rest = SegmentRows.of(segments), [], None
    flat = {n: _positions(arguments[n], dim) for n, dim in sequences.items()}
    for places, inside in layout.groups:
        rows = {n: _rows(t, places, inside, sequences[n]) for n, t in flat.items()}
        results = function(**{**arguments, **rows})
        first, *others = results if isinstance(results, tuple) else (results,)
        if any(t is not None for t in others):
            raise NotImplementedError("a state after several segments is asked for")
        rest = tuple(others) if isinstance(results, tuple) else None
        outputs.append(_positions(first, time))
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    out = joined.index_select(0, layout.back).unflatten(0, tuple(segments.shape))  # type: ignore[no-untyped-call]
    out = out.movedim(1, time).contiguous()
    return out if rest is None else (out, *rest)


def _positions(t: Tensor, time: int) -> Tensor:
    """The positions of all rows, (B L, ...)."""
    return t.movedim(time, 1).flatten(0, 1)


def _rows(t: Tensor, places: Tensor, inside: Tensor | None, time: int) -> Tensor:
    rows: Tensor = t.index_select(0, places.flatten()).unflatten(0, tuple(places.shape))  # type: ignore[no-untyped-call]
    if inside is not None:
        rows = rows.masked_fill(~inside.view(*inside.shape, *[1] * (rows.dim() - 2)), 0)
    return rows.movedim(1, time)
