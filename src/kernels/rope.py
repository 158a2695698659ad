"""Rotary position embedding of several tensors at once (Su et al., "RoFormer", 2021).

The first ``rotary_dim`` features of each head are seen as pairs (x1, x2): features i and
i + rotary_dim/2 ("half-split", as in Llama), or 2i and 2i + 1 ("interleaved", as in GPT-J).

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

from .launch import library_op, use_triton
from .op import Cost, Op

# -- reference -------------------------------------------------------------------------------------


def rope_reference(
    tensors: Sequence[Tensor], cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool = False
) -> tuple[Tensor, ...]:
    """``r * cos + rotate(r) * sin`` of the first ``rotary_dim`` features, as model code has it."""
    outs = []
    for t in tensors:
        r, rest = t[..., :rotary_dim], t[..., rotary_dim:]
        first, second = _pairs(r, interleaved)
        if interleaved:
            rotated = torch.stack((-second, first), -1).flatten(-2)
        else:
            rotated = torch.cat((-second, first), -1)
        y = r * cos + rotated * sin
        outs.append(torch.cat((y, rest), -1) if rest.shape[-1] else y)
    return tuple(outs)


def _pairs(t: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views (..., R/2) of the first and the second members of all pairs of ``t`` (..., R)."""
    if interleaved:
        return t[..., 0::2], t[..., 1::2]
    half = t.shape[-1] // 2
    return t[..., :half], t[..., half:]


# -- cpu -------------------------------------------------------------------------------------------


def _rotate(
    tensors: Sequence[Tensor], cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool,
    transpose: bool, dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """Rotate each tensor, or with ``transpose`` apply the transposed map; results in ``dtype``."""
    compute = torch.promote_types(tensors[0].dtype, cos.dtype)
    cos, sin = cos.to(compute), sin.to(compute)
    plain = not (torch.compiler.is_compiling() or torch.is_grad_enabled())
    if plain and all(type(t) is Tensor for t in tensors):
        factor = torch.empty_like(sin)  # (k1, k2), small: it has no heads
        (s1, s2), (k1, k2) = _pairs(sin, interleaved), _pairs(factor, interleaved)
        torch.neg(s1, out=k2 if transpose else k1)
        (k1 if transpose else k2).copy_(s2)
        return [_written(t, cos, factor, interleaved, compute).to(dtype) for t in tensors]
    s1, s2 = _pairs(sin, interleaved)
    k1, k2 = (s2, -s1) if transpose else (-s1, s2)
    return [_joined(t, cos, k1, k2, rotary_dim, interleaved, compute).to(dtype) for t in tensors]


def _written(
    t: Tensor, cos: Tensor, factor: Tensor, interleaved: bool, compute: torch.dtype
) -> Tensor:
    """The form for eager mode: three passes, all writing into the output."""
    t = t.to(compute)
    out = torch.empty_like(t)
    rotary_dim = cos.shape[-1]
    source, target = t[..., :rotary_dim], out[..., :rotary_dim]
    (x1, x2), (y1, y2) = _pairs(source, interleaved), _pairs(target, interleaved)
    y1.copy_(x2)
    y2.copy_(x1)
    target.mul_(factor).addcmul_(source, cos)
    if t.shape[-1] > rotary_dim:
        out[..., rotary_dim:].copy_(t[..., rotary_dim:])
    return out


def _joined(
    t: Tensor, cos: Tensor, k1: Tensor, k2: Tensor, rotary_dim: int, interleaved: bool,
    compute: torch.dtype,
) -> Tensor:  # fmt: skip
    """The form for a tracer: one concatenation of element-wise pieces, which Inductor fuses."""
    heads_inside = t.ndim == 4 and t.stride(1) < t.stride(2)
    if heads_inside:  # torch.cat writes in the order of dimensions: follow the order in memory
        t, cos, k1, k2 = (_swap(x) for x in (t, cos, k1, k2))
    t = t.to(compute)
    (x1, x2), (c1, c2) = _pairs(t[..., :rotary_dim], interleaved), _pairs(cos, interleaved)
    y1, y2 = x1 * c1 + x2 * k1, x2 * c2 + x1 * k2
    pieces = [torch.stack((y1, y2), -1).flatten(-2)] if interleaved else [y1, y2]
    if t.shape[-1] > rotary_dim:
        pieces.append(t[..., rotary_dim:])
    out = torch.cat(pieces, -1)
    return _swap(out) if heads_inside else out


def _swap(t: Tensor) -> Tensor:
    """Swap heads and positions; what has no such dimensions broadcasts over the first of them."""
    while t.ndim < 4:
        t = t.unsqueeze(0)
    return t.transpose(1, 2)


# -- triton ----------------------------------------------------------------------------------------


def _fake_rotate(
    tensors: Sequence[Tensor], cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool,
    transpose: bool, dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    return [torch.empty_like(t, dtype=dtype) for t in tensors]


_triton_rotate = library_op(
    "rope_rotate(Tensor[] tensors, Tensor cos, Tensor sin, int rotary_dim, bool interleaved, "
    "bool transpose, ScalarType dtype) -> Tensor[]",
    "rope:rotate",
    _fake_rotate,
)


def _fits_kernel(tensors: Sequence[Tensor], cos: Tensor, sin: Tensor) -> bool:
    """Whether cos and sin are shared by one dimension (the heads) of tensors of up to 4 dims."""
    if any(t.ndim > 4 for t in tensors) or cos.ndim > 4 or sin.ndim > 4:
        return False
    return any(
        all(t.ndim < 1 - dim or t.shape[dim] == 1 or t.stride(dim) == 0 for t in (cos, sin))
        for dim in (-3, -2)
    )


# -- autograd --------------------------------------------------------------------------------------


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        ctx.set_materialize_grads(False)
        ctx.options = rotary_dim, interleaved
        ctx.dtype = tensors[0].dtype
        ctx.triton = use_triton(*tensors, cos, sin) and _fits_kernel(tensors, cos, sin)
        run = _triton_rotate if ctx.triton else _rotate
        dtype = torch.promote_types(tensors[0].dtype, cos.dtype)
        return tuple(run(tensors, cos, sin, rotary_dim, interleaved, False, dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        needed = [
            g for g, need in zip(grads, ctx.needs_input_grad[4:], strict=True)
            if need and g is not None
        ]  # fmt: skip
        results: list[Tensor] = []
        if needed:
            run = _triton_rotate if ctx.triton else _rotate
            results = list(run(needed, cos, sin, ctx.options[0], ctx.options[1], True, ctx.dtype))
        inputs = [
            results.pop(0) if need and g is not None else None
            for g, need in zip(grads, ctx.needs_input_grad[4:], strict=True)
        ]
        return None, None, None, None, *inputs


def rope(
    tensors: Sequence[Tensor], cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool = False
) -> tuple[Tensor, ...]:
    """Rotate the first ``rotary_dim`` features of every tensor; the others pass through.

    Nothing but ``cos`` and ``sin`` is kept for backward.

    Args:
        tensors: each (B, H_i, T, D) of one dtype and any strides; H_i may differ. Other ranks are
            taken too.
        cos: broadcastable to ``t[..., :rotary_dim]`` and ``rotary_dim`` wide, e.g.
            (B or 1, 1, T, rotary_dim); any strides, maybe of a wider dtype. It gets no gradient.
        sin: as ``cos``, of the same dtype.
        rotary_dim: how many features rotate; even, at most D.
        interleaved: pairs are (2i, 2i + 1) in place of (i, i + rotary_dim/2).

    Returns:
        One tensor for each input, of its shape and order of strides, in the promoted dtype of input
        and ``cos``. Computed in fp32 on a GPU, and rounded once.

    Raises:
        ValueError: ``cos`` or ``sin`` requires a gradient, or the dtypes or ``rotary_dim`` do not
            fit.
    """
    first = tensors[0]
    if (
        cos.requires_grad
        or sin.requires_grad
        or sin.dtype is not cos.dtype
        or not rotary_dim == cos.shape[-1] == sin.shape[-1]
        or any(t.dtype is not first.dtype or t.shape[-1] < rotary_dim for t in tensors)
    ):
        raise ValueError("; ".join(rope_unsupported(tensors, cos, sin, rotary_dim, interleaved)))
    out: tuple[Tensor, ...] = _Rope.apply(cos, sin, rotary_dim, interleaved, *tensors)  # type: ignore[no-untyped-call]
    return out


# -- cost ------------------------------------------------------------------------------------------


def rope_cost(
    tensors: Sequence[Tensor], cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool = False
) -> Cost:
    """Each tensor is read and written once; cos and sin are shared by all layers."""
    dtype = torch.promote_types(tensors[0].dtype, cos.dtype)
    tables = cos.numel() * cos.element_size() + sin.numel() * sin.element_size()
    elements = sum(t.numel() for t in tensors)
    rotated = sum(t.numel() // t.shape[-1] * rotary_dim for t in tensors)
    return Cost(
        bytes_read=elements * tensors[0].element_size() + tables,
        bytes_written=elements * dtype.itemsize,
        flops=3 * rotated,
        bytes_saved=0,
    )


# -- OP --------------------------------------------------------------------------------------------


def rope_unsupported(
    tensors: Sequence[Tensor], cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool = False
) -> list[str]:
    """Why ``rope`` cannot take these inputs; empty when it can."""
    reasons = []
    if cos.requires_grad or sin.requires_grad:
        reasons.append("cos or sin requires a gradient")
    if cos.dtype is not sin.dtype:
        reasons.append(f"cos is {cos.dtype} and sin is {sin.dtype}")
    if rotary_dim % 2 or not rotary_dim == cos.shape[-1] == sin.shape[-1]:
        reasons.append(
            f"rotary_dim {rotary_dim} is not the even width of cos ({cos.shape[-1]}) and sin "
            f"({sin.shape[-1]})"
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
    if len({t.device for t in (*tensors, cos, sin)}) > 1:
        reasons.append("the tensors are on different devices")
    if use_triton(*tensors, cos, sin) and not _fits_kernel(tensors, cos, sin):
        reasons.append("cos and sin differ by head, or there are more than 4 dimensions")
    return reasons


def _broadcasts(table: Tensor, t: Tensor) -> bool:
    """Whether ``table`` broadcasts over all but the last dimension of ``t`` without widening it."""
    sizes = zip(reversed(table.shape[:-1]), reversed(t.shape[:-1]), strict=False)
    return table.ndim <= t.ndim and all(a in (1, b) for a, b in sizes)


OP = Op("rope", rope_reference, rope, rope_cost, rope_unsupported)
