"""The row kernels of ``linear_logprob``: statistics of logits, and their gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from ..aot import AotCase
from ..launcher import launched
from .linear_cross_entropy_triton import capped_logits, capped_logits_and_slope


@launched
@triton.jit(do_not_specialize=["first", "rows"])
def statistics_kernel(
    logits, targets, scale, found, classes, kept, first, rows, vocabulary, room, softcap,
    temperature, SOFTCAP: tl.constexpr, TARGETS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One row per program: everything that one pass over it can find.

    With ``m`` the running maximum, ``Σ exp(l - m)``, ``Σ exp(l - m)²`` and ``Σ (l - m)·exp(l - m)``
    are rescaled whenever it rises; from these, relative to the maximum, nothing cancels.
    """
    row = tl.program_id(0)
    if row >= tl.load(kept) - first:
        return
    logits += row.to(tl.int64) * room
    factor = tl.load(scale)
    peak = float("-inf")
    best = 0
    mass = 0.0
    square = 0.0
    moment = 0.0
    total = 0.0
    for start in range(0, vocabulary, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        inside = v < vocabulary
        value = capped_logits(logits + v, v < room, inside, softcap, factor, SOFTCAP) / temperature
        top = tl.max(value, 0)
        where = tl.min(tl.where(value == top, v, vocabulary), 0)
        best = tl.where(top > peak, where, best)
        higher = tl.maximum(peak, top)
        drop = tl.where(start == 0, 0.0, peak - higher)
        shrink = tl.exp(drop)
        rest = tl.where(inside, value - higher, 0.0)
        e = tl.where(inside, tl.exp(rest), 0.0)
        moment = (moment + drop * mass) * shrink + tl.sum(rest * e, 0)
        mass = mass * shrink + tl.sum(e, 0)
        square = square * shrink * shrink + tl.sum(e * e, 0)
        total += tl.sum(tl.where(inside, value, 0.0), 0)
        peak = higher
    spread = tl.log(mass)
    if TARGETS:
        target = tl.load(targets + row)
        known = (target >= 0) & (target < vocabulary)
        own = capped_logits(logits + target, known, known, softcap, factor, SOFTCAP) / temperature
        tl.store(found + row, tl.where(known, own - peak - spread, float("nan")))
    tl.store(found + rows + row, spread - moment / mass)
    tl.store(found + 2 * rows + row, square / (mass * mass))
    tl.store(found + 3 * rows + row, total / vocabulary)
    tl.store(found + 4 * rows + row, peak + spread)
    tl.store(classes + row, best.to(tl.int64))


@launched
@triton.jit(do_not_specialize=["first", "rows"])
def slope_kernel(
    logits, out, targets, scale, found, weights, dfactor, kept, first, rows, vocabulary, room,
    softcap, temperature, SOFTCAP: tl.constexpr, TARGETS: tl.constexpr, RESCALE: tl.constexpr,
    CLEAR: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One row per program: ``p·(a + b·log p + c·p) + d + g·[v = y]`` as gradient of its logits.

    Args:
        logits: (R, room), the projection's.
        out: (R, room), the gradient; may be ``logits``.
        targets: (R,), read with TARGETS.
        scale: factor on the logits.
        found: (5, R), from ``statistics_kernel``.
        weights: (5, R), the rows' a, b, c, d and g.
        dfactor: (R,), gets the gradient of ``scale`` with RESCALE, and ``out`` is multiplied by it.
        kept: how many rows count.
        first: which of them is row 0.
        rows: R.
        vocabulary: number of classes.
        room: that, rounded up.
        softcap: bound of the logits.
        temperature: what the final logits are divided by.
        SOFTCAP: whether there is a bound.
        TARGETS: whether targets have a gradient of their own.
        RESCALE: whether the factor's gradient is wanted, and the factor not yet in the weights.
        CLEAR: whether rows that do not count get a gradient of zero, or keep what they have.
        BLOCK_V: classes at a time.
    """
    row = tl.program_id(0)
    logits += row.to(tl.int64) * room
    out += row.to(tl.int64) * room
    if row >= tl.load(kept) - first:
        if CLEAR:
            for start in range(0, vocabulary, BLOCK_V):
                v = start + tl.arange(0, BLOCK_V)
                tl.store(out + v, tl.zeros_like(v).to(out.dtype.element_ty), mask=v < room)
        return
    factor = tl.load(scale)
    lse = tl.load(found + 4 * rows + row)
    a = tl.load(weights + row)
    b = tl.load(weights + rows + row)
    c = tl.load(weights + 2 * rows + row)
    d = tl.load(weights + 3 * rows + row)
    g = 0.0
    target = tl.full((), -1, tl.int64)
    if TARGETS:
        g = tl.load(weights + 4 * rows + row)
        target = tl.load(targets + row)
    of_factor = 0.0
    for start in range(0, vocabulary, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        inside = v < vocabulary
        value, slope = capped_logits_and_slope(
            logits + v, v < room, inside, softcap, factor, SOFTCAP
        )
        logp = tl.where(inside, value / temperature - lse, 0.0)
        p = tl.exp(logp)
        grad = p * (a + b * logp + c * p) + d
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


def row_config(vocabulary: int) -> dict[str, int]:
    """How both kernels are launched: one access of 128 bits for each thread, in 16 bits."""
    wide = vocabulary > 1024
    return {"BLOCK_V": 2048 if wide else 1024, "num_warps": 8 if wide else 4}


def _aot(dtype: str, vocabulary: int, softcap: bool, rescale: bool | None) -> AotCase:
    """A case of ``statistics_kernel``, or with ``rescale`` of ``slope_kernel``."""
    config = row_config(vocabulary)
    kernel = statistics_kernel if rescale is None else slope_kernel
    pointers = {
        "logits": f"*{dtype}", "out": f"*{dtype}", "targets": "*i64", "scale": "*fp32",
        "found": "*fp32", "classes": "*i64", "weights": "*fp32", "dfactor": "*fp32", "kept": "*i32",
    }  # fmt: skip
    numbers = dict.fromkeys(("first", "rows", "vocabulary", "room"), "i32")
    numbers |= dict.fromkeys(("softcap", "temperature"), "fp32")
    constants = {"SOFTCAP": softcap, "TARGETS": True, "BLOCK_V": config["BLOCK_V"]}
    names = kernel.arg_names
    return AotCase(
        name=f"{kernel.__name__}-{dtype}-{config['BLOCK_V']}-softcap{softcap:d}-{rescale}",
        kernel=kernel,
        signature={k: v for k, v in (pointers | numbers).items() if k in names},
        constants=constants | ({} if rescale is None else {"RESCALE": rescale, "CLEAR": rescale}),
        num_warps=config["num_warps"],
    )


AOT = (
    _aot("bf16", 49152, True, None),
    _aot("fp32", 256, False, None),
    _aot("bf16", 49152, True, True),
    _aot("fp16", 49152, False, False),
    _aot("fp32", 256, False, True),
)
