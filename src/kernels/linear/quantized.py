"""Quantized weights: how they are laid out, and back to floating point.

NF4 and FP4 with or without a quantized scale (Dettmers et al., "QLoRA", 2023), and rows of int8
(Dettmers et al., "LLM.int8()", 2022), as bitsandbytes packs them. It is not imported here: where
there is such a weight, whoever made it has registered the operators that are used if present.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..direct import direct
from ..launch import library_op, use_triton
from ..op import Maker

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
    """A frozen matrix (out, in) in few bits.

    In 4 bits, ``packed`` holds two values to a byte, the first one in the high half, rows one after
    the other, in any dtype of storage; ``absmax`` holds in fp32 the scale of each block, or, with
    the three last fields, of each 256 scales. In int8, ``packed`` is (out, in), and ``absmax``
    (out,) the largest absolute value of each row.
    """

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, int]  # (out, in)
    blocksize: int  # how many values share a scale; not used by int8
    kind: str  # ``"nf4"``, ``"fp4"`` or ``"int8"``
    absmax_8bit: Tensor | None = None  # uint8, the quantized scale of each block
    absmax_code: Tensor | None = None  # (256,) fp32, the values of its codes
    absmax_offset: Tensor | None = None  # () fp32, what is added to all scales

    def nbytes(self) -> int:
        """Bytes in memory."""
        tensors = (t for t in self if isinstance(t, Tensor))
        return sum(t.numel() * t.element_size() for t in tensors)


def scales(w: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """The scale of each block of 4-bit values, (blocks,) in ``dtype``."""
    if w.absmax_8bit is None or w.absmax_code is None or w.absmax_offset is None:
        return w.absmax.to(dtype)
    result = w.absmax_code.to(dtype).index_select(0, w.absmax_8bit.int())
    whole, outer = result.numel() // NESTED, w.absmax.to(dtype)
    result[: whole * NESTED].view(whole, NESTED).mul_(outer[:whole, None])
    result[whole * NESTED :].mul_(outer[-1])
    return result.add_(w.absmax_offset.to(dtype))


def dequantize_reference(w: Quantized, dtype: torch.dtype) -> Tensor:
    """The matrix (out, in) in ``dtype``, in plain PyTorch: it defines the values."""
    # Value and scale are multiplied in fp32 (fp64 in fp64) and rounded once.
    wide = torch.promote_types(dtype, torch.float32)
    out, into = w.shape
    if w.kind == "int8":
        return w.packed.to(dtype).mul_(w.absmax.to(wide).unsqueeze(1).mul(1.0 / 127.0))
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
    return dequantize_reference(
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


def dequantize(w: Quantized, dtype: torch.dtype) -> Tensor:
    """The matrix (out, in) in ``dtype``: bit for bit what bitsandbytes makes of it."""
    # Its compiled CPU kernel, where it is, is the fastest. It has none for odd rows and for large
    # blocks, and would start a compiler there.
    if w.kind != "int8" and dtype is not torch.float64 and use_triton(w.absmax):
        rest = (w.absmax_8bit, w.absmax_code, w.absmax_offset)
        result: Tensor = _direct_dequantize(
            w.packed, w.absmax, *rest, *w.shape, w.blocksize, w.kind, dtype
        )
        return result
    kernel = getattr(torch.ops.bitsandbytes, "dequantize_4bit", None)
    low = dtype in (torch.float32, torch.bfloat16, torch.float16)
    regular = w.kind != "int8" and w.shape[1] % 2 == 0 and w.blocksize < 2048
    if kernel is not None and low and regular and not w.absmax.is_cuda:
        unpacked: Tensor = kernel.default(
            w.packed, scales(w), w.blocksize, w.kind, list(w.shape), dtype
        )
        return unpacked
    return dequantize_reference(w, dtype)


def example_of_quantized(
    m: Maker, out: int, into: int, kind: str = "nf4", nested: bool = True
) -> Quantized:
    """A matrix (out, in) for examples, so that products are about one."""
    spread, blocks = into**-0.5, -(-out * into // 64)
    if kind == "int8":
        packed = m.integers(255, out, into, dtype=torch.int8)
        scales_of_rows = spread * (1 + m.normal(out, dtype=torch.float32).abs())
        return Quantized(packed, scales_of_rows, (out, into), into, kind)
    codes = m.integers(256, -(-out * into // 2), 1, dtype=torch.uint8)
    if not nested:
        absmax = spread * (1 + m.normal(blocks, dtype=torch.float32).abs())
        return Quantized(codes, absmax, (out, into), 64, kind)
    outer = spread * m.normal(-(-blocks // NESTED), dtype=torch.float32).abs()
    values = torch.linspace(-1, 1, 256, device=m.device)
    offset = torch.full((), 2 * spread, device=m.device)
    inner = m.integers(256, blocks, dtype=torch.uint8)
    return Quantized(codes, outer, (out, into), 64, kind, inner, values, offset)
