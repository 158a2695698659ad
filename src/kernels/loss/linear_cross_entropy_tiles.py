"""How ``linear_cross_entropy`` runs in plain PyTorch: tiles of rows, strips of tiles.

A *tile* is some hundred rows of logits over the whole vocabulary: enough rows for an efficient
matmul, in memory of a fixed size whatever the batch. A *strip* is the few rows of a tile whose fp32
softmax fits the cores' caches: all element-wise work happens there.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..matmul import addmm, mm

TILE_BYTES = 64 << 20
"""What one tile of logits takes, or up to twice that if it has less than ``TILE_ROWS`` then."""

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


@dataclass(frozen=True)
class _Loss:
    """What turns logits into a loss, besides the labels."""

    smoothing: float
    softcap: float
    scale: float


def compute(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int,
    label_smoothing: float, softcap: float, logit_scale: float, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The summed loss, how many rows count, and the gradients of the sum over ``logit_scale``.

    Args:
        x: (N, hidden).
        weight: (vocabulary, hidden).
        bias: (vocabulary,) or None.
        labels: (N,).
        ignore_index: the label of rows to leave out.
        label_smoothing: weight of the uniform distribution.
        softcap: bound of the logits, or 0.
        logit_scale: factor on the logits.
        wanted: whether the gradients of x, ``weight`` and ``bias`` are.

    Returns:
        loss and count (0-d, fp32 or fp64); dx (N, hidden) in x's dtype; dweight (vocabulary,
        hidden) in x's dtype, but fp32 for fp16, where a sum may leave the range; dbias
        (vocabulary,) in the loss's dtype. A gradient that is not wanted has no rows.
    """
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    loss = _Loss(label_smoothing, softcap, logit_scale)
    vocabulary, hidden = weight.shape
    kept = (labels != ignore_index).nonzero().squeeze(1)
    some = kept.numel() < labels.numel()
    if labels.device.type == "cpu":
        _require_classes(labels.index_select(0, kept), vocabulary)
    losses = torch.empty(kept.numel(), dtype=wide, device=x.device)
    dx = x.new_zeros(x.shape if wanted[0] else (0, hidden))
    dbias = torch.zeros(vocabulary if wanted[2] else 0, dtype=wide, device=x.device)
    dweight: Tensor | None = None
    tiles = _tiles(kept.numel(), vocabulary * x.element_size())
    # one buffer for all: fresh memory of this size would be faulted in page by page, tile by tile
    buffer = x.new_empty(max((stop - start for start, stop in tiles), default=0), vocabulary)
    for start, stop in tiles:
        rows = kept[start:stop]
        xt = x.index_select(0, rows) if some else x[start:stop]
        targets = labels.index_select(0, rows)
        logits = _logits(xt, weight, bias, buffer[: stop - start])
        losses[start:stop] = _softmax(logits, targets, loss, any(wanted), dbias)
        if wanted[0] and some:
            dx.index_copy_(0, rows, _back(logits, weight))
        elif wanted[0]:
            dx[start:stop] = _back(logits, weight)
        if wanted[1]:
            dweight = _accumulate(dweight, logits, xt, wide)
    if dweight is None:
        dweight = x.new_zeros((vocabulary if wanted[1] else 0, hidden))
    count = losses.new_full((), kept.numel())
    narrow = wide if x.dtype is torch.float16 else x.dtype
    return losses.sum(), count, dx, dweight.to(narrow), dbias


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """``x·Wᵀ + bias`` in the memory of ``out``."""
    w = weight.t()
    return mm(x, w, out=out) if bias is None else addmm(bias, x, w, out=out)


def _require_classes(targets: Tensor, vocabulary: int) -> None:
    """Raise what PyTorch's cross entropy raises for the first label that is no class."""
    wrong = (targets < 0).logical_or_(targets >= vocabulary)
    if bool(wrong.any()):
        raise IndexError(f"Target {int(targets[wrong][0])} is out of bounds.")


def _tiles(rows: int, row_bytes: int) -> list[tuple[int, int]]:
    """Split ``rows`` into tiles of nearly equal height."""
    most = max(1, TILE_BYTES // row_bytes, min(TILE_ROWS, 2 * TILE_BYTES // row_bytes))
    count = -(-rows // most)
    edges = [i * rows // count for i in range(count + 1)] if count else [0]
    return list(itertools.pairwise(edges))


def _softmax(logits: Tensor, targets: Tensor, loss: _Loss, gradient: bool, dbias: Tensor) -> Tensor:
    """Each row's loss (R,); ``logits`` (R, vocabulary) become their gradient in place if asked.

    With ``l`` the scaled and capped logits, ``p`` their softmax, ``y`` the label and ``e`` the
    smoothing: ``loss = lse(l) - (1 - e)·l_y - e·mean(l)``, ``dl = p - e/V - (1 - e)·[v = y]``.
    """
    wide, vocabulary = dbias.dtype, logits.shape[1]
    height = max(1, STRIP_ELEMENTS * torch.get_num_threads() // vocabulary)
    height = min(height, logits.shape[0])
    losses = torch.empty(logits.shape[0], dtype=wide, device=logits.device)
    softmax = torch.empty(height, vocabulary, dtype=wide, device=logits.device)
    in_place = logits.dtype is wide
    wider = softmax if in_place else torch.empty_like(softmax)
    for start in range(0, logits.shape[0], height):
        strip, y = logits[start : start + height], targets[start : start + height, None]
        rows = strip.shape[0]
        if loss.scale != 1.0:  # in the logits' own dtype, rounding where the model rounds
            strip.mul_(loss.scale)
        if loss.softcap:
            strip.div_(loss.softcap).tanh_().mul_(loss.softcap)
        f = strip if in_place else wider[:rows].copy_(strip)
        p = torch.softmax(f, 1, out=softmax[:rows])
        if in_place:  # its running sum over a large vocabulary is 1e-6 off: divide by a better one
            p.div_(p.sum(1, keepdim=True))
        losses[start : start + rows] = _row_losses(f, p, y, loss.smoothing)
        if gradient:
            if loss.smoothing:
                p.sub_(loss.smoothing / vocabulary)
            p.scatter_add_(1, y, p.new_full((rows, 1), loss.smoothing - 1.0))
            if loss.softcap:  # dtanh; the scale itself is left to backward
                p.addcmul_(p, f.square_(), value=-1.0 / loss.softcap**2)
            strip.copy_(p)
            if dbias.numel():
                dbias += p.sum(0)
    return losses


def _row_losses(f: Tensor, p: Tensor, y: Tensor, smoothing: float) -> Tensor:
    """The losses (R,) of logits ``f``, their softmax ``p`` (R, vocabulary) and labels (R, 1)."""
    label_p = p.gather(1, y).squeeze(1)
    losses = label_p.log().neg_()  # lse - l_y, without another pass over f
    lost = label_p < 1e-30  # too near the end of fp32's range: read it from the logits
    if bool(lost.any()):
        these = f[lost]
        losses[lost] = these.logsumexp(1) - these.gather(1, y[lost]).squeeze(1)
    if smoothing:
        losses += smoothing * (f.gather(1, y).squeeze(1) - f.mean(1))
    return losses


def _back(dlogits: Tensor, weight: Tensor) -> Tensor:
    """``dlogits · weight`` (R, hidden), a sum over the whole vocabulary."""
    rows = dlogits.shape[0]
    if rows >= FEW_ROWS or dlogits.dtype is not torch.float32:
        return mm(dlogits, weight)
    padded = pad(dlogits, (0, 0, 0, FEW_ROWS - rows))
    parts = zip(padded.split(FEW_CLASSES, 1), weight.split(FEW_CLASSES), strict=True)
    return torch.stack([mm(d, w) for d, w in parts]).sum(0)[:rows]


def _accumulate(total: Tensor | None, dlogits: Tensor, x: Tensor, wide: torch.dtype) -> Tensor:
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
