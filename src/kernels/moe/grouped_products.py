"""The three products of ``moe_experts``, on the CPU and on the GPU, without autograd rules.

All are opaque to a tracer: how many rows an expert has is known only at run time.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..launch import library_op, use_triton
from ..matmul import addmm, mm

# -- cpu -------------------------------------------------------------------------------------------


_HUGE_PAGES = 14  # MADV_HUGEPAGE
_PAGE, _LARGE = 4096, 8 << 20


@functools.cache
def _madvise() -> Callable[..., int] | None:
    """The system call by which a process says how it will use its memory, where there is one."""
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), "madvise", None)


def _in_huge_pages(made: Tensor) -> Tensor:
    """The fresh tensor ``made``, in huge pages if it is large and the system has any.

    The first write into fresh memory costs one fault per page: with pages of 4 KiB more time
    than the product that is written. It is advice: where it is not taken, nothing changes.
    """
    advise = _madvise() if made.device.type == "cpu" and type(made) is Tensor else None
    if advise is not None and made.nbytes >= _LARGE:
        start = -(-made.data_ptr() // _PAGE) * _PAGE
        end = (made.data_ptr() + made.nbytes) // _PAGE * _PAGE
        advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _HUGE_PAGES)
    return made


def _counts(offsets: Tensor, places: int) -> list[int]:
    """How many places each expert has, and how many are no expert's."""
    return [end - start for start, end in itertools.pairwise([0, *offsets.tolist(), places])]


def _grouped_mm_cpu(
    a: Tensor, rows: Tensor | None, weight: Tensor, offsets: Tensor, bias: Tensor | None
) -> Tensor:
    # Measured: oneDNN's linear is a fifth faster on few rows in fp32, but its sums are outside
    # the error budget; batches of padded experts (bmm) gain nothing.
    a = a if rows is None else a.index_select(0, rows)
    out = _in_huge_pages(a.new_empty(a.shape[0], weight.shape[2]))
    counts, wide = _counts(offsets, a.shape[0]), a.dtype.itemsize > 2
    start = 0
    with torch.autocast(a.device.type, enabled=False):
        for e, (count, matrix) in enumerate(zip(counts[:-1], weight.unbind(), strict=True)):
            if not count:
                continue
            # some of the next experts' rows, too, if need be: these write their own afterwards
            length = min(_usual_count(count, a.dtype), a.shape[0] - start)
            part, target = a.narrow(0, start, length), out.narrow(0, start, length)
            if bias is not None and wide:
                # MKL adds the products of a few rows to the bias one by one, which rounds each
                # to the bias's size (seen on CPUs with AVX2 alone)
                mm(part, matrix, out=target).add_(bias[e])
            elif bias is not None:
                addmm(bias[e], part, matrix, out=target)
            else:
                mm(part, matrix, out=target)
            start += count
    out[start:].zero_()
    return out


def _usual_count(count: int, dtype: torch.dtype) -> int:
    """A number of rows, at least ``count``, that other experts and steps have as well.

    oneDNN, which multiplies 16-bit matrices, compiles code for each number of rows that it meets
    (a cache keeps 1,024): with routed experts almost every product would be the first of its
    kind. Measured, with 64 and 256 rows: a fifth faster, in the first steps two fifths. A product
    of few rows takes as long as its weights take to be read, and there are few such numbers.
    """
    return count if dtype.itemsize > 2 or count <= 16 else -(-count // 8) * 8


def _grouped_outer_cpu(
    a: Tensor, rows: Tensor | None, b: Tensor, offsets: Tensor, like: Tensor
) -> Tensor:
    out, counts = _in_huge_pages(torch.empty_like(like)), _counts(offsets, b.shape[0])
    a = a if rows is None else a.index_select(0, rows)
    # a gradient in the layout of its parameter becomes its ``.grad`` without a copy
    left, right, product = (b, a, out.mT) if out.stride(1) < out.stride(2) else (a, b, out)
    lefts, rights = left.t().split(counts, 1)[:-1], right.split(counts)[:-1]
    parts = zip(lefts, rights, product.unbind(), strict=True)
    with torch.autocast(a.device.type, enabled=False):
        for x, y, target in parts:
            if len(y):
                mm(x, y, out=target)
            else:
                target.zero_()
    return out


def _combine_cpu(y: Tensor, where: Tensor, weights: Tensor | None, active: int) -> Tensor:
    places = where.view(-1, active)
    if weights is None or not len(where):
        return F.embedding_bag(places, y, mode="sum") if len(where) else y.new_zeros(0, y.shape[1])
    wide = torch.promote_types(weights.dtype, y.dtype)
    scales = weights.view(-1, active).to(wide)
    return F.embedding_bag(places, y.to(wide), mode="sum", per_sample_weights=scales).to(y.dtype)


def _grouped_mm_fake(
    a: Tensor, rows: Tensor | None, weight: Tensor, offsets: Tensor, bias: Tensor | None
) -> Tensor:
    return a.new_empty((a if rows is None else rows).shape[0], weight.shape[2])


def _grouped_outer_fake(
    a: Tensor, rows: Tensor | None, b: Tensor, offsets: Tensor, like: Tensor
) -> Tensor:
    return torch.empty_like(like)


def _combine_fake(y: Tensor, where: Tensor, weights: Tensor | None, active: int) -> Tensor:
    return y.new_empty(where.shape[0] // active, y.shape[1])


_SCHEMAS = {
    "grouped_mm": "(Tensor a, Tensor? rows, Tensor weight, Tensor offsets, Tensor? bias) -> Tensor",
    "grouped_outer": "(Tensor a, Tensor? rows, Tensor b, Tensor offsets, Tensor like) -> Tensor",
    "combine": "(Tensor y, Tensor where, Tensor? weights, int active) -> Tensor",
}
_FAKES: dict[str, Callable[..., Tensor]] = {
    "grouped_mm": _grouped_mm_fake,
    "grouped_outer": _grouped_outer_fake,
    "combine": _combine_fake,
}
_CPU: dict[str, Callable[..., Tensor]] = {
    "grouped_mm": _grouped_mm_cpu,
    "grouped_outer": _grouped_outer_cpu,
    "combine": _combine_cpu,
}


_FLOPS: dict[str, Callable[..., int]] = {
    "grouped_mm": lambda a, rows, weight, *_: (
        2 * (a if rows is None else rows).shape[0] * weight[0].numel()
    ),
    "grouped_outer": lambda a, rows, b, *_: 2 * b.numel() * a.shape[1],
}


def _op(name: str, suffix: str, implementation: Callable[..., Tensor] | str) -> Callable[..., Any]:
    schema = f"moe_{name}{suffix}{_SCHEMAS[name]}"
    plain = _CPU[name] if isinstance(implementation, str) else None
    return library_op(schema, implementation, _FAKES[name], _FLOPS.get(name), plain=plain)


_plain = {name: _op(name, "", _CPU[name]) for name in _SCHEMAS}

# -- triton ----------------------------------------------------------------------------------------

_triton = {name: _op(name, "_triton", f"moe.moe_experts:{name}") for name in _SCHEMAS}

# -- both ------------------------------------------------------------------------------------------


def grouped_mm(
    a: Tensor, rows: Tensor | None, weight: Tensor, offsets: Tensor, bias: Tensor | None
) -> Tensor:
    """``out[s] = a[rows[s]] · weight[e] + bias[e]``, e being the expert of place s.

    Places after the last expert's end are zero.

    Args:
        a: (R, K); its rows are read in order when ``rows`` is None.
        rows: (S,) or None.
        weight: (E, K, N), any strides.
        offsets: (E,), the end of each expert's places.
        bias: (E, N) or None.

    Returns:
        (S, N), contiguous, in a's dtype.
    """
    run = (_triton if use_triton(a, weight, bias) else _plain)["grouped_mm"]
    result: Tensor = run(a, rows, weight, offsets, bias)
    return result


def grouped_outer(
    a: Tensor, rows: Tensor | None, b: Tensor, offsets: Tensor, like: Tensor
) -> Tensor:
    """``out[e] = sum over the places s of e of a[rows[s]]ᵀ b[s]``; zero without places.

    Args:
        a: (R, K); its rows are read in order when ``rows`` is None.
        rows: (S,) or None.
        b: (S, N).
        offsets: (E,).
        like: (E, K, N), whose dtype and layout the result gets.
    """
    run = (_triton if use_triton(a, b, like) else _plain)["grouped_outer"]
    result: Tensor = run(a, rows, b, offsets, like)
    return result


def combine(y: Tensor, where: Tensor, weights: Tensor | None, active: int) -> Tensor:
    """``out[t] = sum over k of weights[t·K + k] · y[where[t·K + k]]``, summed at least in fp32.

    Args:
        y: (S, N).
        where: (S,).
        weights: (S,) or None for ones.
        active: K.

    Returns:
        (T, N) in y's dtype.
    """
    run = (_triton if use_triton(y, weights) else _plain)["combine"]
    result: Tensor = run(y, where, weights, active)
    return result


def segment_sum(rows: Tensor, offsets: Tensor) -> Tensor:
    """The sum (E, N) of each expert's rows (S, N), at least in fp32.

    On the CPU ``index_add`` adds one row after the other, where a plain sum goes by pairs: in fp32
    the error would grow with the rows.
    """
    on_cpu = rows.device.type == "cpu"
    wide = torch.float64 if on_cpu else torch.promote_types(rows.dtype, torch.float32)
    place = torch.arange(rows.shape[0], device=rows.device, dtype=offsets.dtype)
    expert = torch.searchsorted(offsets, place, right=True)
    total = rows.new_zeros(offsets.shape[0] + 1, rows.shape[1], dtype=wide)
    return total.index_add(0, expert, rows.to(wide))[:-1]
