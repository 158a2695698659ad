"""Chunked state-space duality for some heads of one sample, in matrix products.

With K chunks of Q steps, heads H that share one B and C, features P and states N; ``s`` is the sum
of the exponents ``A dt`` from a chunk's beginning:

    Y = (C B^T * exp(s_i - s_j), lower) X + exp(s_i) C h        within a chunk, and from before it
    h' = exp(s_Q) h + (B * exp(s_Q - s_j))^T X                  from chunk to chunk

Differences of sums are taken in fp64: they are small where both sums are large. Between two
segments every factor is zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


def work_dtype(x: Tensor) -> torch.dtype:
    """The dtype of arithmetic and result: fp32, or fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def steps(
    dt: Tensor, bias: Tensor | None, softplus: bool, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """The steps (B, L, H), and their derivative by ``dt``."""
    dt = dt.to(work_dtype(dt))
    raw = dt if bias is None else dt + bias.to(dt.dtype)
    step = F.softplus(raw) if softplus else raw
    slope = torch.where(raw > 20, 1.0, torch.sigmoid(raw)) if softplus else torch.ones_like(raw)
    return step.clamp(low, high), slope * ((step >= low) & (step <= high))


@dataclass
class ScanTile:
    """The inputs of a tile, zero beyond the last step."""

    x: Tensor  # x times dt, (H, K, Q, P)
    exponents: Tensor  # A times dt, (H, K, Q); none is positive as a rule
    b: Tensor  # (K, Q, N)
    c: Tensor  # (K, Q, N)
    # where the segments of its positions begin, counted from the chunk's beginning, (K, Q)
    segments: Tensor | None = None


class _Decays:
    def __init__(self, exponents: Tensor, segments: Tensor | None) -> None:
        s = exponents.cumsum(-1, dtype=torch.float64)
        kind, size = exponents.dtype, exponents.shape[-1]
        upper = torch.ones(size, size, dtype=torch.bool, device=s.device).triu_(1)
        # exp(s_i - s_j) for i >= j, else 0: (H, K, Q, Q)
        self.within = (
            (s.unsqueeze(-1) - s.unsqueeze(-2)).to(kind).masked_fill_(upper, -torch.inf).exp_()
        )
        last = s[..., -1:]
        self.into = s.to(kind).exp().unsqueeze(-1)  # exp(s_i), from the state before: (H, K, Q, 1)
        # exp(s_Q - s_j), to the state after: (H, K, Q, 1)
        self.rest = (last - s).to(kind).exp_().unsqueeze(-1)
        self.whole = last.to(kind).exp().unsqueeze(-1)  # exp(s_Q): (H, K, 1, 1)
        if segments is not None:
            steps = torch.arange(size, device=s.device)
            ends = segments[:, -1:]
            self.within.masked_fill_(steps < segments.unsqueeze(-1), 0)
            self.into.masked_fill_((segments >= 0).unsqueeze(-1), 0)
            self.rest.masked_fill_((steps < ends).unsqueeze(-1), 0)
            self.whole.masked_fill_((ends >= 0).unsqueeze(-1), 0)


def _states(t: ScanTile, decays: _Decays) -> Tensor:
    """The states before each chunk, (H, K, N, P)."""
    added = t.b.transpose(-1, -2) @ (t.x * decays.rest)
    before = torch.zeros_like(added)
    for k in range(1, added.shape[1]):
        torch.addcmul(added[:, k - 1], decays.whole[:, k - 1], before[:, k - 1], out=before[:, k])
    return before


def forward(t: ScanTile) -> Tensor:
    """The outputs without the skip connection, (H, K, Q, P)."""
    decays = _Decays(t.exponents, t.segments)
    states = _states(t, decays)
    scores = decays.within.mul_(t.c @ t.b.transpose(-1, -2))
    return (scores @ t.x).addcmul_(decays.into, t.c @ states)


def backward(t: ScanTile, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, exponents, b and c, from that of the outputs."""
    # The gradient of an exponent is the sum over all pairs of steps between which it lies. It is
    # added up so, and never as the difference of two larger sums.
    decays = _Decays(t.exponents, t.segments)
    before = _states(t, decays)
    bt = t.b.transpose(-1, -2)
    products = t.c @ bt
    scores = decays.within * products
    carried = grad * decays.into
    # the gradients of the states after each chunk, from the last chunk to the first
    into = t.c.transpose(-1, -2) @ carried
    after = torch.zeros_like(before)
    for k in range(before.shape[1] - 2, -1, -1):
        torch.addcmul(into[:, k + 1], decays.whole[:, k + 1], after[:, k + 1], out=after[:, k])
    handed = (t.b @ after).mul_(decays.rest)
    dx = (scores.transpose(-1, -2) @ grad).add_(handed)
    dscores = grad @ t.x.transpose(-1, -2)
    dproducts = (dscores * decays.within).sum(0)
    dc = dproducts @ t.b + (carried @ before.transpose(-1, -2)).sum(0)
    db = dproducts.transpose(-1, -2) @ t.c
    db = db + ((t.x * decays.rest) @ after.transpose(-1, -2)).sum(0)
    # exponent t lies between i >= t and j < t
    pairs = _from_end(dscores.mul_(scores), -2).tril_(-1).sum(-1)
    reads = _from_end((carried * (t.c @ before)).sum(-1), -1)
    writes = (handed * t.x).sum(-1)
    writes = writes.cumsum(-1) - writes
    passed = (after * before).sum((-1, -2)).unsqueeze(-1) * decays.whole[..., 0]
    return dx, pairs + reads + writes + passed, db, dc


def _from_end(t: Tensor, dim: int) -> Tensor:
    """Sums from each place to the end of a dimension."""
    return t.flip(dim).cumsum_(dim).flip(dim)
