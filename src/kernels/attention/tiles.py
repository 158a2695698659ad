"""The tiles of attention: which positions read which keys, and what is hidden inside a tile.

The query heads of a group are rows of one matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_CACHED = 1 << 20  # scores worked on at once, per thread: more leaves the cache, fewer cost calls


@dataclass(frozen=True)
class Tile:
    """Some positions of some (sample, group) pairs against the keys that they may see.

    ``rows`` are folded, ``positions * heads``. ``bias`` (pairs, positions, heads, keys) is added to
    the last columns of the scores, broadcast over what it lacks; None where all keys are seen.
    ``dead`` marks rows that see nothing, and so have no probabilities; None where there are none.
    """

    pairs: slice
    rows: slice
    keys: slice
    bias: Tensor | None
    dead: Tensor | None


def tiles(
    q: Tensor, k: Tensor, causal: bool, mask: Tensor | None, window: int | None
) -> Iterator[Tile]:
    """Cut a call into tiles."""
    (batch, groups, keys, _), time = k.shape, q.shape[2]
    heads = q.shape[1] // groups
    step, budget = max(16, min(128, 1024 // heads)), _CACHED * torch.get_num_threads()
    samples = [(0, batch * groups)]
    if mask is not None and mask.shape[0] * mask.shape[1] > 1:
        samples = [(i * groups, (i + 1) * groups) for i in range(batch)]
    for sample, (first, last) in enumerate(samples):
        for start in range(0, time, step):
            stop = min(time, start + step)
            if mask is not None:
                part = mask[min(sample, mask.shape[0] - 1), :, start:stop]
                low, high, bias, dead = _masked(part, groups)
            elif causal:
                low = 0 if window is None else max(0, start - window + 1)
                high, dead = stop, None
                bias = _causal(start, stop, start if window is None else low, window)
            else:
                low, high, bias, dead = 0, keys, None, None
            count = max(1, budget // ((stop - start) * heads * (high - low)))
            for i in range(first, last, count):
                span = slice(i - first, i - first + count)
                yield Tile(
                    slice(i, min(i + count, last)),
                    slice(start * heads, stop * heads),
                    slice(low, high),
                    bias[span] if bias is not None and bias.ndim == 4 else bias,
                    dead[span] if dead is not None and dead.ndim == 4 else dead,
                )


def _causal(start: int, stop: int, low: int, window: int | None) -> Tensor:
    """What hides keys ``low:stop`` from positions ``start:stop``: (positions, 1, keys)."""
    distance = torch.arange(start, stop)[:, None] - torch.arange(low, stop)[None, :]
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    return torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None]


def _masked(part: Tensor, groups: int) -> tuple[int, int, Tensor | None, Tensor | None]:
    # The keys that ``part`` (H or 1, positions, keys) leaves, and its bias and dead rows over them.
    boolean = part.dtype is torch.bool
    # what libraries add to hide a key is the smallest number of the dtype, or -inf
    visible = part if boolean else part > torch.finfo(part.dtype).min / 2
    columns = visible.view(torch.uint8).amax((0, 1)).nonzero()
    alive = bool(visible.view(torch.uint8).amax(-1).all())
    # a row all of whose keys are hidden by the same number sees them all
    low, high = (int(columns[0]), int(columns[-1]) + 1) if alive else (0, part.shape[-1])
    part = part[..., low:high]
    if boolean:
        if bool(part.all()):
            return low, high, None, None
        bias = torch.zeros(part.shape).masked_fill_(~part, -torch.inf)
    else:
        bias = part.to(torch.promote_types(part.dtype, torch.float32))
    if bias.shape[0] == 1:
        bias = bias[0, :, None]  # (positions, 1, keys)
    else:  # (groups, positions, heads, keys)
        bias = bias.view(groups, -1, *bias.shape[1:]).transpose(1, 2)
    dead = None if alive else (bias == -torch.inf).all(-1, keepdim=True)
    return low, high, bias, dead if dead is not None and bool(dead.any()) else None


def fold(t: Tensor, groups: int) -> Tensor:
    """(B, H, T, D) to (B * groups, T * heads, D): the heads of a position are adjacent rows."""
    batch, heads, time, dim = t.shape
    t = t.reshape(batch, groups, heads // groups, time, dim).transpose(2, 3)
    return t.reshape(batch * groups, -1, dim)


def unfold(t: Tensor, like: Tensor, groups: int) -> Tensor:
    """The inverse of ``fold``, with sizes and dtype of ``like``; in memory (B, T, H, D)."""
    batch, heads, time, _ = like.shape
    t = t.view(batch, groups, time, heads // groups, -1).transpose(2, 3)
    dim = t.shape[-1]
    strides = (time * heads * dim, dim, heads * dim, 1)
    # no view: what an autograd function returns must be one that the model may write to in place
    out = torch.empty_strided((batch, heads, time, dim), strides, dtype=like.dtype)
    out.unflatten(1, (groups, heads // groups)).copy_(t)
    return out


class Scratch:
    """Memory that all tiles of a call use in turn."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._flat = torch.empty(0, dtype=dtype)

    def __call__(self, *shape: int) -> Tensor:
        """A matrix of three dimensions, valid until the next call."""
        size = shape[0] * shape[1] * shape[2]
        if self._flat.numel() < size:
            self._flat = self._flat.new_empty(size)
        return self._flat[:size].view(shape)
