"""Triton twin of ``kernels/linear_cross_entropy_tiles.py``: tiles of rows, nothing read back.

How many rows count is known on the device only, and asking would stall the stream. So the rows that
count are sorted to the front, every tile is launched, and each program compares its rows with the
count in device memory: those past it return at once. That is why the matmuls are kernels of our
own: a library matmul cannot stop at a number that the host does not know.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aot import AotCase

TILE_BYTES = 128 << 20
"""What one tile of logits takes; at 128k classes in bf16 that is 512 rows."""


@triton.jit
def matmul_kernel(
    a,
    b,
    bias,
    c,
    kept,
    first,
    rows,
    columns,
    inner,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    BOUND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """``c (rows, columns) = a · b (+ bias)``, or ``+=``, as far as ``kept - first`` reaches.

    With BOUND "rows", blocks of rows past the bound are left as they are; with BOUND "inner", the
    inner dimension ends there. ``c`` is contiguous; products are summed in fp32.
    """
    live = tl.load(kept) - first
    if BOUND == "rows":
        rows = tl.minimum(rows, live)
    else:
        inner = tl.minimum(inner, live)
    # neighbouring programs share GROUP_M row blocks of a and one column block of b in the cache
    pid = tl.program_id(0)
    blocks_n = tl.cdiv(columns, BLOCK_N)
    blocks_m = tl.num_programs(0) // blocks_n
    group = pid // (GROUP_M * blocks_n)
    height = tl.minimum(blocks_m - group * GROUP_M, GROUP_M)
    block_m = group * GROUP_M + (pid % (GROUP_M * blocks_n)) % height
    block_n = (pid % (GROUP_M * blocks_n)) // height
    if block_m * BLOCK_M >= rows:
        return
    m = (block_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (block_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, inner, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K).to(tl.int64)
        left = tl.load(
            a + m[:, None] * stride_am + k[None, :] * stride_ak,
            mask=(m < rows)[:, None] & (k < inner)[None, :],
            other=0.0,
        )
        right = tl.load(
            b + k[:, None] * stride_bk + n[None, :] * stride_bn,
            mask=(k < inner)[:, None] & (n < columns)[None, :],
            other=0.0,
        )
        total = tl.dot(left, right, total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    inside = (m < rows)[:, None] & (n < columns)[None, :]
    out = c + m[:, None] * columns + n[None, :]
    if ACCUMULATE:
        total += tl.load(out, mask=inside, other=0.0).to(tl.float32)
    tl.store(out, total.to(c.dtype.element_ty), mask=inside)


@triton.jit
def _tanh(u):
    """Hyperbolic tangent to fp32's precision, also where ``1 - 2/(exp(2u) + 1)`` cancels."""
    s = u * u
    tail = -0.0539682540 + s * 0.0218694885
    small = u * (1.0 + s * (-0.3333333333 + s * (0.1333333333 + s * tail)))
    t = tl.exp(-2.0 * tl.abs(u))
    large = (1.0 - t) / (1.0 + t)
    return tl.where(s < 0.09, small, tl.where(u < 0.0, -large, large))


@triton.jit
def _logits(pointers, inside, softcap, scale, SOFTCAP: tl.constexpr):
    """Scaled and capped logits in fp32, minus infinity outside."""
    value = tl.load(pointers, mask=inside, other=0.0).to(tl.float32) * scale
    if SOFTCAP:
        value = softcap * _tanh(value / softcap)
    return tl.where(inside, value, float("-inf"))


@triton.jit
def loss_kernel(
    logits,
    labels,
    losses,
    kept,
    first,
    vocabulary,
    smoothing,
    softcap,
    scale,
    SOFTCAP: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One row per program: its loss, and its logits replaced by their gradient (over scale).

    The maximum and the sum of exponentials are found in one pass (Milakov & Gimelshein 2018).
    """
    row = tl.program_id(0)
    if row >= tl.load(kept) - first:
        return
    logits += row.to(tl.int64) * vocabulary
    label = tl.load(labels + row)
    peak = float("-inf")
    mass = 0.0
    total = 0.0
    for start in range(0, vocabulary, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        inside = v < vocabulary
        value = _logits(logits + v, inside, softcap, scale, SOFTCAP)
        higher = tl.maximum(peak, tl.max(value, 0))
        mass = mass * tl.exp(peak - higher) + tl.sum(tl.exp(value - higher), 0)
        peak = higher
        total += tl.sum(tl.where(inside, value, 0.0), 0)
    lse = peak + tl.log(mass)
    known = (label >= 0) & (label < vocabulary)
    own = _logits(logits + label, known, softcap, scale, SOFTCAP)
    loss = lse - (1.0 - smoothing) * own - smoothing * (total / vocabulary)
    tl.store(losses + row, tl.where(known, loss, float("nan")))
    if GRADIENT:
        tl.debug_barrier()  # the label's logit has been read before it is overwritten
        for start in range(0, vocabulary, BLOCK_V):
            v = start + tl.arange(0, BLOCK_V)
            inside = v < vocabulary
            value = _logits(logits + v, inside, softcap, scale, SOFTCAP)
            grad = tl.exp(value - lse) - smoothing / vocabulary
            grad = tl.where(v == label, grad - (1.0 - smoothing), grad)
            if SOFTCAP:
                share = value / softcap
                grad *= 1.0 - share * share
            tl.store(logits + v, grad.to(logits.dtype.element_ty), mask=inside)


def _matmul_config(dtype: torch.dtype, precision: str) -> dict[str, int]:
    """One configuration per kind of arithmetic; the operands are always large."""
    if dtype is not torch.float32:
        block = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64}
        return block | {"GROUP_M": 8, "num_warps": 8, "num_stages": 3}
    if precision == "tf32":
        block = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32}
        return block | {"GROUP_M": 8, "num_warps": 8, "num_stages": 3}
    block = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16}
    return block | {"GROUP_M": 8, "num_warps": 4, "num_stages": 2}


def _loss_config(vocabulary: int) -> dict[str, int]:
    wide = vocabulary > 1024
    return {"BLOCK_V": 4096 if wide else 1024, "num_warps": 8 if wide else 4}


def _product(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    kept: Tensor,
    first: int,
    bound: str,
    bias: Tensor | None = None,
) -> None:
    """``out (M, N) = a (M, K) · b (K, N)``, bounded in M; bounded in K, it is added to ``out``."""
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    config = _matmul_config(a.dtype, precision)
    rows, columns = out.shape
    blocks = triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(columns, config["BLOCK_N"])
    matmul_kernel[(blocks,)](
        a,
        b,
        bias,
        out,
        kept,
        first,
        rows,
        columns,
        a.shape[1],
        *a.stride(),
        *b.stride(),
        BOUND=bound,
        HAS_BIAS=bias is not None,
        ACCUMULATE=bound == "inner",
        PRECISION=precision if a.dtype is torch.float32 else "ieee",
        **config,
    )


def compute(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    logit_scale: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Same arguments and results as ``linear_cross_entropy_tiles.compute``."""
    n, (vocabulary, hidden) = labels.numel(), weight.shape
    keep = labels != ignore_index
    kept = keep.sum(dtype=torch.int32)
    order = torch.argsort(keep.logical_not().to(torch.uint8), stable=True)
    labels = labels.index_select(0, order)
    f32 = {"dtype": torch.float32, "device": x.device}
    losses = torch.zeros(n, **f32)
    dx = x.new_zeros(x.shape if wanted[0] else (0, hidden))
    dweight = torch.zeros((vocabulary if wanted[1] else 0, hidden), **f32)
    dbias = torch.zeros(vocabulary if wanted[2] else 0, **f32)
    height = min(n, max(1, TILE_BYTES // (vocabulary * x.element_size())))
    for first in range(0, n, max(1, height)):
        rows = order[first : first + height]
        xt = x.index_select(0, rows)
        logits = x.new_empty((xt.shape[0], vocabulary))
        _product(logits, xt, weight.t(), kept, first, "rows", bias)
        loss_kernel[(xt.shape[0],)](
            logits,
            labels[first:],
            losses[first:],
            kept,
            first,
            vocabulary,
            label_smoothing,
            softcap,
            logit_scale,
            SOFTCAP=softcap > 0,
            GRADIENT=any(wanted),
            **_loss_config(vocabulary),
        )
        if wanted[0]:
            part = torch.zeros_like(xt)  # rows past the bound stay zero
            _product(part, logits, weight, kept, first, "rows")
            dx.index_copy_(0, rows, part)
        if wanted[1]:
            _product(dweight, logits.t(), xt, kept, first, "inner")
        if wanted[2]:
            ones = x.new_ones((xt.shape[0], 1))
            _product(dbias.view(-1, 1), logits.t(), ones, kept, first, "inner")
    narrow = torch.float32 if x.dtype is torch.float16 else x.dtype
    return losses.sum(), kept.to(torch.float32), dx, dweight.to(narrow), dbias


def _aot_matmul(dtype: str, role: str, precision: str = "ieee") -> AotCase:
    """The roles: logits = x·Wᵀ (+ bias), dx = dlogits·W, dweight += dlogitsᵀ·x."""
    config = _matmul_config(torch.float32 if dtype == "fp32" else torch.bfloat16, precision)
    bound = "inner" if role == "dweight" else "rows"
    ones = {"logits": ("stride_ak", "stride_bk"), "dx": ("stride_ak", "stride_bn")}
    unit = ones.get(role, ("stride_am", "stride_bn"))
    integers = ("first", "rows", "columns", "inner")
    strides = ("stride_am", "stride_ak", "stride_bk", "stride_bn")
    out = "fp32" if role == "dweight" else dtype
    constants = {"BOUND": bound, "HAS_BIAS": role == "logits", "ACCUMULATE": bound == "inner"}
    return AotCase(
        name=f"matmul-{role}-{dtype}-{precision}",
        kernel=matmul_kernel,
        signature={"a": f"*{dtype}", "b": f"*{dtype}", "bias": f"*{dtype}", "c": f"*{out}"}
        | {"kept": "*i32"}
        | dict.fromkeys((*integers, *strides), "i32"),
        constants=constants
        | {"PRECISION": precision}
        | dict.fromkeys(unit, 1)
        | {k: config[k] for k in config if k.isupper()},
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )


def _aot_loss(dtype: str, vocabulary: int, softcap: bool, gradient: bool) -> AotCase:
    config = _loss_config(vocabulary)
    pointers = {"logits": f"*{dtype}", "labels": "*i64", "losses": "*fp32", "kept": "*i32"}
    return AotCase(
        name=f"loss-{dtype}-{config['BLOCK_V']}-softcap{softcap:d}-gradient{gradient:d}",
        kernel=loss_kernel,
        signature=pointers
        | {"first": "i32", "vocabulary": "i32"}
        | dict.fromkeys(("smoothing", "softcap", "scale"), "fp32"),
        constants={"SOFTCAP": softcap, "GRADIENT": gradient, "BLOCK_V": config["BLOCK_V"]},
        num_warps=config["num_warps"],
    )


AOT = (
    _aot_matmul("bf16", "logits"),
    _aot_matmul("bf16", "dx"),
    _aot_matmul("fp16", "dweight"),
    _aot_matmul("fp32", "logits"),
    _aot_matmul("fp32", "dweight", "tf32"),
    _aot_loss("bf16", 49152, True, True),
    _aot_loss("fp32", 49152, False, False),
    _aot_loss("fp16", 256, False, True),
)
