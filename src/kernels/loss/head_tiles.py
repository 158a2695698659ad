"""Logits in tiles of rows, and the products that make them and their gradients.

A *tile* is some hundred rows of logits over the whole vocabulary: enough rows for an efficient
matmul, in memory of a fixed size for any batch. A *strip* is the few rows of a tile whose fp32
softmax fits the cores' caches: all element-wise work happens there (``head_strips.py``).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..linear.products import beside, gradient_of_b, scaled_mm
from ..matmul import addmm, addmm_, mm
from .head_strips import dtype_of, dtype_of_sums

TILE_BYTES = 64 << 20
"""Bytes of one tile of logits, or up to twice that if it has less than ``TILE_ROWS`` then."""

GPU_TILE_BYTES = 256 << 20
"""Bytes of a tile on a GPU at most, where the library multiplies; its gradient replaces it."""

TILE_ROWS = 512
"""Fewer rows than this and the matmuls lose speed."""

FEW_ROWS = 16
"""With fewer rows than about 12, MKL's fp32 matmul sums in one long chain: ten times the error."""

FEW_CLASSES = 4096
"""Classes that are multiplied at once with few rows: on one thread 8,192 are too long a chain."""

CHUNK_CLASSES = 8192
"""Classes that are multiplied at once where the sum over all must be better than the matmul's."""


def row_tiles(rows: int, row_bytes: int, part: int = 1) -> list[tuple[int, int]]:
    """Return (start, stop) of tiles of nearly equal height, for rows of ``row_bytes`` of logits.

    A tile takes ``part`` times less memory. At 4, two matmuls per tile are as fast (1,024 x 576 x
    49,152 in bf16, one thread); the gradient of the head, added up over the tiles, is not.
    """
    size, least = TILE_BYTES // part, TILE_ROWS // part
    most = max(1, size // row_bytes, min(least, 2 * size // row_bytes))
    count = -(-rows // most)
    edges = [i * rows // count for i in range(count + 1)] if count else [0]
    return list(itertools.pairwise(edges))


def most_logits(on_cpu: bool) -> int:
    """Bytes that logits and all temporaries of their size take at one time, at most."""
    return 2 * TILE_BYTES if on_cpu else GPU_TILE_BYTES


def project(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Compute ``x·Wᵀ + bias`` in the memory of ``out``."""
    w = weight.t()
    return mm(x, w, out=out) if bias is None else addmm(bias, x, w, out=out)


def project_back(dlogits: Tensor, weight: Tensor) -> Tensor:
    """Compute ``dlogits · weight`` (R, hidden), a sum over the whole vocabulary."""
    rows = dlogits.shape[0]
    if rows >= FEW_ROWS or dlogits.dtype is not torch.float32:
        return mm(dlogits, weight)
    padded = pad(dlogits, (0, 0, 0, FEW_ROWS - rows))
    parts = zip(padded.split(FEW_CLASSES, 1), weight.split(FEW_CLASSES), strict=True)
    return torch.stack([mm(d, w) for d, w in parts]).sum(0)[:rows]


def accumulate(total: Tensor | None, dlogits: Tensor, x: Tensor, wide: torch.dtype) -> Tensor:
    """Return ``total (vocabulary, hidden) + dlogitsᵀ · x``; sums over tiles are fp32 or wider."""
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


# An adapter of the head adds ``narrow (N, r) · Bᵀ`` to the logits. Tensors as large as the logits
# are in their dtype, and narrow ones in the adapter's, as in ``kernels/linear``.


def add_update(logits: Tensor, narrow: Tensor, lora_b: Tensor) -> None:
    """Add ``narrow · Bᵀ`` to ``logits`` (R, vocabulary) in place."""
    kind = logits.dtype
    addmm_(logits, narrow.to(kind), lora_b.to(kind).t())


def project_update_back(dlogits: Tensor, lora_b: Tensor) -> Tensor:
    """Compute ``dlogits · B`` (R, r), in the dtype of B."""
    if dlogits.dtype is lora_b.dtype:
        return project_back(dlogits, lora_b)
    return scaled_mm(beside(dlogits, lora_b), lora_b, 1.0)


def empty_updates(
    x: Tensor, narrow: Tensor | None, lora_b: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """Zeros for the gradients of ``narrow`` and ``lora_b``, the latter fp32 or wider.

    ``wanted`` are flags of these two; without one, there are no elements.
    """
    of_narrow = x.new_zeros(0) if narrow is None or not wanted[0] else torch.zeros_like(narrow)
    shape = (0,) if lora_b is None or not wanted[1] else lora_b.shape
    kind = torch.promote_types(x.dtype, torch.float32)
    return of_narrow, x.new_zeros(shape, dtype=kind)


def accumulate_update(total: Tensor, dlogits: Tensor, narrow: Tensor) -> None:
    """Add ``dlogitsᵀ · narrow`` to ``total`` (vocabulary, r), which is fp32 or wider."""
    for start in range(0, total.shape[0], CHUNK_CLASSES):
        part = slice(start, start + CHUNK_CLASSES)
        total[part] += gradient_of_b(narrow, beside(dlogits[:, part], narrow))


# ----------------------------------------------------------------------------- sums over the tiles


@dataclass
class HeadTile:
    """Some of the rows that count, and their logits."""

    span: slice  # places among the rows that count
    rows: Tensor | slice  # places in x
    x: Tensor
    narrow: Tensor | None
    logits: Tensor  # (R, vocabulary); may have room for more columns


class HeadGradients:
    """Gradients of the operands, from the gradients of the logits tile by tile.

    ``wanted``: flags of x, weight, bias, narrow, lora_b and the learnt scale of the logits.
    """

    def __init__(
        self, x: Tensor, weight: Tensor, narrow: Tensor | None, lora_b: Tensor | None,
        wanted: Sequence[bool],
    ) -> None:  # fmt: skip
        self.x, self.weight, self.lora_b, self.wanted = x, weight, lora_b, wanted
        self.wide = dtype_of("", x)
        self.dx = x.new_zeros(x.shape if wanted[0] else (0, x.shape[1]))
        self.dbias = x.new_zeros(len(weight) if wanted[2] else 0, dtype=self.wide)
        self.dweight: Tensor | None = None
        self.dnarrow, self.dlora_b = empty_updates(x, narrow, lora_b, wanted[3:])
        self.dfactor = x.new_zeros((), dtype=self.wide)

    def add(self, tile: HeadTile, dlogits: Tensor) -> None:
        """Add the gradients of a tile but those of bias and scale, from those of its logits."""
        if self.wanted[0]:
            _put(self.dx, tile.rows, self.of_rows(tile, dlogits))
        if self.wanted[1]:
            self.add_to_weight(tile, dlogits)
        if tile.narrow is not None and self.lora_b is not None:
            dlogits = dlogits[:, : len(self.weight)]
            if self.dnarrow.numel():
                _put(self.dnarrow, tile.rows, project_update_back(dlogits, self.lora_b))
            if self.dlora_b.numel():
                accumulate_update(self.dlora_b, dlogits, tile.narrow)

    def of_rows(self, tile: HeadTile, dlogits: Tensor) -> Tensor:
        """Compute the gradient of a tile's rows."""
        return project_back(dlogits, self.weight)

    def add_to_weight(self, tile: HeadTile, dlogits: Tensor) -> None:
        """Add the gradient of the head from a tile."""
        self.dweight = accumulate(self.dweight, dlogits, tile.x, self.wide)

    def sums(self) -> list[Tensor]:
        """The gradients of weight, bias, narrow, lora_b and scale."""
        dweight = self.dweight
        if dweight is None:
            dweight = self.x.new_zeros(len(self.weight) if self.wanted[1] else 0, self.x.shape[1])
        kept = dweight.to(dtype_of_sums(self.x))
        return [kept, self.dbias, self.dnarrow, self.dlora_b, self.dfactor]


def _put(out: Tensor, rows: Tensor | slice, values: Tensor) -> None:
    if isinstance(rows, slice):
        out[rows] = values
    else:
        out.index_copy_(0, rows, values)
