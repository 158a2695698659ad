"""Triton kernels of state-space duality: one program for a chunk of time of one head.

The steps, and the sums ``s`` of the exponents ``A dt`` from a chunk's beginning, are made by
PyTorch first: one number per step and head. Then

    scan      goes through the chunks, with a tile of a head's state: the states before each chunk,
              or, from the end, the gradients of the states after each chunk
    output    the outputs of a chunk, from its inputs and the state before it
    backward  everything that is one head's own (``ssd_backward_triton.py``)
    shared    the gradients of B and C, over a few of the heads that share them; what each such
              program finds is written once and added up afterwards, always in one order

The states are made again in backward. The sums are fp64, because only their differences count.
Matrix products are of fp32, but for that of B and C, which is as exact in their own dtype.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ..aot import AotCase
from ..launch import (
    FP_FUSION,
    cdiv,
    dot_precision,
    gpu_of,
    next_power_of_2,
    wide_dot_precision,
)
from ..launcher import launched
from . import ssd_chunks
from .ssd_backward_triton import backward_kernel, shared_kernel
from .ssd_tiles_triton import decays, tile, within

CHUNK = 64
"""Steps of time in a chunk."""

HEADS = 8
"""Heads that one program adds up."""

SCAN = OUTPUT = {"N": 32, "P": 32}
BACKWARD = SHARED = {"N": 32, "P": 16}
SHARED_SMALL = {"N": 16, "P": 16}
"""States and features of the largest tile. Products in fp32 proper keep their operands in
registers: wider tiles, or fewer warps, spill them."""

WARPS = 8


@launched
@triton.jit
def scan_kernel(
    left_ptr, right_ptr, step_ptr, sums_ptr, segments_ptr, out_ptr,
    lb, ll, lg, ln, rb, rl, rh, rp,
    length, heads, each, chunks, states, features,
    REVERSE: tl.constexpr, HAS_SEGMENTS: tl.constexpr, PRECISION: tl.constexpr,
    Q: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """States (B, H, K, N, P).

    Those before each chunk, from B and x; in reverse, from C and the gradient of the outputs, the
    gradients of those after each chunk.
    """
    head = (tl.program_id(0) % heads).to(tl.int64)
    sample = (tl.program_id(0) // heads).to(tl.int64)
    ns = (tl.program_id(1) * N + tl.arange(0, N)).to(tl.int64)
    ps = (tl.program_id(2) * P + tl.arange(0, P)).to(tl.int64)
    qs = tl.arange(0, Q).to(tl.int64)
    inside = (ns < states)[:, None] & (ps < features)[None, :]
    left_ptr += sample * lb + (head // each) * lg
    right_ptr += sample * rb + head * rh
    h = tl.zeros((N, P), tl.float32)
    for i in range(0, chunks):
        k = i
        if REVERSE:
            k = chunks - 1 - i
        place = ((sample * heads + head) * chunks + k) * states
        tl.store(out_ptr + (place + ns[:, None]) * features + ps[None, :], h, mask=inside)
        rows = k * Q + qs
        left = tile(left_ptr, rows, ns, ll, ln, length, states).to(tl.float32)
        right = tile(right_ptr, rows, ps, rl, rp, length, features).to(tl.float32)
        step, into, rest, whole = decays(
            step_ptr, sums_ptr, segments_ptr, sample, head, k, chunks, heads, HAS_SEGMENTS, Q
        )
        factor = step * rest
        if REVERSE:
            factor = into
        h = tl.dot(
            tl.trans(left), right * factor[:, None], h * whole, input_precision=PRECISION
        )  # fmt: skip


@launched
@triton.jit
def output_kernel(
    x_ptr, step_ptr, sums_ptr, segments_ptr, b_ptr, c_ptr, d_ptr, before_ptr, out_ptr,
    xb, xl, xh, xp, bb, bl, bg, bn, cb, cl, cg, cn,
    length, heads, each, chunks, states, features,
    HAS_D: tl.constexpr, HAS_SEGMENTS: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr,
    Q: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Outputs (B, L, H, P), contiguous."""
    k = tl.program_id(0) % chunks
    head = (tl.program_id(0) // chunks % heads).to(tl.int64)
    sample = (tl.program_id(0) // chunks // heads).to(tl.int64)
    ps = (tl.program_id(1) * P + tl.arange(0, P)).to(tl.int64)
    qs = tl.arange(0, Q).to(tl.int64)
    rows = k * Q + qs
    b_ptr += sample * bb + (head // each) * bg
    c_ptr += sample * cb + (head // each) * cg
    before_ptr += ((sample * heads + head) * chunks + k) * states * features
    scores, y = tl.zeros((Q, Q), tl.float32), tl.zeros((Q, P), tl.float32)
    for start in range(0, states, N):
        ns = start + tl.arange(0, N).to(tl.int64)
        b = tile(b_ptr, rows, ns, bl, bn, length, states)
        c = tile(c_ptr, rows, ns, cl, cn, length, states)
        if not LOW:
            b, c = b.to(tl.float32), c.to(tl.float32)
        scores = tl.dot(c, tl.trans(b), scores, input_precision=PRECISION)
        before = tile(before_ptr, ns, ps, features, 1, states, features)
        y = tl.dot(c.to(tl.float32), before, y, input_precision=PRECISION)
    step, into, _, _ = decays(
        step_ptr, sums_ptr, segments_ptr, sample, head, k, chunks, heads, HAS_SEGMENTS, Q
    )
    scores *= within(sums_ptr, segments_ptr, sample, head, k, chunks, heads, HAS_SEGMENTS, Q)
    x = tile(x_ptr + sample * xb + head * xh, rows, ps, xl, xp, length, features).to(tl.float32)
    y = tl.dot(scores, x * step[:, None], y * into[:, None], input_precision=PRECISION)
    if HAS_D:
        y += x * tl.load(d_ptr + head).to(tl.float32)
    place = out_ptr + ((sample * length + rows[:, None]) * heads + head) * features + ps[None, :]
    tl.store(place, y, mask=(rows < length)[:, None] & (ps < features)[None, :])


def _config(most: dict[str, int], states: int, features: int) -> dict[str, int]:
    n, p = (max(16, next_power_of_2(size)) for size in (states, features))
    return {"Q": CHUNK, "N": min(n, most["N"]), "P": min(p, most["P"])}


def _low(b: Tensor, c: Tensor) -> bool:
    """Whether B and C may be multiplied as they are: their products are exact in fp32."""
    return b.dtype is c.dtype and b.dtype in (torch.float16, torch.bfloat16)


def _strides(*tensors: Tensor) -> list[int]:
    return [s for t in tensors for s in t.stride()]


class _Sizes:
    """What the kernels are told of the inputs, and the steps, as whole chunks.

    Attributes:
        step: (B, K Q, H), zero beyond the end.
        sums: (B, K, Q, H), fp64: the sums of the exponents of 2 from a chunk's beginning.
        segments: (B, K Q), where the segment of each position begins; unread if there are none.
        scalars: the length, heads, heads of a group, chunks, states and features.
        precision: of the products of tiles.
    """

    def __init__(
        self, x: Tensor, step: Tensor, a: Tensor, b: Tensor, segments: Tensor | None
    ) -> None:
        self.batch, length, heads, features = x.shape
        self.step = F.pad(step, (0, 0, 0, -length % CHUNK)).contiguous()
        cut = (self.batch, self.step.shape[1] // CHUNK, CHUNK, heads)
        self.sums = (self.step * a.to(step.dtype)).view(cut).cumsum(2, dtype=torch.float64)
        self.sums.mul_(math.log2(math.e))
        self.has_segments, self.segments = segments is not None, self.step
        if segments is not None:
            self.segments = F.pad(segments, (0, -length % CHUNK)).contiguous()
        groups, states = b.shape[2:]
        self.each, self.chunks = heads // groups, cut[1]
        self.states, self.features = states, features
        self.scalars = (length, heads, self.each, cut[1], states, features)
        self.precision = wide_dot_precision(x, b)


def _scan(left: Tensor, right: Tensor, of: _Sizes, reverse: bool) -> Tensor:
    """See ``scan_kernel``."""
    rows = of.batch * right.shape[2]
    out = of.step.new_empty(rows, of.chunks, of.states, of.features)
    config = _config(SCAN, of.states, of.features)
    grid = rows, cdiv(of.states, config["N"]), cdiv(of.features, config["P"])
    scan_kernel[grid](
        left, right, of.step, of.sums, of.segments, out, *_strides(left, right), *of.scalars,
        REVERSE=reverse, HAS_SEGMENTS=of.has_segments, PRECISION=of.precision, **config,
        num_warps=WARPS,
        enable_fp_fusion=FP_FUSION,
    )  # fmt: skip
    return out


def forward(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, bias: Tensor | None,
    softplus: bool, low: float, high: float, segments: Tensor | None,
) -> Tensor:  # fmt: skip
    """See ``kernels.ssd``."""
    out = x.new_empty(x.shape, dtype=torch.float32)
    if not out.numel():
        return out
    step, _ = ssd_chunks.steps(dt, bias, softplus, low, high)
    of = _Sizes(x, step, a, b, segments)
    before = _scan(b, x, of, reverse=False)
    config = _config(OUTPUT, of.states, of.features)
    grid = of.batch * x.shape[2] * of.chunks, cdiv(of.features, config["P"])
    output_kernel[grid](
        x, of.step, of.sums, of.segments, b, c, x if d is None else d.contiguous(), before, out,
        *_strides(x, b, c), *of.scalars,
        HAS_D=d is not None, HAS_SEGMENTS=of.has_segments, LOW=_low(b, c),
        PRECISION=of.precision, **config, num_warps=WARPS,
        enable_fp_fusion=FP_FUSION,
    )  # fmt: skip
    return out


def _shared(
    grad: Tensor, x: Tensor, b: Tensor, c: Tensor, before: Tensor, after: Tensor, of: _Sizes
) -> tuple[Tensor, Tensor]:
    splits = cdiv(of.each, HEADS)
    strong = gpu_of(x).multiplies_from_shared
    config = _config(SHARED if strong else SHARED_SMALL, of.states, of.features)
    grid = of.batch * b.shape[2] * splits * of.chunks, cdiv(of.states, config["N"])
    # this one holds too much to split its operands in registers, too
    precision = of.precision if strong else dot_precision(torch.float32)
    grads = []
    for of_b, other, chunk_states in ((True, c, after), (False, b, before)):
        out = of.step.new_empty(splits, *b.shape)
        shared_kernel[grid](
            grad, x, of.step, of.sums, of.segments, other, chunk_states, out,
            *_strides(grad, x, other), of.batch, *of.scalars, splits,
            OF_B=of_b, HEADS=HEADS, HAS_SEGMENTS=of.has_segments, PRECISION=precision, **config,
            num_warps=WARPS,
            enable_fp_fusion=FP_FUSION,
        )  # fmt: skip
        grads.append(out.sum(0))
    return grads[0].to(b.dtype), grads[1].to(c.dtype)


def _per_head(
    grad: Tensor, x: Tensor, b: Tensor, c: Tensor, d: Tensor | None, before: Tensor, after: Tensor,
    of: _Sizes,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradient of x, and the three others of ``backward_kernel``: (3, B, L, H)."""
    dx, rest = x.new_empty(x.shape), of.step.new_empty(3, *x.shape[:3])
    config = _config(BACKWARD, of.states, of.features)
    backward_kernel[(of.batch * x.shape[2] * of.chunks,)](
        grad, x, of.step, of.sums, of.segments, b, c, x if d is None else d.contiguous(),
        before, after, dx, *rest, *_strides(grad, x, b, c), *of.scalars,
        HAS_D=d is not None, HAS_SEGMENTS=of.has_segments, LOW=_low(b, c),
        PRECISION=of.precision, **config, num_warps=WARPS,
        enable_fp_fusion=FP_FUSION,
    )  # fmt: skip
    return dx, rest


def backward(
    grad: Tensor, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None,
    bias: Tensor | None, softplus: bool, low: float, high: float, segments: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    """The gradients that are needed of (x, dt, a, b, c, d, bias)."""
    tensors = (x, dt, a, b, c, d, bias)
    if not x.numel():
        return [torch.zeros_like(t) for t, needed in zip(tensors, needs, strict=True) if needed]
    step, slope = ssd_chunks.steps(dt, bias, softplus, low, high)
    of = _Sizes(x, step, a, b, segments)
    before, after = _scan(b, x, of, reverse=False), _scan(c, grad, of, reverse=True)
    every: list[Tensor | None] = [None] * 7
    if needs[3] or needs[4]:
        every[3:5] = _shared(grad, x, b, c, before, after, of)
    if any(needs[i] for i in (0, 1, 2, 5, 6)):
        every[0], (dexponents, dstep, dd) = _per_head(grad, x, b, c, d, before, after, of)
        every[1] = every_step = (dexponents * a.to(step.dtype) + dstep) * slope
        every[2] = (dexponents * step).sum((0, 1), dtype=torch.float64)
        every[5] = dd.sum((0, 1), dtype=torch.float64)
        every[6] = every_step.sum((0, 1), dtype=torch.float64)
    pairs = zip(every, tensors, needs, strict=True)
    return [g.to(t.dtype) for g, t, needed in pairs if needed and g is not None and t is not None]


def _cases() -> tuple[AotCase, ...]:
    """Both kinds of arithmetic, and both ends of the sizes; the dtypes that B and C may have."""
    kernels = (
        ("scan", scan_kernel, SCAN), ("output", output_kernel, OUTPUT),
        ("backward", backward_kernel, BACKWARD), ("shared", shared_kernel, SHARED),
    )  # fmt: skip
    cases = []
    for dtype, size, precision in (
        ("bf16", 128, "tf32x3"), ("fp16", 128, "tf32x3"), ("fp32", 128, "ieee"),
        ("fp32", 16, "tf32"),
    ):  # fmt: skip
        for name, kernel, most in kernels:
            dtypes = dict.fromkeys(("x_ptr", "b_ptr", "c_ptr", "dx_ptr", "other_ptr"), dtype)
            right = "fp32" if precision != "ieee" else dtype  # in reverse, a gradient
            dtypes |= {"left_ptr": dtype, "right_ptr": right}
            dtypes |= {"sums_ptr": "fp64", "segments_ptr": "i32"}
            constants = {
                **_config(most, size, size), "PRECISION": precision, "HEADS": HEADS,
                "OF_B": size > 16,
                "HAS_D": size > 16, "HAS_SEGMENTS": size > 16, "LOW": dtype != "fp32",
                "REVERSE": precision != "ieee",
                # unit strides, as they usually are
                **dict.fromkeys(("ln", "rp", "gp", "xp", "bn", "cn", "on"), 1),
            }  # fmt: skip
            constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
            signature = {
                argument: "*" + dtypes.get(argument, "fp32") if argument.endswith("_ptr")
                else "i64" if len(argument) == 2 else "i32"
                for argument in kernel.arg_names if argument not in constants
            }  # fmt: skip
            cases.append(
                AotCase(
                    f"ssd_{name}_{dtype}_{size}", kernel, signature, constants,
                    num_warps=WARPS, num_stages=3,
                )
            )  # fmt: skip
    return tuple(cases)


AOT = _cases()
