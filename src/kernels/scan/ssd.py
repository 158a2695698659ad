"""The scan of Mamba-2's kind, chunked state-space duality (Dao & Gu, 2024).

Each head has one decay for all its features and states, so that a chunk of time is a masked matrix
product, like attention:

    h[t] = exp(dt[t] A) h[t-1] + dt[t] B[t] x[t]^T
    y[t] = C[t] h[t] + D x[t]

Model code computes all chunks of all heads at once, with B and C repeated for every head. Here a
few heads of a sample are computed at a time, and backward computes everything again from the
inputs, which are all that is kept. In low precision the arithmetic is in fp32, and so is the
result, as in model code.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..captured import capturable
from ..launch import library_op
from ..op import Maker, Op, kept_on_gpu, misshapen
from ..second_order import differentiable, double_backward
from . import ssd_chunks
from .ssd_chunks import work_dtype

CHUNK = 64
"""Steps of time in a chunk."""

_TILE = 1 << 20
"""Elements of the largest matrices of a tile."""


# -- reference -------------------------------------------------------------------------------------
def ssd_reference(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    dt_bias: Tensor | None = None, dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")), segments: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The dual form, attention with decays, rounding as model code does; see ``ssd``."""
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    wide = work_dtype(x)
    dt = dt.clamp(*dt_limit).to(wide)
    heads = x.shape[2] // B.shape[2]
    x, A = x.to(wide), A.to(wide)
    B, C = (t.to(wide).repeat_interleave(heads, 2).transpose(1, 2) for t in (B, C))
    exponents = (A * dt).transpose(1, 2)
    # between[i, j] is the sum of the exponents after step j, up to step i
    below = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
    between = exponents[..., None].expand(*exponents.shape, x.shape[1])
    seen = below if segments is None else below & _same(segments).unsqueeze(1)
    between = between.masked_fill(~below.tril(-1), 0).cumsum(-2).masked_fill(~seen, -torch.inf)
    values = (x * dt[..., None]).transpose(1, 2)
    y = ((C @ B.transpose(-1, -2) * between.exp()) @ values).transpose(1, 2)
    return y if D is None else y + x * D[:, None]


def _same(segments: Tensor) -> Tensor:
    """Whether position j is not before the segment of position i: (B, L, L)."""
    places = torch.arange(segments.shape[1], device=segments.device)
    return places >= segments.unsqueeze(-1)


# -- cpu -------------------------------------------------------------------------------------------
def _chunked(t: Tensor) -> Tensor:
    """(L, H, ..) -> (H, K, Q, ..), zero beyond the end."""
    length = t.shape[0]
    t = F.pad(t.movedim(0, -1), (0, -length % CHUNK))
    cut: Tensor = t.unflatten(-1, (-1, CHUNK))  # type: ignore[no-untyped-call]
    return cut.movedim((-2, -1), (1, 2)).contiguous()


def _joined(t: Tensor, length: int) -> Tensor:
    """(H, K, Q, ..) -> (L, H, ..)."""
    return t.flatten(1, 2)[:, :length].transpose(0, 1)


def _tiles(x: Tensor, b: Tensor) -> Iterator[tuple[int, int, slice]]:
    """(sample, group, heads): heads of one group, as many as a tile holds."""
    (batch, length, heads, _), groups = x.shape, b.shape[2]
    each = heads // groups
    count = max(1, min(each, _TILE // (CHUNK * max(length, CHUNK))))
    for i in range(batch):
        for g in range(groups):
            for h in range(g * each, (g + 1) * each, count):
                yield i, g, slice(h, min(h + count, (g + 1) * each))


def _tile(
    x: Tensor, step: Tensor, a: Tensor, b: Tensor, c: Tensor, segments: Tensor | None,
    at: tuple[int, int, slice],
) -> ssd_chunks.ScanTile:  # fmt: skip
    i, g, heads = at
    wide = step.dtype
    steps = step[i, :, heads]
    b, c = (_chunked(t[i, :, g : g + 1].to(wide))[0] for t in (b, c))
    return ssd_chunks.ScanTile(
        _chunked(x[i, :, heads].to(wide) * steps[..., None]),
        _chunked(steps * a[heads].to(wide)),
        b,
        c,
        None if segments is None else _from_chunks(segments[i]),
    )


def _from_chunks(segments: Tensor) -> Tensor:
    """(L,) -> (K, Q): counted from the beginning of each chunk."""
    cut: Tensor = F.pad(segments, (0, -segments.shape[0] % CHUNK)).unflatten(-1, (-1, CHUNK))  # type: ignore[no-untyped-call]
    return cut - CHUNK * torch.arange(cut.shape[0], device=cut.device).unsqueeze(-1)


def _forward(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, bias: Tensor | None,
    softplus: bool, low: float, high: float, segments: Tensor | None,
) -> Tensor:  # fmt: skip
    step, _ = ssd_chunks.steps(dt, bias, softplus, low, high)
    out = torch.empty(x.shape, dtype=step.dtype, device=x.device)
    for at in _tiles(x, b):
        y = ssd_chunks.forward(_tile(x, step, a, b, c, segments, at))
        out[at[0], :, at[2]] = _joined(y, x.shape[1])
    return out if d is None else out.addcmul_(x.to(out.dtype), d.to(out.dtype)[:, None])


def _backward(
    grad: Tensor, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None,
    bias: Tensor | None, softplus: bool, low: float, high: float, segments: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    step, slope = ssd_chunks.steps(dt, bias, softplus, low, high)
    wide, length = step.dtype, x.shape[1]
    grad = grad.to(wide)
    dx = torch.empty(x.shape, dtype=wide, device=x.device)
    dexponents, dstep = torch.empty_like(step), torch.empty_like(step)
    db, dc = (torch.zeros(t.shape, dtype=wide, device=t.device) for t in (b, c))
    for at in _tiles(x, b):
        i, g, heads = at
        tile = _tile(x, step, a, b, c, segments, at)
        outer = _chunked(grad[i, :, heads])
        gx, gexponents, gb, gc = ssd_chunks.backward(tile, outer)
        dx[i, :, heads] = _joined(gx, length)
        dexponents[i, :, heads] = _joined(gexponents, length)
        db[i, :, g] += gb.flatten(0, 1)[:length]
        dc[i, :, g] += gc.flatten(0, 1)[:length]
    torch.mul(dexponents, a.to(wide), out=dstep)
    dstep.add_((dx * x).sum(-1)).mul_(slope)
    da = (dexponents * step).sum((0, 1), dtype=torch.float64)
    dx.mul_(step.unsqueeze(-1))
    every = [dx, dstep, da, db, dc, None, None]
    if d is not None:
        dx.addcmul_(grad, d.to(wide)[:, None])
        every[5] = (grad * x).sum((0, 1, 3), dtype=torch.float64) if needs[5] else None
    if bias is not None:
        every[6] = dstep.sum((0, 1), dtype=torch.float64)
    pairs = zip(every, (x, dt, a, b, c, d, bias), needs, strict=True)
    return [g.to(t.dtype) for g, t, needed in pairs if needed and g is not None and t is not None]


def _fake_forward(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=work_dtype(x))


def _fake_backward(grad: Tensor, *rest: Any) -> list[Tensor]:
    pairs = zip(rest[:7], rest[-1], strict=True)
    return [t.new_empty(t.shape) for t, needed in pairs if needed]


# The loops over chunks would fix the length in a traced graph, so the two directions are opaque.
_INPUTS = (
    "Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c, Tensor? d, Tensor? bias, bool softplus, "
    "float low, float high, Tensor? segments"
)


def _flops(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, *_: Any) -> int:
    """Per step and head: scores and values of a chunk, and the state read and written."""
    features, states = x.shape[-1], b.shape[-1]
    return dt.numel() * (2 * CHUNK * (states + features) + 4 * states * features)


def _backward_flops(grad: Tensor, *rest: Any) -> int:
    return 3 * _flops(*rest)  # forward again, and two products for each of its


_forward_op = library_op(f"ssd_forward({_INPUTS}) -> Tensor", _forward, _fake_forward, _flops)
_backward_op = library_op(
    f"ssd_backward(Tensor grad, {_INPUTS}, bool[7] needs) -> Tensor[]",
    _backward,
    _fake_backward,
    _backward_flops,
)


# -- autograd --------------------------------------------------------------------------------------
def _of_options(*tensors: Any) -> Tensor:
    x, dt, a, b, c, d, bias, softplus, low, high, segments = tensors
    return ssd_reference(x, dt, a, b, c, d, bias, softplus, (low, high), segments)


@capturable
class _SSD(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None,
        bias: Tensor | None, softplus: bool, low: float, high: float, segments: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, dt, a, b, c, d, bias)
        ctx.options = softplus, low, high, segments
        out: Tensor = _forward_op(x, dt, a, b, c, d, bias, *ctx.options)
        return out

    @staticmethod
    @differentiable(double_backward(_of_options, 7))
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:7])
        remaining = iter(_backward_op(grad, *ctx.saved_tensors, *ctx.options, needs))
        return *(next(remaining) if needed else None for needed in needs), None, None, None, None


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    dt_bias: Tensor | None = None, dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")), segments: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The outputs of the scan from a zero state. Nothing but the inputs is kept for backward.

    Args:
        x: (B, L, H, P), any strides.
        dt: (B, L, H): the steps.
        A: (H,).
        B: (B, L, G, N) with H a multiple of G: head h reads group ``h // (H / G)``.
        C: (B, L, G, N).
        D: (H,): how much of x is added, or None.
        dt_bias: (H,), added to dt, or None.
        dt_softplus: whether the steps are ``softplus(dt + dt_bias)``.
        dt_limit: what the steps are clamped to.
        segments: (B, L), int32: where the segment of each position begins, each scanned from zero;
            None: each row is one.

    Returns:
        (B, L, H, P), in fp32, or fp64 for fp64.

    Raises:
        ValueError: for what ``OP.unsupported`` lists.
    """
    reasons = ssd_unsupported(x, dt, A, B, C, D, dt_bias, dt_softplus, dt_limit, segments)
    if reasons:
        raise ValueError("; ".join(reasons))
    low, high = dt_limit
    return _SSD.apply(x, dt, A, B, C, D, dt_bias, dt_softplus, low, high, segments)  # type: ignore[no-any-return, no-untyped-call]


# -- OP --------------------------------------------------------------------------------------------
def ssd_unsupported(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    dt_bias: Tensor | None = None, dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")), segments: Tensor | None = None,
) -> list[str]:  # fmt: skip
    """Why ``ssd`` cannot take these inputs; empty when it can."""
    tensors = [t for t in (x, dt, A, B, C, D, dt_bias) if t is not None]
    devices = {t.device for t in (*tensors, segments) if t is not None}
    if any(not t.is_floating_point() for t in tensors) or len(devices) > 1:
        return ["an input is not floating-point, or is on another device"]
    if kept := kept_on_gpu(x):
        return kept
    if x.ndim != 4 or B.ndim != 4 or x.shape[2] % B.shape[2]:
        return ["x and B have not 4 dimensions, or heads are not a multiple of groups"]
    batch, length, heads, _ = x.shape
    groups, states = B.shape[2:]
    expected = (
        (dt, (batch, length, heads)), (A, (heads,)), (B, (batch, length, groups, states)),
        (C, (batch, length, groups, states)), (D, (heads,)), (dt_bias, (heads,)),
        (segments, (batch, length)),
    )  # fmt: skip
    return misshapen("x", x, expected)


def _example(m: Maker, groups: int = 1) -> tuple[Any, ...]:
    heads, states = m.sizes.heads, 4 * m.sizes.states
    x, dt = m.x(heads, m.sizes.head_dim), m.x(heads)
    b, c = m.x(groups, states), m.x(groups, states)
    return x, dt, m.decays(heads), b, c, m.weight(heads), m.weight(heads), True


def _example_of_groups(m: Maker) -> tuple[Any, ...]:
    *inputs, _, bias, softplus = _example(m, m.sizes.kv_heads)
    return *inputs, None, bias, softplus, (0.01, 1.5)


def _example_of_segments(m: Maker) -> tuple[Any, ...]:
    return *_example_of_groups(m), m.segments()


OP = Op(
    "ssd",
    ssd_reference,
    ssd,
    ssd_unsupported,
    rule="selective_scan",
    example=_example,
    variants={"groups": _example_of_groups, "segments": _example_of_segments},
)
