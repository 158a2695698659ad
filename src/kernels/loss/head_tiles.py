"""Logits in tiles of rows, element-wise work in strips of tiles: what the ops over a head share.

A *tile* is some hundred rows of logits over the whole vocabulary: enough rows for an efficient
matmul, in memory of a fixed size whatever the batch. A *strip* is the few rows of a tile whose fp32
softmax fits the cores' caches: all element-wise work happens there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..linear.products import beside, gradient_of_b, scaled_mm
from ..matmul import addmm, addmm_, mm

TILE_BYTES = 64 << 20
"""What one tile of logits takes, or up to twice that if it has less than ``TILE_ROWS`` then."""

GPU_TILE_BYTES = 256 << 20
"""What a tile takes on a GPU at most, where the library multiplies; its gradient replaces it."""

TILE_ROWS = 512
"""Fewer rows than this and the matmuls lose speed."""

STRIP_ELEMENTS = 1 << 18
"""fp32 elements of a strip per thread: with its softmax they fill a 2 MiB second-level cache."""

FEW_ROWS = 16
"""With fewer rows than about 12, MKL's fp32 matmul sums in one long chain: ten times the error."""

FEW_CLASSES = 4096
"""Classes that are multiplied at once with few rows: on one thread 8,192 are too long a chain."""

CHUNK_CLASSES = 8192
"""Classes that are multiplied at once where the sum over all must be better than the matmul's."""


def row_tiles(rows: int, row_bytes: int, part: int = 1) -> list[tuple[int, int]]:
    """(start, stop) of tiles of nearly equal height; ``row_bytes`` is what a row's logits take.

    ``part`` is how many times less memory a tile shall take. At 4, two matmuls per tile are as fast
    (1,024 x 576 x 49,152 in bf16, one thread); the gradient of the head, added up over the tiles,
    is not.
    """
    size, least = TILE_BYTES // part, TILE_ROWS // part
    most = max(1, size // row_bytes, min(least, 2 * size // row_bytes))
    count = -(-rows // most)
    edges = [i * rows // count for i in range(count + 1)] if count else [0]
    return list(itertools.pairwise(edges))


def most_logits(on_cpu: bool) -> int:
    """Bytes that logits and all temporaries of their size take at one time, at most."""
    return 2 * TILE_BYTES if on_cpu else GPU_TILE_BYTES


def row_strips(rows: int, vocabulary: int) -> Iterator[slice]:
    """Split a tile of ``rows`` into strips; the first is the highest."""
    height = max(1, STRIP_ELEMENTS * torch.get_num_threads() // vocabulary)
    return (slice(start, min(rows, start + height)) for start in range(0, rows, height))


def project(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """``x·Wᵀ + bias`` in the memory of ``out``."""
    w = weight.t()
    return mm(x, w, out=out) if bias is None else addmm(bias, x, w, out=out)


def project_back(dlogits: Tensor, weight: Tensor) -> Tensor:
    """``dlogits · weight`` (R, hidden), a sum over the whole vocabulary."""
    rows = dlogits.shape[0]
    if rows >= FEW_ROWS or dlogits.dtype is not torch.float32:
        return mm(dlogits, weight)
    padded = pad(dlogits, (0, 0, 0, FEW_ROWS - rows))
    parts = zip(padded.split(FEW_CLASSES, 1), weight.split(FEW_CLASSES), strict=True)
    return torch.stack([mm(d, w) for d, w in parts]).sum(0)[:rows]


def accumulate(total: Tensor | None, dlogits: Tensor, x: Tensor, wide: torch.dtype) -> Tensor:
    """``total (vocabulary, hidden) + dlogitsᵀ · x``; the sum over tiles is fp32 or wider."""
    if total is None:
        return mm(dlogits.t(), x)
    if total.dtype is not wide:
        total = total.to(wide)
    if x.dtype is wide:
        return total.addmm_(dlogits.t(), x)
    for start in range(0, total.shape[0], CHUNK_CLASSES):
        part = slice(start, start + CHUNK_CLASSES)
        total[part] += mm(dlogits[:, part].t(), x)
    return total


# An adapter of the head adds ``narrow (N, r) · Bᵀ`` to the logits. What is as large as them is in
# their dtype, and what is narrow in the adapter's, as in ``kernels/linear``.


def add_update(logits: Tensor, narrow: Tensor, lora_b: Tensor) -> None:
    """Add ``narrow · Bᵀ`` to ``logits`` (R, vocabulary) in place."""
    kind = logits.dtype
    addmm_(logits, narrow.to(kind), lora_b.to(kind).t())


def project_update_back(dlogits: Tensor, lora_b: Tensor) -> Tensor:
    """``dlogits · B`` (R, r), in the dtype of B."""
    if dlogits.dtype is lora_b.dtype:
        return project_back(dlogits, lora_b)
    return scaled_mm(beside(dlogits, lora_b), lora_b, 1.0)


def empty_updates(
    x: Tensor, narrow: Tensor | None, lora_b: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """Zeros for the gradients of ``narrow`` and ``lora_b``, the latter fp32 or wider."""
    of_narrow = x.new_zeros(0) if narrow is None or not wanted[3] else torch.zeros_like(narrow)
    shape = (0,) if lora_b is None or not wanted[4] else lora_b.shape
    kind = torch.promote_types(x.dtype, torch.float32)
    return of_narrow, x.new_zeros(shape, dtype=kind)


def accumulate_update(total: Tensor, dlogits: Tensor, narrow: Tensor) -> None:
    """Add ``dlogitsᵀ · narrow`` to ``total`` (vocabulary, r), which is fp32 or wider."""
    for start in range(0, total.shape[0], CHUNK_CLASSES):
        part = slice(start, start + CHUNK_CLASSES)
        total[part] += gradient_of_b(narrow, beside(dlogits[:, part], narrow))


def scale_and_cap(
    strip: Tensor, scale: Tensor | float, softcap: float, slope: Tensor | None = None
) -> None:
    """Scale and cap logits (R, V) in place, in their own dtype, rounding where the model rounds.

    ``slope`` (R, V), fp32 or fp64, takes the derivative of the capped logits.
    """
    if isinstance(scale, Tensor) or scale != 1.0:
        strip.mul_(scale)
    if softcap:
        strip.div_(softcap).tanh_()
        if slope is not None:  # of tanh itself: where it is near 1, another rounding is too much
            t = strip if strip.dtype is slope.dtype else slope.copy_(strip)
            torch.addcmul(slope.new_ones(()), t, t, value=-1.0, out=slope)
        strip.mul_(softcap)


def softmax_into(f: Tensor, out: Tensor, exact: bool) -> Tensor:
    """The softmax of each row of ``f`` (R, V), fp32 or fp64, in the memory of ``out``.

    ``exact`` says that the logits have not been rounded to fewer bits before.
    """
    p = torch.softmax(f, 1, out=out)
    if exact:  # its running sum over a large vocabulary is 1e-6 off: divide by a better one
        p.div_(p.sum(1, keepdim=True))
    return p


def target_logprobs(f: Tensor, p: Tensor, y: Tensor) -> Tensor:
    """The log-probabilities (R,) of targets ``y`` (R, 1); ``p`` is the softmax of logits ``f``."""
    target_p = p.gather(1, y).squeeze(1)
    logprobs = target_p.log()  # l_y - lse, without another pass over f
    underflow = target_p < 1e-30  # too near the end of fp32's range: read it from the logits
    if bool(underflow.any()):
        these = f[underflow]
        logprobs[underflow] = these.gather(1, y[underflow]).squeeze(1) - these.logsumexp(1)
    return logprobs


def require_classes(targets: Tensor, vocabulary: int) -> None:
    """Raise what PyTorch's cross entropy raises for the first target that is no class."""
    wrong = (targets < 0).logical_or_(targets >= vocabulary)
    if bool(wrong.any()):
        raise IndexError(f"Target {int(targets[wrong][0])} is out of bounds.")
