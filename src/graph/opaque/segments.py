"""Samples that share a row, and functions and modules that are run over each of them apart.

A row of a batch may hold several samples, its *segments*. ``segments`` (B, L), int32, says of each
position at which position its segment begins: position j belongs to that of i >= j if and only if
``j >= segments[i]``.

A function of a sequence that is causal and starts from nothing gives the same for a segment in a
row that is as long as it, or that has zeros after it. So segments become rows, a few lengths at a
time, and what the function returns goes back to where the segments were.

Of a function all arguments are known (``run_apart``). Those of a module are told by their shapes
(``run_rows``): what is a sequence becomes rows, and in place of what may tell of several samples (a
mask of scores, lengths, a state) is ``Unread``, which nobody may look at.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import OptimizeError

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
            # values are read, which those of what a transform of torch.func makes are not
            with torch._C._DisableFuncTorch():
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


def run_rows(function: Callable[..., Any], segments: Tensor, args: Any, kwargs: Any) -> Any:
    """What a module's forward gives for each segment, where the segments are.

    It is given its sequences (B, L, ...) as rows, which end with copies of their first position. Of
    its results those that are sequences come back; all others are ``Unread``.

    Raises:
        OptimizeError: it is given no sequence, or looks at what tells of several samples.
    """
    layout, results = SegmentRows.of(segments), []
    for places, _ in layout.groups:
        rows = _RowsOf(segments.shape, places)
        row_args, row_kwargs = _mapped(rows, args), _mapped(rows, kwargs)
        if not rows.any:
            raise OptimizeError("samples that share a row: a layer is given no sequence of them")
        results.append(function(*row_args, **row_kwargs))
    return _mapped(functools.partial(_joined, layout, segments.shape), *results)


class _RowsOf:
    """The rows (R, M, ...) of what is a sequence (B, L, ...) or (1, L, ...)."""

    def __init__(self, shape: torch.Size, places: Tensor) -> None:
        self._shape, self._places = shape, places
        self.any = False

    def __call__(self, value: Any) -> Any:
        if _is_plain(value) or (isinstance(value, Tensor) and value.dim() == 0):
            return value
        batch, length = self._shape
        if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[1] != length:
            return Unread()
        if value.shape[0] not in (1, batch):
            return Unread()
        self.any |= value.is_floating_point()
        flat = value.expand(batch, *value.shape[1:]).flatten(0, 1)
        rows: Tensor = flat.index_select(0, self._places.flatten())  # type: ignore[no-untyped-call]
        return rows.unflatten(0, tuple(self._places.shape))  # type: ignore[no-untyped-call]


def _is_plain(value: Any) -> bool:
    return type(value) is Unread or isinstance(value, _PLAIN)


_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, nn.Module)


def _joined(layout: SegmentRows, shape: torch.Size, *rows: Any) -> Any:
    """The sequence (B, L, ...) that rows of each length are of."""
    if _is_plain(rows[0]):
        return rows[0]
    for (places, _), value in zip(layout.groups, rows, strict=True):
        if not isinstance(value, Tensor) or value.shape[:2] != places.shape:
            return Unread()
    flat = torch.cat([value.flatten(0, 1) for value in rows])
    return flat.index_select(0, layout.back).unflatten(0, tuple(shape))  # type: ignore[no-untyped-call]


def _mapped(function: Callable[..., Any], first: Any, *others: Any) -> Any:
    """``function`` of each leaf of some values of the same structure."""
    if type(first) is dict:
        return {n: _mapped(function, v, *(o[n] for o in others)) for n, v in first.items()}
    if type(first) in (tuple, list):
        return type(first)(_mapped(function, *each) for each in zip(first, *others, strict=True))
    return function(first, *others)


class Unread:
    """In place of a value that may be handed on, but not be looked at: not its class, nor truth.

    Attributes:
        seen: whether somebody has tried to, and got an error.
    """

    def __init__(self) -> None:
        object.__setattr__(self, "seen", False)

    def __getattribute__(self, name: str) -> NoReturn:
        object.__setattr__(self, "seen", True)
        raise OptimizeError(
            "samples that share a row: a layer that runs over each of them apart looks at what "
            "may tell of several (a mask of scores, lengths, a state): do not pack"
        )

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise cls().function  # looked at: reading any attribute raises

    def __bool__(self) -> NoReturn:
        raise self.truth  # looked at: reading any attribute raises

    def __eq__(self, other: object) -> NoReturn:
        raise self.equality  # looked at: reading any attribute raises

    def __hash__(self) -> NoReturn:
        raise self.hash  # looked at: reading any attribute raises

    def __repr__(self) -> NoReturn:
        raise self.text  # looked at: reading any attribute raises

    def __getitem__(self, index: object) -> NoReturn:
        raise self.items  # looked at: reading any attribute raises


def _positions(t: Tensor, time: int) -> Tensor:
    """The positions of all rows, (B L, ...)."""
    return t.movedim(time, 1).flatten(0, 1)


def _rows(t: Tensor, places: Tensor, inside: Tensor | None, time: int) -> Tensor:
    rows: Tensor = t.index_select(0, places.flatten()).unflatten(0, tuple(places.shape))  # type: ignore[no-untyped-call]
    if inside is not None:
        rows = rows.masked_fill(~inside.view(*inside.shape, *[1] * (rows.dim() - 2)), 0)
    return rows.movedim(1, time)
