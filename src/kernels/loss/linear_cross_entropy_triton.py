"""Triton twin of ``kernels/loss/linear_cross_entropy_tiles.py``: tiles of rows, nothing read back.

How many rows count is known on the device, and asking would stall the stream. So the rows that
count are sorted to the front, and each program compares its rows with the count in device memory.

Where the labels have come to the host before (``label_counts``), as many rows as count there are
multiplied by the library. Past those every tile is launched, and its programs return at once unless
there are rows that count: these matmuls are kernels of our own
(``linear_cross_entropy_matmul_triton.py``), for a library's cannot stop at a number that the host
does not know.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aot import AotCase
from ..label_counts import expected
from ..launch import FP_FUSION, Gpu, gpu_of
from ..launcher import launched
from ..matmul import mm
from .head_tiles import (
    GPU_TILE_BYTES,
    accumulate_update,
    add_update,
    empty_updates,
    project,
    project_update_back,
)
from .linear_cross_entropy_matmul_triton import bounded_product, logits_tile

TILE_BYTES = 128 << 20
"""What one tile of logits takes; at 128k classes in bf16 that is 512 rows."""

LARGE_TILE_BYTES = GPU_TILE_BYTES
"""The same where the library multiplies, which wants more rows, beside a head of 1 GB or more."""


@triton.jit
def _tanh(u):
    """Hyperbolic tangent to fp32's precision, also where ``1 - 2/(exp(2u) + 1)`` cancels.

    Near 1 it is rounded once: its slope is what is left to 1, where each rounding counts.
    """
    s = u * u
    tail = -0.0539682540 + s * 0.0218694885
    small = u * (1.0 + s * (-0.3333333333 + s * (0.1333333333 + s * tail)))
    t = tl.exp(-2.0 * tl.abs(u))
    large = tl.where(s < 1.0, (1.0 - t) / (1.0 + t), 1.0 - 2.0 * t / (1.0 + t))
    return tl.where(s < 0.09, small, tl.where(u < 0.0, -large, large))


@triton.jit
def capped_logits_and_slope(pointers, there, inside, softcap, scale, SOFTCAP: tl.constexpr):
    """Scaled and capped logits, rounded where the model rounds, and the derivative of the cap.

    Logits are minus infinity outside. What is ``there`` is read: whole vectors, which may go past
    the last class. The derivative is made of the tanh: where that is near 1, the rounding of what
    it is multiplied to would be too much.
    """
    raw = tl.load(pointers, mask=there, other=0.0)
    value = (raw.to(tl.float32) * scale).to(raw.dtype).to(tl.float32)
    slope = tl.full(value.shape, 1.0, tl.float32)
    if SOFTCAP:
        share = (value / softcap).to(raw.dtype).to(tl.float32)
        share = _tanh(share).to(raw.dtype).to(tl.float32)
        slope = 1.0 - share * share
        value = (softcap * share).to(raw.dtype).to(tl.float32)
    return tl.where(inside, value, float("-inf")), slope


@triton.jit
def capped_logits(pointers, there, inside, softcap, scale, SOFTCAP: tl.constexpr):
    """The logits of ``capped_logits_and_slope`` alone."""
    value, _ = capped_logits_and_slope(pointers, there, inside, softcap, scale, SOFTCAP)
    return value


@launched
@triton.jit(do_not_specialize=["first"])
def loss_kernel(
    logits, labels, losses, kept, first, vocabulary, room, smoothing, softcap, scale,
    SOFTCAP: tl.constexpr, GRADIENT: tl.constexpr, CLEAR: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One row per program: its loss, and its logits replaced by their gradient (over scale).

    The maximum and the sum of exponentials are found in one pass (Milakov & Gimelshein 2018). Rows
    that do not count are left as they are, or with CLEAR have a gradient of zero.
    """
    row = tl.program_id(0)
    logits += row.to(tl.int64) * room
    if row >= tl.load(kept) - first:
        if CLEAR:
            for start in range(0, vocabulary, BLOCK_V):
                v = start + tl.arange(0, BLOCK_V)
                tl.store(logits + v, tl.zeros_like(v).to(logits.dtype.element_ty), mask=v < room)
        return
    label = tl.load(labels + row)
    peak = float("-inf")
    mass = 0.0
    total = 0.0
    for start in range(0, vocabulary, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        inside = v < vocabulary
        value = capped_logits(logits + v, v < room, inside, softcap, scale, SOFTCAP)
        higher = tl.maximum(peak, tl.max(value, 0))
        mass = mass * tl.exp(peak - higher) + tl.sum(tl.exp(value - higher), 0)
        peak = higher
        total += tl.sum(tl.where(inside, value, 0.0), 0)
    lse = peak + tl.log(mass)
    known = (label >= 0) & (label < vocabulary)
    own = capped_logits(logits + label, known, known, softcap, scale, SOFTCAP)
    loss = lse - (1.0 - smoothing) * own - smoothing * (total / vocabulary)
    tl.store(losses + row, tl.where(known, loss, float("nan")))
    if GRADIENT:
        tl.debug_barrier()  # the label's logit has been read before it is overwritten
        for start in range(0, vocabulary, BLOCK_V):
            v = start + tl.arange(0, BLOCK_V)
            inside = v < vocabulary
            value, slope = capped_logits_and_slope(
                logits + v, v < room, inside, softcap, scale, SOFTCAP
            )
            grad = tl.exp(value - lse) - smoothing / vocabulary
            grad = tl.where(v == label, grad - (1.0 - smoothing), grad)
            if SOFTCAP:
                grad *= slope
            grad = tl.where(inside, grad, 0.0)
            tl.store(logits + v, grad.to(logits.dtype.element_ty), mask=v < room)


def _loss_config(vocabulary: int) -> dict[str, int]:
    wide = vocabulary > 1024
    return {"BLOCK_V": 4096 if wide else 1024, "num_warps": 8 if wide else 4}


def known_rows(rows: int, ignore_index: int, gpu: Gpu) -> int:
    """How many rows the library multiplies: all of them where few do not count."""
    if not gpu.multiplies_tiles:
        return rows
    found = min(rows, expected(rows, ignore_index))
    return rows if found > 0 and rows - found <= rows // 8 else found


def tiles_of(rows: int, known: int, row_bytes: int, head_bytes: int) -> Iterator[tuple[int, int]]:
    """(first, end) of each tile; none has rows on both sides of ``known``."""
    large = min(LARGE_TILE_BYTES, max(TILE_BYTES, head_bytes // 4))
    for start, stop, size in ((0, known, large), (known, rows, TILE_BYTES)):
        height = max(1, size // row_bytes)
        height = height // 128 * 128 or height  # whole blocks of the matmuls
        for first in range(start, stop, height):
            yield first, min(first + height, stop)


def compute(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int,
    label_smoothing: float, softcap: float, logit_scale: float, wanted: list[bool],
    narrow: Tensor | None = None, lora_b: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Same arguments and results as ``linear_cross_entropy_tiles.compute``."""
    n, (vocabulary, hidden) = labels.numel(), weight.shape
    known = known_rows(n, ignore_index, gpu_of(x))
    keep = labels != ignore_index
    kept = keep.sum(dtype=torch.int32)
    order = torch.argsort(keep.logical_not().to(torch.uint8), stable=True)
    labels = labels.index_select(0, order)
    f32 = {"dtype": torch.float32, "device": x.device}
    losses = torch.zeros(n, **f32)
    dx = x.new_zeros(x.shape if wanted[0] else (0, hidden))
    dbias = torch.zeros(vocabulary if wanted[2] else 0, **f32)
    kind = torch.float32 if x.dtype is torch.float16 else x.dtype
    dnarrow, dlora_b = empty_updates(x, narrow, lora_b, wanted)
    row_bytes, head_bytes = vocabulary * x.element_size(), weight.numel() * weight.element_size()
    tiles = list(tiles_of(n, known, row_bytes, head_bytes))
    alone = wanted[1] and kind is x.dtype and tiles == [(0, known)]
    dweight = torch.zeros((vocabulary if wanted[1] and not alone else 0, hidden), **f32)
    for first, end in tiles:
        rows = order[first:end]
        xt = x.index_select(0, rows)
        logits = logits_tile(xt, vocabulary)
        by_library = end <= known
        if by_library:
            project(xt, weight, bias, logits[:, :vocabulary])
        else:
            bounded_product(logits, xt, weight.t(), kept, first, "rows", bias)
        tile, clears = logits[:, :vocabulary], by_library
        if narrow is not None and lora_b is not None:  # of all rows: these products take little
            narrow_rows, clears = narrow.index_select(0, rows), True
            add_update(tile, narrow_rows, lora_b)
        loss_kernel[(xt.shape[0],)](
            logits,
            labels[first:],
            losses[first:],
            kept,
            first,
            vocabulary,
            logits.shape[1],
            label_smoothing,
            softcap,
            logit_scale,
            SOFTCAP=softcap > 0,
            GRADIENT=any(wanted),
            CLEAR=clears and any(wanted),
            **_loss_config(vocabulary),
            enable_fp_fusion=FP_FUSION,
        )
        if wanted[0] and by_library:
            dx.index_copy_(0, rows, mm(tile, weight))
        elif wanted[0]:
            part = torch.zeros_like(xt)  # rows past the bound stay zero
            bounded_product(part, logits, weight, kept, first, "rows")
            dx.index_copy_(0, rows, part)
        if alone:  # one product is rounded once in any case
            dweight = mm(tile.t(), xt)
        elif wanted[1]:
            bounded_product(dweight, logits.t(), xt, kept, first, "inner")
        if wanted[2]:
            ones = x.new_ones((xt.shape[0], 1))
            bounded_product(dbias.view(-1, 1), logits.t(), ones, kept, first, "inner")
        if narrow is not None and lora_b is not None:
            if wanted[3]:
                dnarrow.index_copy_(0, rows, project_update_back(tile, lora_b))
            if wanted[4]:
                accumulate_update(dlora_b, tile, narrow_rows)
    return losses.sum(), kept.to(torch.float32), dx, dweight.to(kind), dbias, dnarrow, dlora_b


def _aot_loss(dtype: str, vocabulary: int, softcap: bool, gradient: bool) -> AotCase:
    config = _loss_config(vocabulary)
    pointers = {"logits": f"*{dtype}", "labels": "*i64", "losses": "*fp32", "kept": "*i32"}
    return AotCase(
        name=f"loss-{dtype}-{config['BLOCK_V']}-softcap{softcap:d}-gradient{gradient:d}",
        kernel=loss_kernel,
        signature=pointers
        | {"first": "i32", "vocabulary": "i32", "room": "i32"}
        | dict.fromkeys(("smoothing", "softcap", "scale"), "fp32"),
        constants={"SOFTCAP": softcap, "GRADIENT": gradient, "CLEAR": gradient}
        | {"BLOCK_V": config["BLOCK_V"]},
        num_warps=config["num_warps"],
    )


AOT = (
    _aot_loss("bf16", 49152, True, True),
    _aot_loss("fp32", 49152, False, False),
    _aot_loss("fp16", 256, False, True),
)
