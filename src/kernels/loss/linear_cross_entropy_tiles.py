"""``linear_cross_entropy`` in plain PyTorch: tiles of rows, strips of tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .head_tiles import (
    accumulate,
    accumulate_update,
    add_update,
    empty_updates,
    project,
    project_back,
    project_update_back,
    require_classes,
    row_strips,
    row_tiles,
    scale_and_cap,
    softmax_into,
    target_logprobs,
)


@dataclass(frozen=True)
class _Loss:
    smoothing: float
    softcap: float
    scale: float


def compute(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int,
    label_smoothing: float, softcap: float, logit_scale: float, wanted: list[bool],
    narrow: Tensor | None = None, lora_b: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The summed loss, how many rows count, and the gradients of the sum over ``logit_scale``.

    ``wanted`` says which gradients are computed, of x, ``weight``, ``bias``, ``narrow`` and
    ``lora_b``; ``softcap`` is 0 for none. Loss and count are 0-d, fp32 or fp64; dx (N, hidden) and
    dweight (vocabulary, hidden) have x's dtype, but dweight is fp32 for fp16, where a sum may leave
    the range; dbias (vocabulary,) and dlora_b (vocabulary, r) have the loss's dtype, dnarrow (N, r)
    that of ``narrow``. A gradient that is not wanted has no rows.
    """
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    loss = _Loss(label_smoothing, softcap, logit_scale)
    vocabulary, hidden = weight.shape
    counted = (labels != ignore_index).nonzero().squeeze(1)
    some = counted.numel() < labels.numel()
    if labels.device.type == "cpu":
        require_classes(labels.index_select(0, counted), vocabulary)
    losses = torch.empty(counted.numel(), dtype=wide, device=x.device)
    dx = x.new_zeros(x.shape if wanted[0] else (0, hidden))
    dbias = torch.zeros(vocabulary if wanted[2] else 0, dtype=wide, device=x.device)
    dweight: Tensor | None = None
    dnarrow, dlora_b = empty_updates(x, narrow, lora_b, wanted)
    tiles = row_tiles(counted.numel(), vocabulary * x.element_size())
    # one buffer for all: fresh memory of this size would be faulted in page by page, tile by tile
    buffer = x.new_empty(max((stop - start for start, stop in tiles), default=0), vocabulary)
    for start, stop in tiles:
        rows = counted[start:stop]
        xt = x.index_select(0, rows) if some else x[start:stop]
        targets = labels.index_select(0, rows)
        logits = project(xt, weight, bias, buffer[: stop - start])
        if narrow is not None and lora_b is not None:
            narrow_rows = narrow.index_select(0, rows)
            add_update(logits, narrow_rows, lora_b)
        losses[start:stop] = _softmax(logits, targets, loss, any(wanted), dbias)
        if wanted[0] and some:
            dx.index_copy_(0, rows, project_back(logits, weight))
        elif wanted[0]:
            dx[start:stop] = project_back(logits, weight)
        if wanted[1]:
            dweight = accumulate(dweight, logits, xt, wide)
        if narrow is not None and lora_b is not None:
            if wanted[3]:
                dnarrow.index_copy_(0, rows, project_update_back(logits, lora_b))
            if wanted[4]:
                accumulate_update(dlora_b, logits, narrow_rows)
    if dweight is None:
        dweight = x.new_zeros((vocabulary if wanted[1] else 0, hidden))
    count = losses.new_full((), counted.numel())
    kind = wide if x.dtype is torch.float16 else x.dtype
    return losses.sum(), count, dx, dweight.to(kind), dbias, dnarrow, dlora_b


def _softmax(logits: Tensor, targets: Tensor, loss: _Loss, gradient: bool, dbias: Tensor) -> Tensor:
    # Each row's loss (R,); ``logits`` (R, vocabulary) become their gradient in place if asked.
    # With ``l`` the scaled and capped logits, ``p`` their softmax, ``y`` the label and ``e`` the
    # smoothing: ``loss = lse(l) - (1 - e)·l_y - e·mean(l)``, ``dl = p - e/V - (1 - e)·[v = y]``.
    wide, vocabulary = dbias.dtype, logits.shape[1]
    strips = list(row_strips(*logits.shape))
    height = strips[0].stop if strips else 0
    losses = torch.empty(logits.shape[0], dtype=wide, device=logits.device)
    softmax = torch.empty(height, vocabulary, dtype=wide, device=logits.device)
    in_place = logits.dtype is wide
    wider = softmax if in_place else torch.empty_like(softmax)
    slopes = torch.empty_like(softmax) if gradient and loss.softcap else None
    for part in strips:
        strip, y = logits[part], targets[part, None]
        rows = strip.shape[0]
        slope = None if slopes is None else slopes[:rows]
        scale_and_cap(strip, loss.scale, loss.softcap, slope)
        f = strip if in_place else wider[:rows].copy_(strip)
        p = softmax_into(f, softmax[:rows], exact=in_place)
        losses[part] = _row_losses(f, p, y, loss.smoothing)
        if gradient:
            if loss.smoothing:
                p.sub_(loss.smoothing / vocabulary)
            p.scatter_add_(1, y, p.new_full((rows, 1), loss.smoothing - 1.0))
            if slope is not None:  # the scale itself is left to backward
                p.mul_(slope)
            strip.copy_(p)
            if dbias.numel():
                dbias += p.sum(0)
    return losses


def _row_losses(f: Tensor, p: Tensor, y: Tensor, smoothing: float) -> Tensor:
    losses = target_logprobs(f, p, y).neg_()
    if smoothing:
        losses += smoothing * (f.gather(1, y).squeeze(1) - f.mean(1))
    return losses
