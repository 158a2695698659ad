"""Quantized weights: how they are stored, back to floating point, and products with them.

NF4 and FP4 with or without a quantized scale (Dettmers et al., "QLoRA", 2023), and rows of int8
(Dettmers et al., "LLM.int8()", 2022), as bitsandbytes packs them. It is not imported here: where
there is such a weight, whoever made it has registered the operators that are used if present.

What the ops know of a format is its record in ``FORMATS``.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..choice import Implementation
from ..direct import direct
from ..launch import library_op, use_triton, use_triton_dot
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
_ALIGNED = 256
"""Parts begin at multiples of this: of the usual groups and blocks of scales."""
_PIECE = 1 << 17
"""Weights that are dequantized at a time in plain PyTorch: their fp32 copies stay in the cache."""


class Quantized(NamedTuple):
    """A frozen matrix (out, in) in few bits: what ``tensors`` are depends on the format.

    In 4 bits: two values to a byte, the first one in the high half, rows one after the other, in
    any dtype of storage; in fp32 the scale of each block, or of each 256 scales; then, or None,
    uint8 scales of the blocks, (256,) fp32 values of their codes, and () fp32 what is added to all.
    In int8: (out, in), and (out,) the largest absolute value of each row. Of a formula: its inputs.
    """

    tensors: tuple[Tensor | None, ...]
    shape: tuple[int, int]  # (out, in)
    blocksize: int  # how many values share a scale; of 4 bits only
    kind: str  # the format: a key of ``FORMATS``

    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(t.numel() * t.element_size() for t in self.tensors if t is not None)


def is_record(argument: Any) -> bool:
    """Whether an argument of a node has the fields of a ``Quantized``."""
    is_like = isinstance(argument, tuple) and len(argument) == len(Quantized._fields)
    return is_like and isinstance(argument[0], tuple) and isinstance(argument[3], str)


@dataclass(frozen=True)
class WeightFormat:
    """How a frozen matrix is stored. Adding one takes a record in ``FORMATS`` and its test."""

    # (w, dtype) -> the matrix (out, in) in ``dtype``, in plain PyTorch: it defines the values
    reference: Callable[[Quantized, torch.dtype], Tensor]
    misfits: Callable[[Quantized], list[str]]  # why the fields are no such matrix
    example: Callable[[Maker, int, int, str], Quantized]  # (out, in), of products about one
    # the matrix from a faster kernel; None where there is none for it
    kernel: Callable[[Quantized, torch.dtype], Tensor | None] = lambda w, dtype: None
    # (w, dtype, dim, start, stop) -> rows (dim 0) or columns of the reference's matrix, bit for bit
    part: Callable[[Quantized, torch.dtype, int, int, int], Tensor] | None = None
    cuts: tuple[int, ...] = ()  # the dims along which ``part`` need not make more than the part
    is_formula: bool = False  # of a graph: eager mode keeps the matrix for backward


def dequantize_reference(w: Quantized, dtype: torch.dtype) -> Tensor:
    """The matrix (out, in) in ``dtype``, in plain PyTorch."""
    return FORMATS[w.kind].reference(w, dtype)


def dequantize(w: Quantized, dtype: torch.dtype) -> Tensor:
    """The matrix (out, in) in ``dtype``, bit for bit that of the reference."""
    stored = FORMATS[w.kind]
    fast = stored.kernel(w, dtype)
    return stored.reference(w, dtype) if fast is None else fast


def _unpacked_fake(
    tensors: list[Tensor | None], shape: list[int], blocksize: int, kind: str, dtype: torch.dtype
) -> Tensor:
    device = next(t.device for t in tensors if t is not None)
    return torch.empty(shape, dtype=dtype, device=device)


def _unpacked(
    tensors: list[Tensor | None], shape: list[int], blocksize: int, kind: str, dtype: torch.dtype
) -> Tensor:
    w = Quantized(tuple(tensors), (shape[0], shape[1]), blocksize, kind)
    cuts = parts([w], 0)
    part = FORMATS[kind].part
    if part is None or len(cuts) == 1:
        return dequantize(w, dtype)
    # what a formula makes on its way is no larger than a part
    result = _unpacked_fake(tensors, shape, blocksize, kind, dtype)
    for start, stop in cuts:
        result[start:stop] = part(w, dtype, 0, start, stop)
    return result


_unpacked_op = direct(
    library_op(
        "quant_unpacked(Tensor?[] tensors, int[] shape, int blocksize, str kind,"
        " ScalarType dtype) -> Tensor",
        _unpacked,
        _unpacked_fake,
    )
)


def unpacked(
    tensors: Sequence[Tensor | None], shape: tuple[int, int], blocksize: int, kind: str,
    x: Tensor, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """The matrix of a ``Quantized``'s fields, in ``dtype`` or x's, as one operation."""
    result: Tensor = _unpacked_op(list(tensors), list(shape), blocksize, kind, dtype or x.dtype)
    return result


# -- products --------------------------------------------------------------------------------------
PART = 1 << 20
"""Elements of a weight, at most, that are there in high precision where its format has parts."""


def flat_weights(weights: Sequence[Quantized]) -> tuple[list[int], list[str]]:
    """Four numbers of each weight (out, in, blocksize, how many tensors), and the formats."""
    sizes = [n for w in weights for n in (*w.shape, w.blocksize, len(w.tensors))]
    return sizes, [w.kind for w in weights]


def joined_weights(
    tensors: Sequence[Tensor | None], sizes: Sequence[int], kinds: Sequence[str]
) -> list[Quantized]:
    """The weights of ``flat_weights``; ``tensors`` are those of one after the other."""
    weights, rest = [], iter(tensors)
    for i, kind in enumerate(kinds):
        out, into, blocksize, count = sizes[4 * i : 4 * i + 4]
        weights.append(
            Quantized(tuple(itertools.islice(rest, count)), (out, into), blocksize, kind)
        )
    return weights


def parts(weights: Sequence[Quantized], dim: int) -> list[tuple[int, int]]:
    """Where each part of the matrices begins and ends along ``dim``; None cut where one cannot."""
    size, across = weights[0].shape[dim], max(w.shape[1 - dim] for w in weights)
    step = size
    if all(dim in FORMATS[w.kind].cuts for w in weights):
        step = max(PART // max(across, 1) // _ALIGNED, 1) * _ALIGNED
    starts = range(0, size, step) if size else (0,)
    return [(start, min(start + step, size)) for start in starts]


def _products(
    xs: list[Tensor], tensors: list[Tensor | None], sizes: list[int], kinds: list[str],
    transposed: bool, bias: Tensor | None, lefts: list[Tensor], rights: list[Tensor],
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    weights = joined_weights(tensors, sizes, kinds)
    dim = 0 if transposed else 1
    updates = list(zip(lefts, rights, strict=True))
    cuts = parts(weights, dim)
    if not transposed and len(cuts) == 1 and any(len(parts([w], 0)) > 1 for w in weights):
        return plus_products(_sum_of_parts(xs, weights, dtype), updates, dtype)
    if len(cuts) == 1:
        return _part_of_products(xs, weights, transposed, bias, updates, dtype, None)
    result = xs[0].new_empty(xs[0].shape[0], weights[0].shape[dim], dtype=dtype)
    for start, stop in cuts:
        own_bias = None if bias is None else bias[start:stop]
        own = [(left, right[:, start:stop]) for left, right in updates]
        result[:, start:stop] = _part_of_products(
            xs, weights, transposed, own_bias, own, dtype, (start, stop)
        )
    return result


def _part_of_products(
    xs: list[Tensor], weights: list[Quantized], transposed: bool, bias: Tensor | None,
    updates: list[tuple[Tensor, Tensor]], dtype: torch.dtype, cut: tuple[int, int] | None,
) -> Tensor:  # fmt: skip
    # Some columns of the sum, or all of them.
    def matrix(i: int) -> Tensor:
        w, kind = weights[i], xs[i].dtype
        part = FORMATS[w.kind].part
        if cut is None or part is None:
            unpacked = dequantize(w, kind)
        else:
            unpacked = part(w, kind, 0 if transposed else 1, *cut)
        return unpacked.t() if transposed else unpacked

    total = mm(xs[0], matrix(0)) if bias is None else addmm(bias, xs[0], matrix(0))
    # one copy of full precision at a time
    others = ((xs[i], matrix(i)) for i in range(1, len(xs)))
    if not use_triton_dot(total, *(t for pair in updates for t in pair)):
        return plus_products(total, chain(others, updates), dtype)
    total = plus_products(total, others, dtype)
    for left, right in updates:
        total = rank_update(total, left, right.contiguous())
    return total


def _sum_of_parts(xs: list[Tensor], weights: list[Quantized], dtype: torch.dtype) -> Tensor:
    # ``Σ xᵢ·Wᵢ`` from rows of W, where a part of its columns would take all of it. Each product is
    # rounded, and together their errors are as large as that of one; the sum must not add its own.
    wide = torch.promote_types(dtype, torch.float32)
    total = xs[0].new_zeros(xs[0].shape[0], weights[0].shape[1], dtype=wide)
    for x, w in zip(xs, weights, strict=True):
        part = FORMATS[w.kind].part
        for start, stop in parts([w], 0):
            rows = dequantize(w, x.dtype) if part is None else part(w, x.dtype, 0, start, stop)
            total += mm(x[:, start:stop], rows)
    return total.to(dtype)


def _products_fake(
    xs: list[Tensor], weights: list[Tensor | None], sizes: list[int], kinds: list[str],
    transposed: bool, bias: Tensor | None, lefts: list[Tensor], rights: list[Tensor],
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return xs[0].new_empty(xs[0].shape[0], sizes[0 if transposed else 1], dtype=dtype)


def elements_of(sizes: Sequence[int]) -> list[int]:
    """The elements of each weight; ``sizes`` are those of ``flat_weights``."""
    return [out * into for out, into in zip(sizes[::4], sizes[1::4], strict=True)]


def unpacked_elements(sizes: Sequence[int], kinds: Sequence[str]) -> list[int]:
    """Of each weight the elements that are there in high precision at a time."""
    pairs = zip(elements_of(sizes), kinds, strict=True)
    return [min(n, PART) if FORMATS[kind].cuts else n for n, kind in pairs]


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
        temporary=lambda xs, weights, sizes, kinds, *_: (
            xs[0].element_size() * max(unpacked_elements(sizes, kinds))
        ),
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
    weights = [w for _, w in pairs]
    result: Tensor = _products_op(
        [x for x, _ in pairs],
        [t for w in weights for t in w.tensors],
        *flat_weights(weights),
        transposed,
        bias,
        [left for left, _ in updates],
        [right for _, right in updates],
        dtype,
    )
    return result


# -- int8 ------------------------------------------------------------------------------------------
def _too_few_bits(w: Quantized, each: int) -> list[str]:
    packed, (out, into) = w.tensors[0], w.shape
    bits = 0 if packed is None else packed.numel() * packed.element_size() * 8
    enough = bits >= out * into * each
    return [] if enough else [f"{bits} bits are too few for {out} x {into} values"]


def _int8_reference(w: Quantized, dtype: torch.dtype) -> Tensor:
    packed, absmax = cast("tuple[Tensor, Tensor]", w.tensors)
    wide = torch.promote_types(dtype, torch.float32)
    return packed.to(dtype).mul_(absmax.to(wide).unsqueeze(1).mul(1.0 / 127.0))


def _int8_example(m: Maker, out: int, into: int, kind: str) -> Quantized:
    packed = m.integers(255, out, into, dtype=torch.int8)
    scales_of_rows = into**-0.5 * (1 + m.normal(out, dtype=torch.float32).abs())
    return Quantized((packed, scales_of_rows), (out, into), into, kind)


# -- 4 bits ----------------------------------------------------------------------------------------
class FourBits(NamedTuple):
    """The tensors of a weight in 4 bits: see ``Quantized``."""

    packed: Tensor
    absmax: Tensor
    absmax_8bit: Tensor | None = None
    absmax_code: Tensor | None = None
    absmax_offset: Tensor | None = None


def scales(w: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """The scale of each block of 4-bit values, (blocks,) in ``dtype``."""
    _, absmax, inner, code, offset = FourBits(*w.tensors)  # type: ignore[arg-type]
    if inner is None or code is None or offset is None:
        return absmax.to(dtype)
    result = code.to(dtype).index_select(0, inner.int())
    whole, outer = result.numel() // NESTED, absmax.to(dtype)
    result[: whole * NESTED].view(whole, NESTED).mul_(outer[:whole, None])
    result[whole * NESTED :].mul_(outer[-1])
    return result.add_(offset.to(dtype))


def _four_bits_reference(w: Quantized, dtype: torch.dtype) -> Tensor:
    # Value and scale are multiplied in fp32 (fp64 in fp64) and rounded once.
    wide = torch.promote_types(dtype, torch.float32)
    out, into = w.shape
    codes = cast("Tensor", w.tensors[0]).reshape(-1).view(torch.uint8)
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


# The arguments of ``dequantize_4bit``: five tensors, (out, in), the block size, the kind, a dtype.
def _dequantize_fake(packed: Tensor, *rest: Any) -> Tensor:
    return torch.empty(*rest[4:6], dtype=rest[-1], device=packed.device)


def _dequantize_plain(*args: Any) -> Tensor:
    return _four_bits_reference(Quantized(args[:5], args[5:7], *args[7:9]), args[9])


def _why_not_bitsandbytes(packed: Tensor, *_: Any) -> str:
    if not hasattr(torch.ops.bitsandbytes, "dequantize_4bit"):
        return "it is not loaded"
    return "" if packed.is_contiguous() else "the codes are not contiguous"


def _dequantize_by_bitsandbytes(*args: Any) -> Tensor:
    packed, scale, absmax_8bit, code, offset, out, into, blocksize, kind, dtype = args
    library = torch.ops.bitsandbytes
    if absmax_8bit is not None:
        inner = absmax_8bit, scale, code
        scale = library.dequantize_blockwise.default(*inner, NESTED, torch.float32) + offset
    result: Tensor = library.dequantize_4bit.default(
        packed, scale, blocksize, kind, [out, into], dtype
    )
    return result


_dequantize_op = direct(
    library_op(
        "dequantize_4bit(Tensor packed, Tensor absmax, Tensor? absmax_8bit, Tensor? absmax_code,"
        " Tensor? absmax_offset, int out, int into, int blocksize, str kind, ScalarType dtype)"
        " -> Tensor",
        "linear.quant_linear:dequantize",
        _dequantize_fake,
        plain=_dequantize_plain,
        libraries=(
            Implementation("bitsandbytes", _dequantize_by_bitsandbytes, _why_not_bitsandbytes),
        ),
    )
)


def _four_bits_kernel(w: Quantized, dtype: torch.dtype) -> Tensor | None:
    tensors = FourBits(*w.tensors)  # type: ignore[arg-type]
    if dtype is not torch.float64 and use_triton(tensors.absmax):
        result: Tensor = _dequantize_op(*tensors, *w.shape, w.blocksize, w.kind, dtype)
        return result
    # The compiled CPU kernel of bitsandbytes, where it is, is the fastest. It has none for odd rows
    # and for large blocks, and would start a compiler there.
    kernel = getattr(torch.ops.bitsandbytes, "dequantize_4bit", None)
    low = dtype in (torch.float32, torch.bfloat16, torch.float16)
    regular = w.shape[1] % 2 == 0 and w.blocksize < 2048
    if kernel is None or not low or not regular or tensors.absmax.is_cuda:
        return None
    unpacked: Tensor = kernel.default(
        tensors.packed, scales(w), w.blocksize, w.kind, list(w.shape), dtype
    )
    return unpacked


def _four_bits_misfits(w: Quantized) -> list[str]:
    reasons = _too_few_bits(w, 4)
    tensors = FourBits(*w.tensors)  # type: ignore[arg-type]
    if (tensors.absmax_8bit is None) != (tensors.absmax_offset is None):
        reasons.append("the scales of scales are not complete")
    return reasons


def _four_bits_example(m: Maker, out: int, into: int, kind: str) -> Quantized:
    spread, blocks = into**-0.5, -(-out * into // 64)
    codes = m.integers(256, -(-out * into // 2), 1, dtype=torch.uint8)
    if kind == "fp4":  # one of them has plain scales
        absmax = spread * (1 + m.normal(blocks, dtype=torch.float32).abs())
        return Quantized(FourBits(codes, absmax), (out, into), 64, kind)
    outer = spread * m.normal(-(-blocks // NESTED), dtype=torch.float32).abs()
    values = torch.linspace(-1, 1, 256, device=m.device)
    offset = torch.full((), 2 * spread, device=m.device)
    inner = m.integers(256, blocks, dtype=torch.uint8)
    return Quantized(FourBits(codes, outer, inner, values, offset), (out, into), 64, kind)


_FOUR_BITS = WeightFormat(
    _four_bits_reference, _four_bits_misfits, _four_bits_example, _four_bits_kernel
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
