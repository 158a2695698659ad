"""Masks of samples that share a row: of each position the first key that it sees.

It sees the keys from there up to its own, and no others. Such a mask takes memory that grows with
the tokens; as a matrix of all pairs it grows with their square. The first keys (B or 1, 1, T, 1)
are int32, which no other mask is, and never fall: samples follow each other. A window that slides
over them is in the numbers.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor


def is_first_keys(mask: Tensor | None) -> TypeGuard[Tensor]:
    """Whether a mask is one of first keys."""
    return mask is not None and mask.dtype is torch.int32


def first_keys(starts: Tensor, window: int | None = None) -> Tensor:
    """Those of rows whose positions (B, T), int32, are in samples that begin at ``starts``."""
    if window is not None:
        order = torch.arange(starts.shape[1], dtype=torch.int32, device=starts.device)
        starts = torch.maximum(starts, order - (window - 1))
    return starts[:, None, :, None]


def seen_keys(first: Tensor, start: int, low: int, high: int) -> Tensor:
    """Whether positions (..., n, 1) from ``start`` on see the keys ``low:high``: (..., n, keys)."""
    keys = torch.arange(low, high, device=first.device)
    rows = torch.arange(start, start + first.shape[-2], device=first.device)
    return (keys >= first) & (keys <= rows[:, None])


@torch._dynamo.allow_in_graph  # type: ignore[untyped-decorator]  # 2026-12-01: no types
def sample_mask(first: Tensor, dtype: torch.dtype = torch.bool) -> Tensor:
    """The mask of all pairs (B or 1, 1, T, T): boolean, or what is added to scores.

    What is added to hide a key is the smallest number, as in transformers.
    """
    seen = seen_keys(first, 0, 0, first.shape[2])
    if dtype is torch.bool:
        return seen
    zero = torch.zeros((), dtype=dtype, device=first.device)
    return torch.where(seen, zero, torch.finfo(dtype).min)
