"""The rotation of ``rope`` in PyTorch: in place on fresh outputs, and traceable."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pairs(t: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views (..., R/2) of the first and the second members of all pairs of ``t`` (..., R)."""
    if interleaved:
        return t[..., 0::2], t[..., 1::2]
    half = t.shape[-1] // 2
    return t[..., :half], t[..., half:]


def _sides(layout: str, transpose: bool) -> tuple[bool, bool, bool]:
    """Whether pairs are adjacent in what is read, in what is written, and in the tables."""
    sides = (layout != "halves", layout == "pairs")
    return (*(sides[::-1] if transpose else sides), layout == "pairs")


def rotate(
    tensors: Sequence[Tensor], cos: Tensor, sin: Tensor, rotary_dim: int, layout: str,
    transpose: bool, dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """Rotate each tensor, or with ``transpose`` apply the transposed map; results in ``dtype``."""
    compute = torch.promote_types(tensors[0].dtype, cos.dtype)
    cos, sin = cos.to(compute), sin.to(compute)
    sides = _sides(layout, transpose)
    plain = not (torch.compiler.is_compiling() or torch.is_grad_enabled())
    if plain and all(type(t) is Tensor for t in tensors):
        factor = torch.empty_like(sin)  # (k1, k2), small: it has no heads
        (s1, s2), (k1, k2) = pairs(sin, sides[2]), pairs(factor, sides[2])
        torch.neg(s1, out=k2 if transpose else k1)
        (k1 if transpose else k2).copy_(s2)
        return [_written(t, cos, factor, sides, compute).to(dtype) for t in tensors]
    s1, s2 = pairs(sin, sides[2])
    k1, k2 = (s2, -s1) if transpose else (-s1, s2)
    return [_joined(t, cos, k1, k2, rotary_dim, sides, compute).to(dtype) for t in tensors]


def _written(
    t: Tensor, cos: Tensor, factor: Tensor, sides: tuple[bool, bool, bool], compute: torch.dtype
) -> Tensor:
    """The form for eager mode: three passes, all writing into the output."""
    t = t.to(compute)
    out = torch.empty_like(t)
    rotary_dim = cos.shape[-1]
    source, target = t[..., :rotary_dim], out[..., :rotary_dim]
    (x1, x2), (y1, y2) = pairs(source, sides[0]), pairs(target, sides[1])
    y1.copy_(x2)
    y2.copy_(x1)
    if sides[0] != sides[1]:  # element by element only as (..., 2, R/2)
        source, target = _members(source, sides[0]), _members(target, sides[1])
        cos, factor = _members(cos, sides[2]), _members(factor, sides[2])
    target.mul_(factor).addcmul_(source, cos)
    if t.shape[-1] > rotary_dim:
        out[..., rotary_dim:].copy_(t[..., rotary_dim:])
    return out


def _members(t: Tensor, interleaved: bool) -> Tensor:
    """A view (..., 2, R/2) of ``t`` (..., R): first members, second members."""
    lead, half = t.shape[:-1], t.shape[-1] // 2
    return t.view(*lead, half, 2).mT if interleaved else t.view(*lead, 2, half)


def _joined(
    t: Tensor, cos: Tensor, k1: Tensor, k2: Tensor, rotary_dim: int,
    sides: tuple[bool, bool, bool], compute: torch.dtype,
) -> Tensor:  # fmt: skip
    """The form for a tracer: one concatenation of element-wise pieces, which Inductor fuses."""
    heads_inside = t.ndim == 4 and t.stride(1) < t.stride(2)
    if heads_inside:  # torch.cat writes in the order of dimensions: follow the order in memory
        t, cos, k1, k2 = (_swap(x) for x in (t, cos, k1, k2))
    t = t.to(compute)
    (x1, x2), (c1, c2) = pairs(t[..., :rotary_dim], sides[0]), pairs(cos, sides[2])
    y1, y2 = x1 * c1 + x2 * k1, x2 * c2 + x1 * k2
    pieces = [torch.stack((y1, y2), -1).flatten(-2)] if sides[1] else [y1, y2]
    if t.shape[-1] > rotary_dim:
        pieces.append(t[..., rotary_dim:])
    out = torch.cat(pieces, -1)
    return _swap(out) if heads_inside else out


def _swap(t: Tensor) -> Tensor:
    """Swap heads and positions; what has no such dimensions broadcasts over the first of them."""
    while t.ndim < 4:
        t = t.unsqueeze(0)
    return t.transpose(1, 2)
