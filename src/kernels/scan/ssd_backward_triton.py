"""The backward kernels of ``ssd``: what is one head's own, and what heads share.

The gradient of an exponent is the sum over all pairs of steps between which it lies. It is added up
so, and never as the difference of two larger sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..launcher import launched
from .ssd_tiles_triton import decays, tile, within


@triton.jit
def _products(
    left_ptr, right_ptr, rows, left_row, left_column, right_row, right_column, step, length, width,
    STEPPED: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr,
    Q: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """The products (Q, Q) of a chunk's rows, ``left · rightᵀ``, summed over ``width`` columns.

    With STEPPED, rows of ``right`` are multiplied by ``step``; with LOW, 16 bits stay as they are.
    """
    total = tl.zeros((Q, Q), tl.float32)
    for start in range(0, width, W):
        columns = start + tl.arange(0, W).to(tl.int64)
        left = tile(left_ptr, rows, columns, left_row, left_column, length, width)
        right = tile(right_ptr, rows, columns, right_row, right_column, length, width)
        if not LOW:
            left, right = left.to(tl.float32), right.to(tl.float32)
        if STEPPED:
            right *= step[:, None]
        total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION)
    return total


@triton.jit
def _with_states(
    b_ptr, c_ptr, before_ptr, after_ptr, rows, ps, bl, bn, cl, cn, passed, length, states, features,
    PRECISION: tl.constexpr, Q: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """What the states after a chunk hand to its rows, what these read of those before, (Q, P).

    Third ``passed`` (N,), to which the products of both states are added.
    """
    handed, read = tl.zeros((Q, P), tl.float32), tl.zeros((Q, P), tl.float32)
    for start in range(0, states, N):
        ns = start + tl.arange(0, N).to(tl.int64)
        b = tile(b_ptr, rows, ns, bl, bn, length, states).to(tl.float32)
        after = tile(after_ptr, ns, ps, features, 1, states, features)
        handed = tl.dot(b, after, handed, input_precision=PRECISION)
        c = tile(c_ptr, rows, ns, cl, cn, length, states).to(tl.float32)
        before = tile(before_ptr, ns, ps, features, 1, states, features)
        read = tl.dot(c, before, read, input_precision=PRECISION)
        passed += tl.sum(after * before, 1)
    return handed, read, passed


@launched
@triton.jit
def backward_kernel(
    grad_ptr, x_ptr, step_ptr, sums_ptr, segments_ptr, b_ptr, c_ptr, d_ptr, before_ptr, after_ptr,
    dx_ptr, dexponents_ptr, dstep_ptr, dd_ptr,
    gb, gl, gh, gp, xb, xl, xh, xp, bb, bl, bg, bn, cb, cl, cg, cn,
    length, heads, each, chunks, states, features,
    HAS_D: tl.constexpr, HAS_SEGMENTS: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr,
    Q: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """What is one head's own.

    Writes dx (B, L, H, P), and per step and head, (B, L, H), the gradients of the exponents, those
    of the steps without these, and those of D.
    """
    k = tl.program_id(0) % chunks
    head = (tl.program_id(0) // chunks % heads).to(tl.int64)
    sample = (tl.program_id(0) // chunks // heads).to(tl.int64)
    qs = tl.arange(0, Q)
    rows = k * Q + qs.to(tl.int64)
    grad_ptr += sample * gb + head * gh
    x_ptr += sample * xb + head * xh
    b_ptr += sample * bb + (head // each) * bg
    c_ptr += sample * cb + (head // each) * cg
    before_ptr += ((sample * heads + head) * chunks + k) * states * features
    after_ptr += ((sample * heads + head) * chunks + k) * states * features
    step, into, rest, whole = decays(
        step_ptr, sums_ptr, segments_ptr, sample, head, k, chunks, heads, HAS_SEGMENTS, Q
    )
    scores = _products(
        c_ptr, b_ptr, rows, cl, cn, bl, bn, step, length, states, False, LOW, PRECISION, Q, N
    )  # fmt: skip
    scores *= within(sums_ptr, segments_ptr, sample, head, k, chunks, heads, HAS_SEGMENTS, Q)
    pairs = _products(
        grad_ptr, x_ptr, rows, gl, gp, xl, xp, step, length, features, True, False, PRECISION, Q, P
    )  # fmt: skip
    # exponent t lies between i >= t and j < t
    early = qs[None, :] < qs[:, None]
    pairs = tl.cumsum(pairs * scores, 0, reverse=True)
    dexponents = tl.sum(tl.where(early, pairs, 0.0), 1)
    reads, writes = tl.zeros((Q,), tl.float32), tl.zeros((Q,), tl.float32)
    dstep, dd = tl.zeros((Q,), tl.float32), tl.zeros((Q,), tl.float32)
    passed = tl.zeros((N,), tl.float32)
    skip = 0.0
    if HAS_D:
        skip = tl.load(d_ptr + head).to(tl.float32)
    for start in range(0, features, P):
        ps = start + tl.arange(0, P).to(tl.int64)
        handed, read, passed = _with_states(
            b_ptr, c_ptr, before_ptr, after_ptr, rows, ps, bl, bn, cl, cn, passed, length, states,
            features, PRECISION, Q, N, P,
        )  # fmt: skip
        grad = tile(grad_ptr, rows, ps, gl, gp, length, features).to(tl.float32)
        x = tile(x_ptr, rows, ps, xl, xp, length, features).to(tl.float32)
        handed *= rest[:, None]
        inner = tl.dot(tl.trans(scores), grad, handed, input_precision=PRECISION)
        flat = ((sample * length + rows[:, None]) * heads + head) * features + ps[None, :]
        tl.store(
            dx_ptr + flat, (inner * step[:, None] + grad * skip).to(dx_ptr.dtype.element_ty),
            mask=(rows < length)[:, None] & (ps < features)[None, :],
        )  # fmt: skip
        reads += tl.sum(grad * read, 1)
        writes += tl.sum(handed * x, 1)
        dstep += tl.sum(inner * x, 1)
        dd += tl.sum(grad * x, 1)
    dexponents += tl.sum(tl.where(early, (writes * step)[None, :], 0.0), 1)
    dexponents += tl.sum(tl.where(early, 0.0, (reads * into)[None, :]), 1)
    dexponents += tl.sum(passed, 0) * whole
    flat = (sample * length + rows) * heads + head
    tl.store(dexponents_ptr + flat, dexponents, mask=rows < length)
    tl.store(dstep_ptr + flat, dstep, mask=rows < length)
    tl.store(dd_ptr + flat, dd, mask=rows < length)


@launched
@triton.jit
def shared_kernel(
    grad_ptr, x_ptr, step_ptr, sums_ptr, segments_ptr, other_ptr, states_ptr, out_ptr,
    gb, gl, gh, gp, xb, xl, xh, xp, ob, ol, og, on,
    batch, length, heads, each, chunks, states, features, splits,
    OF_B: tl.constexpr, HEADS: tl.constexpr, HAS_SEGMENTS: tl.constexpr, PRECISION: tl.constexpr,
    Q: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """What HEADS heads of a group add to db (OF_B) or dc, (splits, B, L, G, N).

    ``other`` is c for db and b for dc; ``chunk_states`` are the states after, or before, each
    chunk. Both in one program would need more registers than there are.
    """
    k = tl.program_id(0) % chunks
    split = tl.program_id(0) // chunks % splits
    groups = heads // each
    group = (tl.program_id(0) // chunks // splits % groups).to(tl.int64)
    sample = (tl.program_id(0) // chunks // splits // groups).to(tl.int64)
    ns = (tl.program_id(1) * N + tl.arange(0, N)).to(tl.int64)
    rows = k * Q + tl.arange(0, Q).to(tl.int64)
    total = tl.zeros((Q, Q), tl.float32)
    out = tl.zeros((Q, N), tl.float32)
    for i in range(split * HEADS, tl.minimum(split * HEADS + HEADS, each)):
        head = group * each + i
        place = ((sample * heads + head) * chunks + k) * states * features
        step, into, rest, _ = decays(
            step_ptr, sums_ptr, segments_ptr, sample, head, k, chunks, heads, HAS_SEGMENTS, Q
        )
        pairs = tl.zeros((Q, Q), tl.float32)
        for start in range(0, features, P):
            ps = start + tl.arange(0, P).to(tl.int64)
            grad = tile(grad_ptr + sample * gb + head * gh, rows, ps, gl, gp, length, features)
            grad = grad.to(tl.float32)
            x = tile(x_ptr + sample * xb + head * xh, rows, ps, xl, xp, length, features)
            x = x.to(tl.float32) * step[:, None]
            chunk_states = tl.trans(tile(states_ptr + place, ns, ps, features, 1, states, features))
            if OF_B:
                pairs = tl.dot(x, tl.trans(grad), pairs, input_precision=PRECISION)
                out = tl.dot(x * rest[:, None], chunk_states, out, input_precision=PRECISION)
            else:
                pairs = tl.dot(grad, tl.trans(x), pairs, input_precision=PRECISION)
                out = tl.dot(grad * into[:, None], chunk_states, out, input_precision=PRECISION)
        seen = within(sums_ptr, segments_ptr, sample, head, k, chunks, heads, HAS_SEGMENTS, Q)
        total += pairs * (tl.trans(seen) if OF_B else seen)
    other_ptr += sample * ob + group * og
    other = tile(other_ptr, rows, ns, ol, on, length, states).to(tl.float32)
    out = tl.dot(total, other, out, input_precision=PRECISION)
    inside = (rows < length)[:, None] & (ns < states)[None, :]
    flat = ((split * batch + sample) * length + rows[:, None]) * groups + group
    tl.store(out_ptr + flat * states + ns[None, :], out, mask=inside)
