"""``linear_logprob`` in plain PyTorch: tiles of rows, strips of tiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .head_tiles import accumulate, project, project_back, require_classes, row_tiles
from .linear_logprob_strips import (
    INTEGERS,
    Transform,
    dtype_of,
    each_strip,
    find_statistics,
    slope,
    unit_upstream,
)


def compute(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor | None, factor: Tensor | None,
    outputs: list[str], made: list[str], top_k: int, ignore_index: int, temperature: float,
    softcap: float, logit_scale: float,
) -> list[Tensor]:  # fmt: skip
    """The outputs, and the gradient terms of those in ``made``.

    Arguments are those of ``linear_logprob``, with rows in one dimension; ``factor``, 0-d, replaces
    ``logit_scale``, and ``softcap`` is 0 for none. One tensor (N,) or (N, top_k) for each output;
    then one (N, hidden), in x's dtype, for each name in ``made``: the gradient for x, over scale
    and temperature, for the upstream gradient ``unit_upstream``.
    """
    transform = Transform(logit_scale if factor is None else factor, softcap, temperature)
    index = _counted(targets, ignore_index, weight.shape[0] if "logprob" in outputs else None)
    count = x.shape[0] if index is None else index.numel()
    shapes = {name: (count, top_k) if name.startswith("topk") else (count,) for name in outputs}
    figures = {
        name: torch.empty(shape, dtype=dtype_of(name, x), device=x.device)
        for name, shape in shapes.items()
    }
    terms = [x.new_zeros(x.shape) for _ in made]
    tiles, height = _tiles(count, weight, x, 4)
    # the last term replaces the logits
    buffers = [x.new_empty(height, weight.shape[0]) for _ in made[1:]]
    for span, rows, _, logits in _each_tile(x, weight, bias, index, tiles, height):
        into = [*(buffer[: len(logits)] for buffer in buffers), *([logits] if made else [])]
        y = None if targets is None else targets[rows]
        for part, strip in each_strip(logits, transform, y, bool(made)):
            find_statistics(strip, outputs, top_k)
            for name in outputs:
                figures[name][span][part] = strip.stats[name]
            for name, buffer in zip(made, into, strict=True):
                upstream = {name: unit_upstream(name, weight.shape[0])}
                last = buffer is logits
                buffer[part] = slope(strip, upstream, may_write=last)
        for term, dlogits in zip(terms, into, strict=True):
            term[rows] = project_back(dlogits, weight)
    if index is not None:
        figures = {name: _spread(t, index, x.shape[0]) for name, t in figures.items()}
    return [*(figures[name] for name in outputs), *terms]


def differentiate(
    grads: list[Tensor | None], picked: Tensor | None, x: Tensor, weight: Tensor,
    bias: Tensor | None, targets: Tensor | None, factor: Tensor | None, outputs: list[str],
    ignore_index: int, temperature: float, softcap: float, logit_scale: float, wanted: list[bool],
) -> list[Tensor]:  # fmt: skip
    """The gradients of x, ``weight``, ``bias`` and ``factor``, all from one more projection.

    ``grads`` are of ``outputs``, ``picked`` (N, top_k) the classes of ``topk_values``, ``wanted``
    says which gradients are computed. dx (N, hidden) and dweight (vocabulary, hidden) have x's
    dtype, dbias (vocabulary,) and dfactor () are fp32 or fp64; one that is not wanted has no rows,
    and dfactor is 0.
    """
    wide = dtype_of("", x)
    transform = Transform(logit_scale if factor is None else factor, softcap, temperature)
    index = _counted(targets, ignore_index, None)
    upstream = _columns(outputs, grads, picked, transform, index)
    vocabulary, hidden = weight.shape
    dx = x.new_zeros(x.shape if wanted[0] else (0, hidden))
    dbias = torch.zeros(vocabulary if wanted[2] else 0, dtype=wide, device=x.device)
    dfactor = torch.zeros((), dtype=wide, device=x.device)
    dweight: Tensor | None = None
    tiles, height = _tiles(
        x.shape[0] if index is None else index.numel(), weight, x, 1 if wanted[1] else 4
    )
    for span, rows, xt, logits in _each_tile(x, weight, bias, index, tiles, height):
        y = None if targets is None else targets[rows]
        here = {name: t[span] for name, t in upstream.items()}
        dfactor += _to_gradient(logits, transform, y, here, wanted[3], dbias)
        if wanted[0]:
            dx[rows] = project_back(logits, weight)
        if wanted[1]:
            dweight = accumulate(dweight, logits, xt, wide)
    if dweight is None:
        dweight = x.new_zeros((vocabulary if wanted[1] else 0, hidden))
    return [dx, dweight.to(x.dtype), dbias, dfactor]


def _to_gradient(
    logits: Tensor, transform: Transform, y: Tensor | None, given: dict[str, Tensor],
    of_factor: bool, dbias: Tensor,
) -> Tensor:  # fmt: skip
    """Replace a tile's logits by their gradient, and add it to ``dbias``; returns the factor's."""
    needed = [name for name in ("entropy", "sum_p2") if name in given]
    dfactor = torch.zeros((), dtype=dbias.dtype, device=dbias.device)
    for part, strip in each_strip(logits, transform, y, True, keep_raw=of_factor):
        here = {name: t[part] for name, t in given.items()}
        find_statistics(strip, needed, 0)
        if "topk_indices" in here:
            strip.stats["topk_indices"] = here.pop("topk_indices")
        dl = slope(strip, here, may_write=True)
        if strip.raw is not None:
            dfactor += strip.raw.mul_(dl).sum()
        if isinstance(transform.scale, Tensor) or transform.scale != 1.0:
            dl.mul_(transform.scale)
        if dbias.numel():
            dbias += dl.sum(0)
        logits[part] = dl
    return dfactor


def _columns(
    outputs: Sequence[str], grads: Sequence[Tensor | None], picked: Tensor | None,
    transform: Transform, kept: Tensor | None,
) -> dict[str, Tensor]:  # fmt: skip
    """The upstream gradients over the temperature, of the rows that count, a column each."""
    upstream = {}
    for name, grad in zip(outputs, grads, strict=True):
        if grad is not None and name not in INTEGERS:
            column = grad if name == "topk_values" else grad.unsqueeze(1)
            upstream[name] = column / transform.temperature
    if "topk_values" in upstream:
        assert picked is not None
        upstream["topk_indices"] = picked
    return upstream if kept is None else {n: t.index_select(0, kept) for n, t in upstream.items()}


def _counted(targets: Tensor | None, ignore_index: int, classes: int | None) -> Tensor | None:
    """The rows that count, None for all; raises IndexError for a target that is no class."""
    if targets is None:
        return None
    index = (targets != ignore_index).nonzero().squeeze(1)
    if classes is not None and targets.device.type == "cpu":
        require_classes(targets.index_select(0, index), classes)
    return index if index.numel() < targets.numel() else None


def _spread(t: Tensor, kept: Tensor, rows: int) -> Tensor:
    return t.new_zeros(rows, *t.shape[1:]).index_copy_(0, kept, t)


def _tiles(rows: int, weight: Tensor, x: Tensor, part: int) -> tuple[list[tuple[int, int]], int]:
    tiles = row_tiles(rows, weight.shape[0] * x.element_size(), part)
    return tiles, max((stop - start for start, stop in tiles), default=0)


def _each_tile(
    x: Tensor, weight: Tensor, bias: Tensor | None, kept: Tensor | None,
    tiles: Sequence[tuple[int, int]], height: int,
) -> Iterator[tuple[slice, Tensor | slice, Tensor, Tensor]]:  # fmt: skip
    """Each tile: its place among the rows that count, their places in x, the rows, the logits."""
    # one buffer for all: fresh memory of this size would be faulted in page by page, tile by tile
    buffer = x.new_empty(height, weight.shape[0])
    for start, stop in tiles:
        span = slice(start, stop)
        rows = span if kept is None else kept[span]
        xt = x[rows]
        yield span, rows, xt, project(xt, weight, bias, buffer[: stop - start])
