"""Quantized weights: how they are stored, back to floating point, and products with them.

NF4 and FP4 with or without a quantized scale (Dettmers et al., "QLoRA", 2023), and rows of int8
(Dettmers et al., "LLM.int8()", 2022), as bitsandbytes packs them. It is not imported here: where
there is such a weight, whoever made it has registered the operators that are used if present.

What the ops know of a format is its record in ``FORMATS``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..direct import direct
from ..launch import library_op, use_triton
from ..matmul import addmm, mm
from ..op import Maker
from .products import plus_products, rank_update

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = (
    0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5,
    0.1666666716337204, 0.25, 0.0, -0.0052083334885537624, -0.6666666865348816, -1.0,
    -0.3333333432674408, -0.5, -0.1666666716337204, -0.25,
)  # fmt: skip
VALUES = {"nf4": NF4, "fp4": FP4}
NESTED = 256
"""Scales per scale of scales, where the scales are quantized themselves."""
_PIECE = 1 << 17
"""Weights that are dequantized at a time in plain PyTorch: their fp32 copies stay in the cache."""


class Quantized(NamedTuple):
    """A frozen matrix (out, in) in few bits: what the fields hold depends on the format.

    In 4 bits, ``packed`` holds two values to a byte, the first one in the high half, rows one after
    the other, in any dtype of storage; ``absmax`` holds in fp32 the scale of each block, or, with
    the three last fields, of each 256 scales. In int8, ``packed`` is (out, in), and ``absmax``
    (out,) the largest absolute value of each row.
    """

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, int]  # (out, in)
    blocksize: int  # how many values share a scale; not used by int8
    kind: str  # the format: a key of ``FORMATS``
    absmax_8bit: Tensor | None = None  # uint8, the quantized scale of each block
    absmax_code: Tensor | None = None  # (256,) fp32, the values of its codes
    absmax_offset: Tensor | None = None  # () fp32, what is added to all scales

    def nbytes(self) -> int:
        """Bytes in memory."""
        tensors = (t for t in self if isinstance(t, Tensor))
        return sum(t.numel() * t.element_size() for t in tensors)


@dataclass(frozen=True)
class WeightFormat:
    """How a frozen matrix is stored. Adding one takes a record in ``FORMATS`` and its test."""

    # (w, dtype) -> the matrix (out, in) in ``dtype``, in plain PyTorch: it defines the values
    reference: Callable[[Quantized, torch.dtype], Tensor]
    misfits: Callable[[Quantized], list[str]]  # why the fields are no such matrix
    example: Callable[[Maker, int, int, str], Quantized]  # (out, in), of products about one
    # the matrix from a faster kernel; None where there is none for it
    kernel: Callable[[Quantized, torch.dtype], Tensor | None] = lambda w, dtype: None
    # (x, w, bias) -> ``x·Wᵀ + bias`` for few rows of x without a copy of W; None for others
    few: Callable[[Tensor, Quantized, Tensor | None], Tensor | None] = lambda x, w, bias: None


def dequantize_reference(w: Quantized, dtype: torch.dtype) -> Tensor:
    """The matrix (out, in) in ``dtype``, in plain PyTorch."""
    return FORMATS[w.kind].reference(w, dtype)


def dequantize(w: Quantized, dtype: torch.dtype) -> Tensor:
    """The matrix (out, in) in ``dtype``, bit for bit that of the reference."""
    stored = FORMATS[w.kind]
    fast = stored.kernel(w, dtype)
    return stored.reference(w, dtype) if fast is None else fast


# -- products --------------------------------------------------------------------------------------
def split(w: Quantized) -> tuple[tuple[Any, ...], tuple[Tensor | None, ...]]:
    """The constants of a weight, and its tensors."""
    return w[2:5], (*w[:2], *w[5:])


def join(fixed: tuple[Any, ...], tensors: Sequence[Any]) -> Quantized:
    """The weight again."""
    return Quantized(*tensors[:2], *fixed, *tensors[2:])


def _products(
    xs: list[Tensor], weights: list[Tensor | None], sizes: list[int], kinds: list[str],
    transposed: bool, bias: Tensor | None, lefts: list[Tensor], rights: list[Tensor],
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    def weight(i: int) -> Quantized:
        out, into, blocksize = sizes[3 * i : 3 * i + 3]
        return join(((out, into), blocksize, kinds[i]), weights[5 * i : 5 * i + 5])

    def matrix(i: int) -> Tensor:
        unpacked = dequantize(weight(i), xs[i].dtype)
        return unpacked.t() if transposed else unpacked

    x = xs[0]
    total = FORMATS[kinds[0]].few(x, weight(0), bias) if transposed else None
    if total is None:
        total = mm(x, matrix(0)) if bias is None else addmm(bias, x, matrix(0))
    # one copy of full precision at a time
    others = ((xs[i], matrix(i)) for i in range(1, len(xs)))
    updates = zip(lefts, rights, strict=True)
    if not use_triton(total, *lefts, *rights):
        return plus_products(total, chain(others, updates), dtype)
    total = plus_products(total, others, dtype)
    for left, right in updates:
        total = rank_update(total, left, right)
    return total


def _products_fake(
    xs: list[Tensor], weights: list[Tensor | None], sizes: list[int], kinds: list[str],
    transposed: bool, bias: Tensor | None, lefts: list[Tensor], rights: list[Tensor],
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return xs[0].new_empty(xs[0].shape[0], sizes[0 if transposed else 1], dtype=dtype)


def elements_of(sizes: list[int]) -> list[int]:
    """The elements of each weight; ``sizes`` holds (out, in, blocksize) of one after the other."""
    return [out * into for out, into in zip(sizes[::3], sizes[1::3], strict=True)]


def _products_flops(xs: list[Tensor], weights: Any, sizes: list[int], *rest: Any) -> int:
    elements: int = sum(elements_of(sizes)) + sum(t.numel() for t in rest[-2])
    return 2 * xs[0].shape[0] * elements


# Opaque, so that no compiler finds a weight's copy of full precision worth keeping.
_products_op = direct(
    library_op(
        "quant_products(Tensor[] xs, Tensor?[] weights, int[] sizes, str[] kinds, bool transposed,"
        " Tensor? bias, Tensor[] lefts, Tensor[] rights, ScalarType dtype) -> Tensor",
        _products,
        _products_fake,
        _products_flops,
        temporary=lambda xs, weights, sizes, *_: xs[0].element_size() * max(elements_of(sizes)),
    )
)


def quantized_products(
    pairs: Sequence[tuple[Tensor, Quantized]],
    updates: Sequence[tuple[Tensor, Tensor]],
    dtype: torch.dtype,
    *,
    transposed: bool = False,
    bias: Tensor | None = None,
) -> Tensor:
    """``bias + Σ xᵢ·Wᵢ + Σ leftⱼ·rightⱼ`` in ``dtype``, each added to those before; no autograd.

    ``pairs``, one at least, are xᵢ (N, outᵢ) and the weight (outᵢ, in), which is rounded to xᵢ's
    dtype; ``updates`` (N, r) and (r, in). With ``transposed`` it is x·Wᵀ of one pair. The bias is
    in x's dtype, and ``dtype`` that of the x's, or wider.
    """
    halves = [split(w) for _, w in pairs]
    result: Tensor = _products_op(
        [x for x, _ in pairs],
        [t for _, tensors in halves for t in tensors],
        [n for (shape, blocksize, _), _ in halves for n in (*shape, blocksize)],
        [kind for (_, _, kind), _ in halves],
        transposed,
        bias,
        [left for left, _ in updates],
        [right for _, right in updates],
        dtype,
    )
    return result


# -- int8 ------------------------------------------------------------------------------------------
def _too_few_bits(w: Quantized, each: int) -> list[str]:
    bits, (out, into) = w.packed.numel() * w.packed.element_size() * 8, w.shape
    enough = bits >= out * into * each
    return [] if enough else [f"{bits} bits are too few for {out} x {into} values"]


def _int8_reference(w: Quantized, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    return w.packed.to(dtype).mul_(w.absmax.to(wide).unsqueeze(1).mul(1.0 / 127.0))


def _int8_example(m: Maker, out: int, into: int, kind: str) -> Quantized:
    packed = m.integers(255, out, into, dtype=torch.int8)
    scales_of_rows = into**-0.5 * (1 + m.normal(out, dtype=torch.float32).abs())
    return Quantized(packed, scales_of_rows, (out, into), into, kind)


# -- 4 bits ----------------------------------------------------------------------------------------
def scales(w: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """The scale of each block of 4-bit values, (blocks,) in ``dtype``."""
    if w.absmax_8bit is None or w.absmax_code is None or w.absmax_offset is None:
        return w.absmax.to(dtype)
    result = w.absmax_code.to(dtype).index_select(0, w.absmax_8bit.int())
    whole, outer = result.numel() // NESTED, w.absmax.to(dtype)
    result[: whole * NESTED].view(whole, NESTED).mul_(outer[:whole, None])
    result[whole * NESTED :].mul_(outer[-1])
    return result.add_(w.absmax_offset.to(dtype))


def _four_bits_reference(w: Quantized, dtype: torch.dtype) -> Tensor:
    # Value and scale are multiplied in fp32 (fp64 in fp64) and rounded once.
    wide = torch.promote_types(dtype, torch.float32)
    out, into = w.shape
    codes = w.packed.reshape(-1).view(torch.uint8)
    pairs = _pairs(w.kind, wide, codes.device)
    size = out * into
    result = torch.empty(size, dtype=dtype, device=codes.device)
    block_scales = scales(w, wide)
    step = max(_PIECE // w.blocksize, 1) * w.blocksize  # even, for blocks are
    for start in range(0, size, step):
        stop = min(start + step, size)
        values = pairs[codes[start // 2 : (stop + 1) // 2].int()].view(-1)[: stop - start]
        part_scales = block_scales[start // w.blocksize : -(-stop // w.blocksize)]
        whole = (stop - start) // w.blocksize * w.blocksize
        values[:whole].view(-1, w.blocksize).mul_(part_scales[: whole // w.blocksize, None])
        values[whole:].mul_(part_scales[-1])
        result[start:stop] = values
    return result.view(out, into)


_FAKE = torch._C._TorchDispatchModeKey.FAKE


def _kept(make: Callable[[str, torch.dtype, torch.device], Tensor]) -> Any:
    """``make``, whose results are kept unless they are fake tensors."""
    cached = functools.cache(make)

    @functools.wraps(make)
    def found(*args: Any) -> Tensor:
        return cached(*args) if torch._C._get_dispatch_mode(_FAKE) is None else make(*args)

    return found


@_kept
def table(kind: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values of the 16 codes."""
    return torch.tensor(VALUES[kind], dtype=dtype, device=device)


@_kept
def _pairs(kind: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    # (256, 2): the values of each byte's two codes.
    one = table(kind, dtype, device)
    return torch.stack((one.repeat_interleave(16), one.repeat(16)), 1)


def _dequantize_fake(
    packed: Tensor, absmax: Tensor, absmax_8bit: Tensor | None, absmax_code: Tensor | None,
    absmax_offset: Tensor | None, out: int, into: int, blocksize: int, kind: str,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return torch.empty(out, into, dtype=dtype, device=packed.device)


def _dequantize_plain(
    packed: Tensor, absmax: Tensor, absmax_8bit: Tensor | None, absmax_code: Tensor | None,
    absmax_offset: Tensor | None, out: int, into: int, blocksize: int, kind: str,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    rest = absmax_8bit, absmax_code, absmax_offset
    return _four_bits_reference(
        Quantized(packed, absmax, (out, into), blocksize, kind, *rest), dtype
    )


_dequantize = library_op(
    "dequantize_4bit(Tensor packed, Tensor absmax, Tensor? absmax_8bit, Tensor? absmax_code,"
    " Tensor? absmax_offset, int out, int into, int blocksize, str kind, ScalarType dtype)"
    " -> Tensor",
    "linear.quant_linear:dequantize",
    _dequantize_fake,
    plain=_dequantize_plain,
)
_direct_dequantize = direct(_dequantize)


def _four_bits_kernel(w: Quantized, dtype: torch.dtype) -> Tensor | None:
    if dtype is not torch.float64 and use_triton(w.absmax):
        rest = (w.absmax_8bit, w.absmax_code, w.absmax_offset)
        result: Tensor = _direct_dequantize(
            w.packed, w.absmax, *rest, *w.shape, w.blocksize, w.kind, dtype
        )
        return result
    # The compiled CPU kernel of bitsandbytes, where it is, is the fastest. It has none for odd rows
    # and for large blocks, and would start a compiler there.
    kernel = getattr(torch.ops.bitsandbytes, "dequantize_4bit", None)
    low = dtype in (torch.float32, torch.bfloat16, torch.float16)
    regular = w.shape[1] % 2 == 0 and w.blocksize < 2048
    if kernel is None or not low or not regular or w.absmax.is_cuda:
        return None
    unpacked: Tensor = kernel.default(
        w.packed, scales(w), w.blocksize, w.kind, list(w.shape), dtype
    )
    return unpacked


_FEW = 16
"""Rows of x up to which a GPU dequantizes inside the product: nothing is written."""


def _few_product(x: Tensor, w: Quantized, bias: Tensor | None) -> Tensor | None:
    is_for_few = x.shape[0] <= _FEW and w.shape[1] % w.blocksize == 0
    if not is_for_few or not use_triton(x, w.absmax):
        return None
    result: Tensor = _direct_few(x, *w[:2], *w[5:], *w.shape, w.blocksize, w.kind, bias)
    return result


def _few_fake(
    x: Tensor, packed: Tensor, absmax: Tensor, absmax_8bit: Tensor | None,
    absmax_code: Tensor | None, absmax_offset: Tensor | None, out: int, into: int, blocksize: int,
    kind: str, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], out)


def _few_plain(
    x: Tensor, packed: Tensor, absmax: Tensor, absmax_8bit: Tensor | None,
    absmax_code: Tensor | None, absmax_offset: Tensor | None, out: int, into: int, blocksize: int,
    kind: str, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    rest = absmax_8bit, absmax_code, absmax_offset
    matrix = dequantize(Quantized(packed, absmax, (out, into), blocksize, kind, *rest), x.dtype)
    return mm(x, matrix.t()) if bias is None else addmm(bias, x, matrix.t())


_direct_few = direct(
    library_op(
        "quant_linear_few(Tensor x, Tensor packed, Tensor absmax, Tensor? absmax_8bit,"
        " Tensor? absmax_code, Tensor? absmax_offset, int out, int into, int blocksize, str kind,"
        " Tensor? bias) -> Tensor",
        "linear.quant_linear:few",
        _few_fake,
        lambda x, *rest: 2 * x.shape[0] * rest[5] * rest[6],
        plain=_few_plain,
    )
)


def _four_bits_misfits(w: Quantized) -> list[str]:
    reasons = _too_few_bits(w, 4)
    if (w.absmax_8bit is None) != (w.absmax_offset is None):
        reasons.append("the scales of scales are not complete")
    return reasons


def _four_bits_example(m: Maker, out: int, into: int, kind: str) -> Quantized:
    spread, blocks = into**-0.5, -(-out * into // 64)
    codes = m.integers(256, -(-out * into // 2), 1, dtype=torch.uint8)
    if kind == "fp4":  # one of them has plain scales
        absmax = spread * (1 + m.normal(blocks, dtype=torch.float32).abs())
        return Quantized(codes, absmax, (out, into), 64, kind)
    outer = spread * m.normal(-(-blocks // NESTED), dtype=torch.float32).abs()
    values = torch.linspace(-1, 1, 256, device=m.device)
    offset = torch.full((), 2 * spread, device=m.device)
    inner = m.integers(256, blocks, dtype=torch.uint8)
    return Quantized(codes, outer, (out, into), 64, kind, inner, values, offset)


_FOUR_BITS = WeightFormat(
    _four_bits_reference, _four_bits_misfits, _four_bits_example, _four_bits_kernel, _few_product
)
FORMATS = {
    "nf4": _FOUR_BITS,
    "fp4": _FOUR_BITS,
    "int8": WeightFormat(_int8_reference, lambda w: _too_few_bits(w, 8), _int8_example),
}
"""Every stored format, by what ``Quantized.kind`` calls it."""


def example_of_quantized(m: Maker, out: int, into: int, kind: str = "nf4") -> Quantized:
    """A matrix (out, in) for examples, so that products are about one."""
    return FORMATS[kind].example(m, out, into, kind)
