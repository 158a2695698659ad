"""The row kernel of the head op: statistics of logits, and their gradient."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tanh(u):
    """Hyperbolic tangent to fp32's precision, also where ``1 - 2/(exp(2u) + 1)`` cancels.

    Near 1 it is rounded once: its slope is the difference to 1, where each rounding counts.
    """
    s = u * u
    tail = -0.0539682540 + s * 0.0218694885
    small = u * (1.0 + s * (-0.3333333333 + s * (0.1333333333 + s * tail)))
    t = tl.exp(-2.0 * tl.abs(u))
    large = tl.where(s < 1.0, (1.0 - t) / (1.0 + t), 1.0 - 2.0 * t / (1.0 + t))
    return tl.where(s < 0.09, small, tl.where(u < 0.0, -large, large))


@triton.jit
def _logits_and_slope(
    pointers, there, inside, scale, softcap, temperature, SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
):  # fmt: skip
    """Final logits, rounded where the model rounds, and the derivative of the cap.

    Logits are minus infinity outside. Pointers that are ``there`` are read: whole vectors, which
    may go past the last class. The derivative is made of the tanh: where that is near 1, the
    rounding of its product would be too much.
    """
    raw = tl.load(pointers, mask=there, other=0.0)
    value = (raw.to(tl.float32) * scale).to(raw.dtype).to(tl.float32)
    slope = tl.full(value.shape, 1.0, tl.float32)
    if SOFTCAP:
        share = (value / softcap).to(raw.dtype).to(tl.float32)
        share = _tanh(share).to(raw.dtype).to(tl.float32)
        slope = 1.0 - share * share
        value = (softcap * share).to(raw.dtype).to(tl.float32)
    if TEMPERATURE:
        value = value / temperature
    return tl.where(inside, value, float("-inf")), slope


@triton.jit(do_not_specialize=["first", "rows", "stride_row"])
def rows_kernel(
    logits, out, targets, scale, found, classes, upstream, dfactor, kept, first, rows, vocabulary,
    room, stride_output, stride_row, softcap, temperature, SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr, TARGETS: tl.constexpr, MOMENTS: tl.constexpr,
    STATISTICS: tl.constexpr, GRADIENT: tl.constexpr, RESCALE: tl.constexpr, CLEAR: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One row per program: statistics in one pass, and in another the gradient of its logits.

    With ``m`` the running maximum, ``Σ exp(l - m)``, ``Σ exp(l - m)²`` and ``Σ (l - m)·exp(l - m)``
    are rescaled whenever it rises (Milakov & Gimelshein 2018); from these, relative to the maximum,
    nothing cancels. The gradient is ``p·(a + b·log p + c·p) + d + g·[v = y]``.

    Args:
        logits: (R, room), of the projection.
        out: (R, room), the gradient; may be ``logits``.
        targets: (R,), read with TARGETS.
        scale: factor on the logits.
        found: (6, R), statistics, in the order of ``head_triton.COLUMNS``.
        classes: (R,), of the highest logits.
        upstream: (6, R), the upstream gradients of the statistics.
        dfactor: (R,), gets the gradient of ``scale`` with RESCALE, and ``out`` is multiplied by it.
        kept: the number of rows that count.
        first: the place of row 0 among them.
        rows: R.
        vocabulary: number of classes.
        room: that, rounded up.
        stride_output: between rows of ``upstream``.
        stride_row: between its columns; 0 for constants.
        softcap: bound of the logits.
        temperature: divisor of the final logits.
        SOFTCAP: True if there is a bound.
        TEMPERATURE: True if there is a divisor.
        TARGETS: True if there are targets.
        MOMENTS: True if entropy, Σp² and the class are needed.
        STATISTICS: True if ``found`` is to be computed, else it is read.
        GRADIENT: True if ``out`` is to be computed.
        RESCALE: True if the factor's gradient is wanted, and the factor not yet in ``upstream``.
        CLEAR: True if rows that do not count get a gradient of zero, else they stay.
        BLOCK_V: classes at a time.
    """
    row = tl.program_id(0)
    logits += row.to(tl.int64) * room
    if GRADIENT:
        out += row.to(tl.int64) * room
    if row >= tl.load(kept) - first:
        if CLEAR:
            for start in range(0, vocabulary, BLOCK_V):
                v = start + tl.arange(0, BLOCK_V)
                tl.store(out + v, tl.zeros_like(v).to(out.dtype.element_ty), mask=v < room)
        return
    factor = tl.load(scale)
    found += row
    entropy = 0.0
    square = 0.0
    target = tl.full((), -1, tl.int64)
    if TARGETS:
        target = tl.load(targets + row)
    if STATISTICS:
        peak = float("-inf")
        best = 0
        mass = 0.0
        moment = 0.0
        total = 0.0
        for start in range(0, vocabulary, BLOCK_V):
            v = start + tl.arange(0, BLOCK_V)
            inside = v < vocabulary
            value, _ = _logits_and_slope(
                logits + v, v < room, inside, factor, softcap, temperature, SOFTCAP, TEMPERATURE
            )
            top = tl.max(value, 0)
            higher = tl.maximum(peak, top)
            drop = tl.where(start == 0, 0.0, peak - higher)
            shrink = tl.exp(drop)
            rest = tl.where(inside, value - higher, 0.0)
            e = tl.where(inside, tl.exp(rest), 0.0)
            if MOMENTS:
                where = tl.min(tl.where(value == top, v, vocabulary), 0)
                best = tl.where(top > peak, where, best)
                moment = (moment + drop * mass) * shrink + tl.sum(rest * e, 0)
                square = square * shrink * shrink + tl.sum(e * e, 0)
            mass = mass * shrink + tl.sum(e, 0)
            total += tl.sum(tl.where(inside, value, 0.0), 0)
            peak = higher
        spread = tl.log(mass)
        lse = peak + spread
        if TARGETS:
            known = (target >= 0) & (target < vocabulary)
            own, _ = _logits_and_slope(
                logits + target, known, known, factor, softcap, temperature, SOFTCAP, TEMPERATURE
            )
            own = tl.where(known, own, float("nan"))
            tl.store(found, own - peak - spread)
            tl.store(found + 5 * rows, own)
        if MOMENTS:
            entropy = spread - moment / mass
            square = square / (mass * mass)
            tl.store(found + rows, entropy)
            tl.store(found + 2 * rows, square)
            tl.store(classes + row, best.to(tl.int64))
        tl.store(found + 3 * rows, total / vocabulary)
        tl.store(found + 4 * rows, lse)
    else:
        entropy = tl.load(found + rows)
        square = tl.load(found + 2 * rows)
        lse = tl.load(found + 4 * rows)
    if GRADIENT:
        upstream += row * stride_row
        of_target = tl.load(upstream)
        of_entropy = tl.load(upstream + stride_output)
        c = 2.0 * tl.load(upstream + 2 * stride_output)
        d = tl.load(upstream + 3 * stride_output) / vocabulary
        a = tl.load(upstream + 4 * stride_output) - of_target - of_entropy * entropy - c * square
        g = of_target + tl.load(upstream + 5 * stride_output)
        of_factor = 0.0
        tl.debug_barrier()  # the target's logit has been read before it is overwritten
        for start in range(0, vocabulary, BLOCK_V):
            v = start + tl.arange(0, BLOCK_V)
            inside = v < vocabulary
            value, slope = _logits_and_slope(
                logits + v, v < room, inside, factor, softcap, temperature, SOFTCAP, TEMPERATURE
            )
            logp = tl.where(inside, value - lse, 0.0)
            p = tl.exp(logp)
            grad = p * (a - of_entropy * logp + c * p) + d
            grad = tl.where(v == target, grad + g, grad)
            if SOFTCAP:
                grad *= slope
            if RESCALE:
                raw = tl.load(logits + v, mask=v < room, other=0.0).to(tl.float32)
                of_factor += tl.sum(tl.where(inside, grad * raw, 0.0), 0)
                grad *= factor
            grad = tl.where(inside, grad, 0.0)
            tl.store(out + v, grad.to(out.dtype.element_ty), mask=v < room)
        if RESCALE:
            tl.store(dfactor + row, of_factor)


def row_config(vocabulary: int, moments: bool) -> dict[str, int]:
    """Launch options: one or two accesses of 128 bits for each thread, in 16 bits."""
    if vocabulary <= 1024:
        return {"BLOCK_V": 1024, "num_warps": 4}
    return {"BLOCK_V": 2048 if moments else 4096, "num_warps": 8}
