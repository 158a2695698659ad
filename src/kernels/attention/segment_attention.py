"""Attention within segments: a position sees the positions of its own segment, and no others.

    O[a:b] = attention(Q[a:b], K[a:b], V[a:b]) for neighbouring boundaries a, b

Towers of pictures lay the patches of all pictures, or of all windows, in one row. Neighbouring
segments of one length are the samples of one call of PyTorch's flash attention for the CPU: there
is neither a mask nor a call for each of many windows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..captured import capturable
from ..launch import library_op, without_base
from ..op import Maker, Op, on_several_devices
from ..second_order import differentiable, gradients
from .sizes import backward_flops, fake_like, forward_flops

_aten = torch.ops.aten


# -- reference -------------------------------------------------------------------------------------
def segment_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor, scale: float | None = None
) -> Tensor:
    """PyTorch's attention, a call for each segment."""
    grouped = q.shape[1] != k.shape[1]
    lengths = (boundaries[1:] - boundaries[:-1]).tolist()
    pieces = zip(*(torch.split(t, lengths, dim=2) for t in (q, k, v)), strict=True)
    outs = (
        F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)
        for q, k, v in pieces
    )
    return torch.cat([out.transpose(1, 2) for out in outs], 1).transpose(1, 2)


# -- cpu -------------------------------------------------------------------------------------------
Run = tuple[int, int]
"""Neighbouring segments of one length: the length, and how many there are."""


def runs(boundaries: Tensor, time: int) -> list[Run]:
    """The runs of a row, without segments of no positions."""
    lengths = (boundaries[1:] - boundaries[:-1]).tolist()
    if sum(lengths) != time or min(lengths, default=0) < 0:
        raise RuntimeError(f"segments of {lengths} positions do not add up to {time}")
    return [(n, len(list(same))) for n, same in itertools.groupby(lengths) if n]


def _samples(t: Tensor, row: list[Run]) -> Iterator[Tensor]:
    """(B, H, T, ...) to a (B * count, H, length, ...) for each run: its segments as samples."""
    for part, (length, count) in zip(t.split([n * c for n, c in row], 2), row, strict=True):
        if count == 1:
            yield part
        else:
            yield part.unflatten(2, (count, length)).transpose(1, 2).flatten(0, 1)


def _joined(samples: Sequence[Tensor], row: list[Run]) -> Tensor:
    """What the samples are of, (B, H, T, ...), in memory (B, T, H, ...)."""
    parts = [
        t.transpose(1, 2)
        if count == 1
        else t.unflatten(0, (-1, count)).transpose(2, 3).flatten(1, 2)
        for t, (_, count) in zip(samples, row, strict=True)
    ]
    whole = parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, 1)
    return without_base(whole.transpose(1, 2))


def _forward(
    q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    row = runs(boundaries, q.shape[2])
    samples = zip(*(_samples(t, row) for t in (q, k, v)), strict=True)
    kernel = _aten._scaled_dot_product_flash_attention_for_cpu
    outs, sums = zip(*(kernel(*tensors, scale=scale) for tensors in samples), strict=True)
    return _joined(outs, row), _joined(sums, row)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, boundaries: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    row = runs(boundaries, q.shape[2])
    samples = zip(*(_samples(t, row) for t in (grad, q, k, v, out, sums)), strict=True)
    kernel = _aten._scaled_dot_product_flash_attention_for_cpu_backward
    grads = zip(*(kernel(*tensors, 0.0, False, scale=scale) for tensors in samples), strict=True)
    dq, dk, dv = (_joined(parts, row) for parts in grads)
    return dq, dk, dv


def fake_forward(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Outputs, and the logarithm of each row's sum."""
    wide = torch.promote_types(q.dtype, torch.float32)
    sums = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=wide)
    return fake_like(q, q.shape[3]), sums.transpose(1, 2)


def fake_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The three gradients, which PyTorch's kernel makes together."""
    return fake_like(q, q.shape[3]), fake_like(k, k.shape[3]), fake_like(v, v.shape[3])


# The lengths are values, so the two directions are opaque. How many scores there are is not known:
# all count.
_forward_op = library_op(
    "segment_attention_forward(Tensor q, Tensor k, Tensor v, Tensor boundaries, float scale)"
    " -> (Tensor, Tensor)",
    _forward,
    fake_forward,
    lambda q, k, v, boundaries, scale: forward_flops(q, k, v, scale, False, None, None),
)
_backward_op = library_op(
    "segment_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, "
    "Tensor sums, Tensor boundaries, float scale) -> (Tensor, Tensor, Tensor)",
    _backward,
    fake_backward,
    lambda grad, q, k, v, out, sums, boundaries, scale: backward_flops(
        grad, q, k, v, scale, False, None, None, None, None, [True] * 3 + [False]
    ),
)


# -- autograd --------------------------------------------------------------------------------------
def _double_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    q, k, v, boundaries = ctx.saved_tensors[:4]

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # the only one that has second derivatives
            return segment_attention_reference(q, k, v, boundaries, ctx.scale)

    return gradients(formula, (q, k, v), ctx.needs_input_grad, (grad,))


@capturable
class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor, scale: float
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.scale = scale
        out: Tensor
        out, sums = _forward_op(q, k, v, boundaries, scale)
        ctx.save_for_backward(q, k, v, boundaries, out, sums)
        return out

    @staticmethod
    @differentiable(_double_backward)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, boundaries, out, sums = ctx.saved_tensors
        grads = _backward_op(grad, q, k, v, out, sums, boundaries, ctx.scale)
        needed = zip(grads, ctx.needs_input_grad, strict=False)
        return *(g if need else None for g, need in needed), None, None


def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor, scale: float | None = None
) -> Tensor:
    """``softmax(scale * q kᵀ) v`` within each segment of a row, without dropout.

    Args:
        q: (B, H, T, D), any strides, on the CPU.
        k: (B, KV, T, D) with H a multiple of KV: query head h reads group ``h // (H / KV)``.
        v: (B, KV, T, D).
        boundaries: (segments + 1,), whole numbers, none less than the one before: segments are as
            long as two neighbours are apart, and follow each other from position 0.
        scale: of the scores; None is ``1 / sqrt(D)``.

    Returns:
        (B, H, T, D), in memory (B, T, H, D).

    Raises:
        ValueError: for what ``OP.unsupported`` lists.
        RuntimeError: where the segments do not add up to T.
    """
    reasons = segment_attention_unsupported(q, k, v, boundaries, scale)
    if reasons:
        raise ValueError("; ".join(reasons))
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    if q.shape[1] != k.shape[1]:  # PyTorch's kernel for the CPU takes no groups
        share = q.shape[1] // k.shape[1]
        k, v = (t.unsqueeze(2).expand(-1, -1, share, -1, -1).flatten(1, 2) for t in (k, v))
    with torch.autocast(q.device.type, enabled=False):
        return _SegmentAttention.apply(q, k, v, boundaries, factor)  # type: ignore[no-any-return, no-untyped-call]


# -- OP --------------------------------------------------------------------------------------------
def segment_attention_unsupported(
    q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor, scale: float | None = None
) -> list[str]:
    """Why ``segment_attention`` cannot take these inputs."""
    if q.device.type != "cpu":
        return ["on a GPU, PyTorch's kernel is called for each segment"]
    reasons = on_several_devices(q, k, v, boundaries)
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        reasons.append(f"one floating-point dtype is needed, not {q.dtype}, {k.dtype}, {v.dtype}")
    shapes = tuple(q.shape), tuple(k.shape), tuple(v.shape)
    if q.dim() != 4 or shapes[1] != shapes[2] or _without_heads(q) != _without_heads(k):
        reasons.append(f"{', '.join(map(str, shapes))} are not alike")
    elif q.shape[1] % k.shape[1]:
        reasons.append(f"{q.shape[1]} heads are not a multiple of {k.shape[1]}")
    if boundaries.dim() != 1 or boundaries.dtype not in (torch.int32, torch.int64):
        reasons.append("boundaries are not whole numbers in one row")
    return reasons


def _without_heads(t: Tensor) -> tuple[int, ...]:
    return t.shape[0], *t.shape[2:]


def _example(m: Maker, count: int = 3) -> tuple[Any, ...]:
    s = m.sizes
    q, k, v = (m.heads(n) for n in (s.heads, *[s.heads if count == 3 else s.kv_heads] * 2))
    return q, k, v, _boundaries(m, count), m.sizes.head_dim**-0.5


def _boundaries(m: Maker, count: int) -> Tensor:
    """As many segments of one length as fit, and what is left."""
    length = max(1, m.sizes.seq // count)
    starts = [min(i * length, m.sizes.seq) for i in range(count + 1)]
    return torch.tensor([*starts, m.sizes.seq], dtype=torch.int32, device=m.device)


OP = Op(
    "segment_attention",
    segment_attention_reference,
    segment_attention,
    segment_attention_unsupported,
    saved_outputs=(0,),
    rule="attention",
    example=_example,
    variants={"grouped": lambda m: _example(m, 6)},
)
