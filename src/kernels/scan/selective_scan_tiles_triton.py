"""What the kernels of the selective scan load, and the scans of a chunk in their backward pass."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def combine(a1, b1, a2, b2):
    """Two maps h -> a h + b, one after the other."""
    return a1 * a2, a2 * b1 + b2


@triton.jit
def step(raw, inside, SOFTPLUS: tl.constexpr):
    """The step and its derivative by what it is made of; zero outside."""
    slope = tl.full(raw.shape, 1.0, tl.float32)
    dt = raw
    if SOFTPLUS:
        large = raw > 20.0
        power = tl.exp(tl.where(large, 0.0, raw))
        rounded = 1.0 + power  # log1p, with the rounding of the sum made good
        exact = tl.log(rounded) * (power / tl.where(rounded == 1.0, 1.0, rounded - 1.0))
        dt = tl.where(large, raw, tl.where(rounded == 1.0, power, exact))
        slope = tl.where(large, 1.0, power / (1.0 + power))
    return tl.where(inside, dt, 0.0), slope


@triton.jit
def tile(ptr, rows, columns, row_stride, column_stride, mask):
    """A matrix in fp32, zero where it is masked."""
    place = ptr + rows[:, None] * row_stride + columns[None, :] * column_stride
    return tl.load(place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def vector(ptr, places, mask, PRESENT: tl.constexpr):
    """A vector in fp32, zero where it is masked, or all of it where it is not given."""
    values = tl.zeros(places.shape, tl.float32)
    if PRESENT:
        values += tl.load(ptr + places, mask=mask, other=0.0).to(tl.float32)
    return values


@triton.jit
def decays(dt, a, segments_ptr, rows, inside, HAS_SEGMENTS: tl.constexpr):
    """``exp(dt a)``, (T, D, N), and zero where a segment begins."""
    values = tl.exp(dt[:, :, None] * a[None, :, :])
    if HAS_SEGMENTS:
        begins = tl.load(segments_ptr + rows, mask=inside, other=-2) == rows
        values = tl.where(begins[:, None, None], 0.0, values)
    return values


@triton.jit
def states_before(
    u_ptr, delta_ptr, b_ptr, segments_ptr, ul, ud, tt, td, bl, bn, rows, rm, ds, ns, td_mask,
    tn_mask, bias, a, start, SOFTPLUS: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
):  # fmt: skip
    """The states after the step before each of a chunk: a scan of the steps before, too."""
    is_early = tl.arange(0, rows.shape[0]) > 0
    early = is_early[:, None]
    mask = td_mask & early
    x = tile(u_ptr - ul, rows, ds, ul, ud, mask)
    raw = tile(delta_ptr - tt, rows, ds, tt, td, mask) + bias[None, :]
    dt, _ = step(raw, mask, SOFTPLUS)
    b = tile(b_ptr - bl, rows, ns, bl, bn, tn_mask & early)
    decay = decays(dt, a, segments_ptr, rows - 1, rm & is_early, HAS_SEGMENTS)
    drive = (dt * x)[:, :, None] * b[:, None, :]
    total, local = tl.associative_scan((decay, drive), 0, combine)
    return local + total * start[None, :, :]


@triton.jit
def gradients_of_states(
    delta_ptr, segments_ptr, tt, td, rows, ds, dm, length, bias, a, rise, after,
    SOFTPLUS: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
):  # fmt: skip
    """The gradients of a chunk's states, (T, D, N).

    ``rise`` is what outputs add to them, ``after`` (D, N) what the chunk after it does.
    """
    T: tl.constexpr = rows.shape[0]
    steps = tl.arange(0, T)
    mask = (rows + 1 < length)[:, None] & dm[None, :] & (steps < T - 1)[:, None]
    raw = tile(delta_ptr + tt, rows, ds, tt, td, mask) + bias[None, :]
    dt, _ = step(raw, mask, SOFTPLUS)
    rise += tl.where((steps == T - 1)[:, None, None], after[None, :, :], 0.0)
    decay = decays(dt, a, segments_ptr, rows + 1, rows + 1 < length, HAS_SEGMENTS)
    _, grads = tl.associative_scan((decay, rise), 0, combine, reverse=True)
    return grads
