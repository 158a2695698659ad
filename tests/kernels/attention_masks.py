"""Masks of attention in every form that models and trainers make."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def packed(batch: int, time: int, cuts: Sequence[int] = (), window: int | None = None) -> Tensor:
    """Block-causal (B, 1, T, T): samples in a row, cut at other places in each batch element.

    Args:
        batch: elements.
        time: positions.
        cuts: where samples begin; by default, one is cut at another place in each element.
        window: how many positions are seen, if it slides.
    """
    order = torch.arange(time)
    first = torch.arange(1, batch + 1)[:, None] * time // (batch + 1)
    starts = torch.tensor(cuts)[None].expand(batch, -1) if cuts else first
    sample = (order[None, :, None] >= starts[:, None]).sum(-1)
    distance = order[:, None] - order[None]
    seen = (distance >= 0) & (distance < (window or time))
    return (seen & (sample[:, :, None] == sample[:, None, :]))[:, None]


def additive(mask: Tensor, hide: float, dtype: torch.dtype) -> Tensor:
    """What is added to scores in place of a boolean mask."""
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, hide)


def _alibi(batch: int, heads: int, time: int) -> Tensor:
    """A bias for each head, on causal attention (Press et al. 2022)."""
    order = torch.arange(time)
    slopes = 2.0 ** -(torch.arange(1, heads + 1) / 2)
    bias = slopes[:, None, None] * (order[None] - order[:, None])
    return bias.masked_fill(order[:, None] < order[None], -torch.inf)[None].half()


def _random(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(shape[-1]))


MASKS: dict[str, Callable[[int, int, int], Tensor]] = {
    "packed": lambda b, h, t: packed(b, t),
    "packed, sliding": lambda b, h, t: packed(b, t, window=9),
    "left padding": lambda b, h, t: torch.arange(t).ge(t // 3).expand(b, 1, 1, t),
    "causal, left padding": lambda b, h, t: (
        packed(1, t, (0,)) & torch.arange(t).ge(t // 3).expand(b, 1, t, t)
    ),
    "per head": lambda b, h, t: _random(1, h, t, t) > 0.5,
    "random": lambda b, h, t: _random(b, h, t, t) > 0.97,  # some see nothing
    "scattered": lambda b, h, t: (
        _random(b, 1, -(-t // 16), t).ge(0.8).repeat_interleave(16, 2)[:, :, :t]
    ),
    "all": lambda b, h, t: torch.ones(1, 1, t, t, dtype=torch.bool),
    "none": lambda b, h, t: torch.zeros(1, 1, t, t, dtype=torch.bool),
    "bias": lambda b, h, t: _random(b, 1, t, t).half() * 4,
    "alibi": _alibi,
}
"""Name -> what makes (B or 1, H or 1, T or 1, T) of batch, heads and positions."""
