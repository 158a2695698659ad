"""Rotary position embedding of several tensors at once (Su et al., "RoFormer", 2021).

The first ``rotary_dim`` features of each head are seen as pairs (x1, x2). ``layout`` says where the
members of a pair are:

* ``"halves"``: features i and i + rotary_dim/2 (as in Llama);
* ``"pairs"``: features 2i and 2i + 1 (as in GPT-J);
* ``"pairs_to_halves"``: 2i and 2i + 1 in the input, i and i + rotary_dim/2 in the output (as in
  DeepSeek-V3).

    y1 = x1 * cos1 - x2 * sin1        d x1 = dy1 * cos1 + dy2 * sin2
    y2 = x2 * cos2 + x1 * sin2        d x2 = dy2 * cos2 - dy1 * sin1

Backward is the exact transpose, with no assumption that cos1 = cos2 or sin1 = sin2. Both directions
have the form ``y1 = x1 * cos1 + x2 * k1; y2 = x2 * cos2 + x1 * k2``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..captured import capturable, mark_frozen
from ..direct import direct
from ..launch import library_op, use_triton
from ..op import Maker, Op, on_several_devices
from ..second_order import absent, differentiable, gradients


# -- reference -------------------------------------------------------------------------------------
def rope_reference(
    tensors: Sequence[Tensor], cos: Tensor, sin: Tensor | None, rotary_dim: int,
    layout: str = "halves", inverse: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """``r * cos + rotate(r) * sin`` of the first ``rotary_dim`` features, as model code has it."""
    cos, sin = _tables(cos, sin, rotary_dim, layout, inverse)
    outs = []
    for t in tensors:
        r, rest = t[..., :rotary_dim], t[..., rotary_dim:]
        first, second = pairs(r, layout != "halves")
        if layout == "pairs":
            rotated = torch.stack((-second, first), -1).flatten(-2)
        else:
            rotated = torch.cat((-second, first), -1)
        r = torch.cat((first, second), -1) if layout == "pairs_to_halves" else r
        y = r * cos + rotated * sin
        outs.append(torch.cat((y, rest), -1) if rest.shape[-1] else y)
    return tuple(outs)


def _tables(
    cos: Tensor, sin: Tensor | None, rotary_dim: int, layout: str, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Cos and sin (..., rotary_dim) as the output is laid out, from any form that models have."""
    if sin is None:
        cos, sin = cos.real, cos.imag
    if cos.shape[-1] * 2 == rotary_dim:  # small: they have no heads
        if layout == "pairs":
            cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
        else:
            cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    return cos, -sin if inverse else sin


# -- cpu -------------------------------------------------------------------------------------------
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


LAYOUTS = ("halves", "pairs", "pairs_to_halves")


# -- triton ----------------------------------------------------------------------------------------
def _fake_rotate(
    tensors: Sequence[Tensor], cos: Tensor, sin: Tensor, rotary_dim: int, layout: str,
    transpose: bool, dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    return [torch.empty_like(t, dtype=dtype) for t in tensors]


_triton_rotate = library_op(
    "rope_rotate(Tensor[] tensors, Tensor cos, Tensor sin, int rotary_dim, str layout, "
    "bool transpose, ScalarType dtype) -> Tensor[]",
    "attention.rope:rotate",
    _fake_rotate,
    plain=rotate,
)
_launch_rotate = direct(_triton_rotate)


def _fits_kernel(tensors: Sequence[Tensor], cos: Tensor, sin: Tensor) -> bool:
    """Whether cos and sin are shared by one dimension (the heads) of tensors of up to 4 dims."""
    if any(t.ndim > 4 for t in tensors) or cos.ndim > 4 or sin.ndim > 4:
        return False
    return any(
        all(t.ndim < 1 - dim or t.shape[dim] == 1 or t.stride(dim) == 0 for t in (cos, sin))
        for dim in (-3, -2)
    )


# -- autograd --------------------------------------------------------------------------------------
def _double_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    cos, sin = ctx.saved_tensors
    rotary_dim, layout = ctx.options
    # of a rotation, only the shape of what it rotates matters
    inputs = [None if g is None else absent(g.shape, g, ctx.dtype) for g in grads]

    def formula(*tensors: Tensor | None) -> list[Tensor | None]:
        return [
            None if t is None else rope_reference([t], cos, sin, rotary_dim, layout)[0]
            for t in tensors
        ]

    gradients_of_inputs = gradients(formula, inputs, ctx.needs_input_grad[4:], grads)
    return None, None, None, None, *gradients_of_inputs


@capturable
class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, cos: Tensor, sin: Tensor, rotary_dim: int, layout: str, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        ctx.set_materialize_grads(False)
        ctx.options = rotary_dim, layout
        ctx.dtype = tensors[0].dtype
        ctx.triton = use_triton(*tensors, cos, sin) and _fits_kernel(tensors, cos, sin)
        run = _launch_rotate if ctx.triton else rotate
        dtype = torch.promote_types(tensors[0].dtype, cos.dtype)
        outs = tuple(run(tensors, cos, sin, rotary_dim, layout, False, dtype))
        mark_frozen(ctx, outs, (not needed for needed in ctx.needs_input_grad[4:]))
        return outs

    @staticmethod
    @differentiable(_double_backward)
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        needed = [
            g for g, need in zip(grads, ctx.needs_input_grad[4:], strict=True)
            if need and g is not None
        ]  # fmt: skip
        results: list[Tensor] = []
        if needed:
            run = _launch_rotate if ctx.triton else rotate
            results = list(run(needed, cos, sin, ctx.options[0], ctx.options[1], True, ctx.dtype))
        inputs = [
            results.pop(0) if need and g is not None else None
            for g, need in zip(grads, ctx.needs_input_grad[4:], strict=True)
        ]
        return None, None, None, None, *inputs


def rope(
    tensors: Sequence[Tensor], cos: Tensor, sin: Tensor | None, rotary_dim: int,
    layout: str = "halves", inverse: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Rotate the first ``rotary_dim`` features of every tensor; the others pass through.

    Nothing but ``cos`` and ``sin`` is kept for backward.

    Args:
        tensors: each (B, H_i, T, D) of one dtype and any strides; H_i may differ. Other ranks are
            taken too.
        cos: broadcastable to ``t[..., :rotary_dim]``, e.g. (B or 1, 1, T, rotary_dim) laid out as
            the output; or rotary_dim/2 wide, one for each pair; any strides, maybe of a wider
            dtype. It gets no gradient.
        sin: as ``cos``, of the same dtype; None when ``cos`` is complex, cos + i sin.
        rotary_dim: how many features rotate; even, at most D.
        layout: one of ``LAYOUTS``.
        inverse: rotate by the negative angle.

    Returns:
        One tensor for each input, of its shape and order of strides, in the promoted dtype of input
        and ``cos``. Computed in fp32 on a GPU, and rounded once.

    Raises:
        ValueError: ``cos`` or ``sin`` requires a gradient, or dtypes or ``rotary_dim`` do not fit.
    """
    if not _fits(tensors, cos, sin, rotary_dim, layout):
        raise ValueError("; ".join(rope_unsupported(tensors, cos, sin, rotary_dim, layout)))
    cos, sin = _tables(cos, sin, rotary_dim, layout, inverse)
    out: tuple[Tensor, ...] = _Rope.apply(cos, sin, rotary_dim, layout, *tensors)  # type: ignore[no-untyped-call]
    return out


def _fits(
    tensors: Sequence[Tensor], cos: Tensor, sin: Tensor | None, rotary_dim: int, layout: str
) -> bool:
    """Whether ``rope`` can take these; cheap, ``rope_unsupported`` says why not."""
    first, second = tensors[0], cos if sin is None else sin
    return not (
        cos.requires_grad
        or second.requires_grad
        or second.dtype is not cos.dtype
        or cos.is_complex() is not (sin is None)
        or layout not in LAYOUTS
        or rotary_dim % 2
        or cos.shape[-1] not in (rotary_dim, rotary_dim // 2)
        or cos.shape[-1] != second.shape[-1]
        or any(t.dtype is not first.dtype or t.shape[-1] < rotary_dim for t in tensors)
    )


# -- OP --------------------------------------------------------------------------------------------
def rope_unsupported(
    tensors: Sequence[Tensor], cos: Tensor, sin: Tensor | None, rotary_dim: int,
    layout: str = "halves", inverse: bool = False,
) -> list[str]:  # fmt: skip
    """Why ``rope`` cannot take these inputs; empty when it can."""
    reasons = []
    if layout not in LAYOUTS:
        reasons.append(f"layout must be one of {LAYOUTS}, not {layout!r}")
    if cos.is_complex() is not (sin is None):
        return [*reasons, "sin is needed beside a real cos, and only there"]
    if sin is None:
        cos, sin = cos.real, cos.imag
    if cos.requires_grad or sin.requires_grad:
        reasons.append("cos or sin requires a gradient")
    if cos.dtype is not sin.dtype:
        reasons.append(f"cos is {cos.dtype} and sin is {sin.dtype}")
    width = cos.shape[-1]
    if rotary_dim % 2 or width != sin.shape[-1] or width not in (rotary_dim, rotary_dim // 2):
        reasons.append(
            f"rotary_dim {rotary_dim} is not the even width (or twice the width) of cos ({width}) "
            f"and sin ({sin.shape[-1]})"
        )
    for t in tensors:
        if t.dtype is not tensors[0].dtype or not t.is_floating_point():
            reasons.append(
                f"{t.dtype} beside {tensors[0].dtype}: one floating-point dtype is needed"
            )
        if t.shape[-1] < rotary_dim:
            reasons.append(f"a head of {t.shape[-1]} features is narrower than {rotary_dim}")
        if any(not _broadcasts(x, t) for x in (cos, sin)):
            reasons.append(f"cos {tuple(cos.shape)} does not broadcast to {tuple(t.shape)}")
    reasons += on_several_devices(
        *tensors, cos, sin, message="the tensors are on different devices"
    )
    if use_triton(*tensors, cos, sin) and not _fits_kernel(tensors, cos, sin):
        reasons.append("cos and sin differ by head, or there are more than 4 dimensions")
    return reasons


def _broadcasts(table: Tensor, t: Tensor) -> bool:
    """Whether ``table`` broadcasts over all but the last dimension of ``t`` without widening it."""
    sizes = zip(reversed(table.shape[:-1]), reversed(t.shape[:-1]), strict=False)
    return table.ndim <= t.ndim and all(a in (1, b) for a, b in sizes)


def _example(m: Maker, layout: str = "halves", part: int = 1) -> tuple[Any, ...]:
    """Of a head's features, one in ``part`` is rotated."""
    q, k, rotary_dim = (
        m.heads(m.sizes.heads), m.heads(m.sizes.kv_heads), m.sizes.head_dim // part // 2 * 2,
    )  # fmt: skip
    angles = 3 * m.normal(m.sizes.batch, 1, m.sizes.seq, rotary_dim // 2, dtype=m.wide)
    each = angles.repeat_interleave(2, -1) if layout == "pairs" else torch.cat((angles,) * 2, -1)
    return [q, k], each.cos().to(m.dtype), each.sin().to(m.dtype), rotary_dim, layout


OP = Op(
    "rope",
    rope_reference,
    rope,
    rope_unsupported,
    example=_example,
    variants={
        "pairs": lambda m: _example(m, "pairs"),
        "pairs-to-halves": lambda m: _example(m, "pairs_to_halves"),
        "partial": lambda m: _example(m, part=2),
    },
)
