"""Causal convolutions of each channel over a few positions, in rows that several samples share.

    y[t] = bias + sum over w < W of  weight[W - 1 - w] x[t - w],  for t - w in the segment of t

State-space models and linear attention have one before their scan, with silu after it. Backward
keeps the inputs. In low precision all arithmetic is in fp32 and the result is rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..captured import capturable
from ..launch import library_op
from ..op import Maker, Op, misshapen, not_floating, on_several_devices
from ..second_order import differentiable, double_backward


# -- reference -------------------------------------------------------------------------------------
def conv_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, segments: Tensor, silu: bool
) -> Tensor:
    """One product for each tap, rounding as model code does; see ``short_conv``."""
    wide = torch.promote_types(x.dtype, torch.float32)
    width, length = weight.shape[1], x.shape[2]
    padded = F.pad(x.to(wide), (width - 1, 0))
    places = torch.arange(length, device=x.device)
    total = x.new_zeros(x.shape, dtype=wide)
    if bias is not None:
        total = total + bias.to(wide)[:, None]
    for w in range(width):
        seen = places - w >= segments
        taken = padded[:, :, width - 1 - w : width - 1 - w + length] * seen[:, None]
        total = total + taken * weight[:, width - 1 - w, None].to(wide)
    y = total.to(weight.dtype)
    return (F.silu(y) if silu else y).to(x.dtype)


# -- cpu -------------------------------------------------------------------------------------------
def _taps(width: int, segments: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Distances, and the positions (B, 1, L - w) from w on that have one so far before them."""
    places = torch.arange(segments.shape[1], device=segments.device)
    for w in range(min(width, segments.shape[1])):
        yield w, (places - w >= segments)[:, None, w:]


def _sums(x: Tensor, weight: Tensor, bias: Tensor | None, segments: Tensor) -> Tensor:
    """The outputs before the activation, (B, D, L), in the dtype of the arithmetic."""
    wide, (width, length) = _wide(x), (weight.shape[1], x.shape[2])
    x, weight = x.to(wide), weight.to(wide)
    total = x * weight[:, -1, None]
    if bias is not None:
        total += bias.to(wide)[:, None]
    for w, seen in _taps(width, segments):
        if w:
            taken = x[..., : length - w] * seen
            total[..., w:].addcmul_(taken, weight[:, width - 1 - w, None])
    return total


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, segments: Tensor, silu: bool
) -> Tensor:
    total = _sums(x, weight, bias, segments)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return out.copy_(F.silu(total, inplace=True) if silu else total)


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, segments: Tensor, silu: bool,
    needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    wide, (width, length) = _wide(x), (weight.shape[1], x.shape[2])
    inputs, grad = (x, weight, bias), grad.to(wide)
    if silu:
        total = _sums(x, weight, bias, segments)
        gate = torch.sigmoid(total)
        grad = grad * gate * (total * (1 - gate) + 1)
    x, weight_wide = x.to(wide), weight.to(wide)
    dx, dw = torch.zeros_like(x), torch.zeros_like(weight, dtype=torch.float64)
    for w, seen in _taps(width, segments):
        outer = grad[..., w:] * seen
        if needs[0]:
            dx[..., : length - w].addcmul_(outer, weight_wide[:, width - 1 - w, None])
        if needs[1]:
            each = (outer * x[..., : length - w]).sum(2)
            dw[:, width - 1 - w] = each.sum(0, dtype=torch.float64)
    db = grad.sum(2).sum(0, dtype=torch.float64) if needs[2] else dw
    pairs = zip((dx, dw, db), _fake_gradients(inputs), needs, strict=True)
    return [empty.copy_(g) for g, empty, needed in pairs if needed]


def _fake_forward(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _fake_gradients(inputs: Sequence[Tensor | None]) -> list[Tensor]:
    like = next(t for t in inputs if t is not None)
    return [like.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs]


def _fake_backward(grad: Tensor, *rest: Any) -> list[Tensor]:
    pairs = zip(_fake_gradients(rest[:3]), rest[-1], strict=True)
    return [g for g, needed in pairs if needed]


# The mask of each tap would be a node of its own in a traced graph: one op reads it on the way.
_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor segments, bool silu"

_forward_op = library_op(f"short_conv_forward({_INPUTS}) -> Tensor", _forward, _fake_forward)
_backward_op = library_op(
    f"short_conv_backward(Tensor grad, {_INPUTS}, bool[3] needs) -> Tensor[]",
    _backward,
    _fake_backward,
)


# -- autograd --------------------------------------------------------------------------------------
@capturable
class _ShortConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, segments: Tensor, silu: bool
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias)
        ctx.options = segments, silu
        out: Tensor = _forward_op(x, weight, bias, segments, silu)
        return out

    @staticmethod
    @differentiable(double_backward(conv_reference, 3))
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:3])
        remaining = iter(_backward_op(grad, *ctx.saved_tensors, *ctx.options, needs))
        return *(next(remaining) if needed else None for needed in needs), None, None


def short_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, segments: Tensor, silu: bool
) -> Tensor:
    """The convolution of each segment from nothing. Nothing but the inputs is kept for backward.

    Args:
        x: (B, D, L), any strides.
        weight: (D, W): the last column is that of the position itself.
        bias: (D,), or None.
        segments: (B, L), int32: where the segment of each position begins.
        silu: whether silu follows.

    Returns:
        (B, D, L), in the dtype of x.

    Raises:
        ValueError: for what ``OP.unsupported`` lists.
    """
    reasons = conv_unsupported(x, weight, bias, segments, silu)
    if reasons:
        raise ValueError("; ".join(reasons))
    return _ShortConvolution.apply(x, weight, bias, segments, silu)  # type: ignore[no-any-return, no-untyped-call]


# -- OP --------------------------------------------------------------------------------------------
def conv_unsupported(
    x: Tensor, weight: Tensor, bias: Tensor | None, segments: Tensor, silu: bool
) -> list[str]:
    """Why ``short_conv`` cannot take these inputs; empty when it can."""
    if reasons := [*not_floating("x", x), *not_floating("the weight", weight)]:
        return reasons
    if away := on_several_devices(x, weight, bias, segments):
        return away
    if x.ndim != 3 or weight.ndim != 2:
        return ["x has not 3 dimensions, or the weight not 2"]
    (batch, channels, length), width = x.shape, weight.shape[1]
    expected = (
        (weight, (channels, width)), (bias, (channels,)), (segments, (batch, length)),
    )  # fmt: skip
    return misshapen("x", x, expected)


def _example(m: Maker) -> tuple[Any, ...]:
    channels = m.sizes.hidden
    return m.transposed(channels), m.weight(channels, 4), m.weight(channels), m.segments(), True


def _plain_example(m: Maker) -> tuple[Any, ...]:
    x, weight, _, segments, _ = _example(m)
    return x, weight, None, segments, False


OP = Op(
    "short_conv",
    conv_reference,
    short_conv,
    conv_unsupported,
    example=_example,
    variants={"plain": _plain_example},
)
