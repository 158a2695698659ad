"""The head op in plain PyTorch: tiles of rows, strips of tiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from .head_strips import (
    OF_TARGETS,
    LogitStrip,
    Transform,
    Upstream,
    dtype_of,
    each_strip,
    find_statistics,
    slope,
    upstreams_of,
)
from .head_tiles import HeadGradients, HeadTile, add_update, project, row_tiles


def compute(
    x: Tensor, weight: Tensor, bias: Tensor | None, narrow: Tensor | None, lora_b: Tensor | None,
    targets: Tensor | None, factor: Tensor | None, outputs: list[str], upstream: list[str],
    terms: list[float], grads: list[Tensor], top_k: int, ignore_index: int, temperature: float,
    softcap: float, logit_scale: float, wanted: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Compute outputs of a head's logits, and the gradients of weighted sums of outputs.

    Operands are those of ``head``, with rows in one dimension; ``factor``, 0-d, replaces
    ``logit_scale``, and ``softcap`` is 0 for none. The sums are of the outputs that ``upstream``
    names: several with constant weights, of which ``terms`` has a row for each sum, or one sum with
    weights for each row, ``grads``: (N,), or (N, top_k) for "topk_values", whose classes are those
    of "topk_indices".

    Returns:
        One tensor (N,) or (N, top_k) for each output, then dx (N, hidden) of each sum, in x's
        dtype. If ``wanted`` has more than x, the gradients of ``weight``, ``bias``, ``narrow``,
        ``lora_b`` and ``factor`` of the one sum; a gradient that is not wanted has no elements, and
        dfactor () is 0. dweight has x's dtype, but fp32 for fp16, where a sum may leave the range;
        dnarrow that of ``narrow``; the others are fp32 or fp64. All gradients are times the
        temperature, and unless that of ``factor`` is wanted, over the scale.
    """
    transform = Transform(logit_scale if factor is None else factor, softcap, temperature)
    index = None if targets is None else (targets != ignore_index).nonzero().squeeze(1)
    if index is not None and targets is not None:
        if targets.device.type == "cpu" and not {*OF_TARGETS}.isdisjoint(outputs):
            _require_classes(targets.index_select(0, index), len(weight))
        index = index if len(index) < len(x) else None
    count = len(x) if index is None else len(index)
    figures = {
        name: x.new_empty(
            (count, top_k) if name.startswith("topk") else (count,),
            dtype=dtype_of(name, x),
        )
        for name in outputs
    }
    needed = [*outputs, *(name for name in upstream if name in ("entropy", "sum_p2"))]
    upstreams = upstreams_of(upstream, terms, [_column(t, index) for t in grads])
    gradients = [HeadGradients(x, weight, narrow, lora_b, wanted) for _ in upstreams]
    # smaller tiles where several are held at a time; for one, they cost 13% in fp32
    spans = row_tiles(count, len(weight) * x.element_size(), 4 if len(upstreams) > 1 else 1)
    height = max((stop - start for start, stop in spans), default=0)
    # the last gradient replaces the logits
    buffers = [x.new_empty(height, len(weight)) for _ in upstreams[1:]]
    for tile in _each_tile(x, weight, bias, narrow, lora_b, index, spans, height):
        logits = tile.logits
        into = [*(b[: len(logits)] for b in buffers), *([logits] if upstreams else [])]
        y = None if targets is None else targets[tile.rows]
        found = {name: t[tile.span] for name, t in figures.items()}
        weights = [_part(one, tile.span) for one in upstreams]
        for part, strip in each_strip(logits, transform, y, bool(upstreams), keep_raw=wanted[5]):
            find_statistics(strip, needed, top_k)
            for name in outputs:
                found[name][part] = strip.stats[name]
            for one, buffer, total in zip(weights, into, gradients, strict=True):
                dl = slope(strip, _part(one, part) if grads else one, may_write=buffer is logits)
                _add_strip(total, strip, dl, transform)
                buffer[part] = dl
        for buffer, total in zip(into, gradients, strict=True):
            total.add(tile, buffer)
    if index is not None:
        figures = {name: _spread(t, index, len(x)) for name, t in figures.items()}
    sums = [t for total in gradients for t in total.sums()] if any(wanted[1:]) else []
    return [*(figures[name] for name in outputs), *(total.dx for total in gradients), *sums]


def _add_strip(total: HeadGradients, strip: LogitStrip, dl: Tensor, transform: Transform) -> None:
    """Add a strip's gradients of scale and bias, before rounding."""
    if strip.raw is not None:
        total.dfactor += strip.raw.mul_(dl).sum()
        dl.mul_(transform.scale)
    if total.wanted[2]:
        total.dbias += dl.sum(0)


def _require_classes(targets: Tensor, vocabulary: int) -> None:
    """Raise the error of PyTorch's cross entropy for the first target that is no class."""
    wrong = (targets < 0).logical_or_(targets >= vocabulary)
    if bool(wrong.any()):
        raise IndexError(f"Target {int(targets[wrong][0])} is out of bounds.")


def _each_tile(
    x: Tensor, weight: Tensor, bias: Tensor | None, narrow: Tensor | None, lora_b: Tensor | None,
    index: Tensor | None, spans: Sequence[tuple[int, int]], height: int,
) -> Iterator[HeadTile]:  # fmt: skip
    # one buffer for all: fresh memory of this size would be faulted in page by page, tile by tile
    buffer = x.new_empty(height, weight.shape[0])
    for start, stop in spans:
        span = slice(start, stop)
        places = span if index is None else index[span]
        xt, of_adapter = _take(x, places), None
        logits = project(xt, weight, bias, buffer[: stop - start])
        if narrow is not None and lora_b is not None:
            of_adapter = _take(narrow, places)
            add_update(logits, of_adapter, lora_b)
        yield HeadTile(span, places, xt, of_adapter, logits)


def _take(t: Tensor, rows: Tensor | slice) -> Tensor:
    return t[rows] if isinstance(rows, slice) else t.index_select(0, rows)


def _column(t: Tensor, index: Tensor | None) -> Tensor:
    """Upstream gradients of the rows that count, a column for each number of a row."""
    t = t if index is None else t.index_select(0, index)
    return t.unsqueeze(1) if t.dim() == 1 else t


def _part(upstream: Upstream, rows: slice) -> Upstream:
    return {name: by[rows] if isinstance(by, Tensor) else by for name, by in upstream.items()}


def _spread(t: Tensor, index: Tensor, rows: int) -> Tensor:
    return t.new_zeros(rows, *t.shape[1:]).index_copy_(0, index, t)
