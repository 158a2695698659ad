"""The head op with Triton kernels: tiles of rows, nothing read back.

The number of rows that count is known on the device, and a read would stall the stream. So the rows
that count are sorted to the front, and each program compares its rows with the number in device
memory.

Where the labels have come to the host before (``label_counts``), as many rows as count there are
multiplied by the library; without targets, all. Past those every tile is launched, and its programs
return at once unless there are rows that count: these matmuls are kernels of our own
(``head_matmul_triton.py``), for a library's cannot stop at a number that the host does not know.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..label_counts import expected
from ..launch import FP_FUSION, Gpu, gpu_of
from ..matmul import mm
from .head_matmul_triton import bounded_product, logits_tile
from .head_rows_triton import row_config, rows_kernel
from .head_strips import dtype_of_sums, upstreams_of
from .head_tiles import GPU_TILE_BYTES, HeadGradients, HeadTile, add_update, project

TILE_BYTES = 128 << 20
"""Bytes of one tile of logits; at 128k classes in bf16 that is 512 rows."""

LARGE_TILE_BYTES = GPU_TILE_BYTES
"""The same where the library multiplies, which wants more rows, beside a head of 1 GB or more."""

COLUMNS = ("logprob", "entropy", "sum_p2", "mean_logit", "logsumexp", "picked")
"""The statistics of ``rows_kernel``, in the order in which it stores them."""


def known_rows(rows: int, ignore_index: int, gpu: Gpu) -> int:
    """The number of rows that the library multiplies: all of them where few do not count."""
    if not gpu.multiplies_tiles:
        return rows
    found = min(rows, expected(rows, ignore_index))
    return rows if found > 0 and rows - found <= rows // 8 else found


def tiles_of(rows: int, known: int, row_bytes: int, head_bytes: int) -> Iterator[tuple[int, int]]:
    """(first, end) of each tile; none has rows on both sides of ``known``."""
    large = min(LARGE_TILE_BYTES, max(TILE_BYTES, head_bytes // 4))
    for start, stop, size in ((0, known, large), (known, rows, TILE_BYTES)):
        height = max(1, size // row_bytes)
        height = height // 128 * 128 or height  # whole blocks of the matmuls
        for first in range(start, stop, height):
            yield first, min(first + height, stop)


@dataclass
class _Tile(HeadTile):
    by_library: bool  # True if the library multiplies all of its rows
    found: Tensor  # (6, R), its statistics
    classes: Tensor  # (R,), of the highest logits


class _Tiles:
    """The rows that count, sorted to the front, and their logits tile by tile."""

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, narrow: Tensor | None,
        lora_b: Tensor | None, targets: Tensor | None, factor: Tensor | None, ignore_index: int,
        temperature: float, softcap: float, logit_scale: float,
    ) -> None:  # fmt: skip
        n, device = x.shape[0], x.device
        self.x, self.weight, self.bias, self.narrow, self.lora_b = x, weight, bias, narrow, lora_b
        self.softcap, self.temperature = softcap, temperature
        keep = torch.ones(n, dtype=torch.bool, device=device)
        if targets is not None:
            keep = targets != ignore_index
        self.keep = keep
        self.known = n if targets is None else known_rows(n, ignore_index, gpu_of(x))
        self.kept = keep.sum(dtype=torch.int32)
        self.order = torch.argsort(keep.logical_not().to(torch.uint8), stable=True)
        self.targets = None if targets is None else targets.index_select(0, self.order)
        constant = torch.full((), logit_scale, dtype=torch.float32, device=device)
        self.scale = constant if factor is None else factor.to(torch.float32)
        row_bytes = weight.shape[0] * x.element_size()
        head_bytes = weight.numel() * weight.element_size()
        self.spans = list(tiles_of(n, self.known, row_bytes, head_bytes))

    def each(self) -> Iterator[_Tile]:
        """Yield each tile, with room for its statistics."""
        vocabulary = self.weight.shape[0]
        for first, end in self.spans:
            places, by_library = self.order[first:end], end <= self.known
            xt, narrow = self.x.index_select(0, places), None
            room = logits_tile(xt, vocabulary)
            logits = room[:, :vocabulary]
            if by_library:
                project(xt, self.weight, self.bias, logits)
            else:
                bounded_product(room, xt, self.weight.t(), self.kept, first, "rows", self.bias)
            if self.narrow is not None and self.lora_b is not None:
                narrow = self.narrow.index_select(0, places)  # of all rows: it takes little
                add_update(logits, narrow, self.lora_b)
            found = torch.zeros((len(COLUMNS), len(xt)), dtype=torch.float32, device=xt.device)
            classes = torch.zeros(len(xt), dtype=torch.int64, device=xt.device)
            span = slice(first, end)
            yield _Tile(span, places, xt, narrow, room, by_library, found, classes)

    def final(self, logits: Tensor) -> Tensor:
        """A tile's final logits, for the top classes."""
        capped = self.softcap * self.share_of_cap(logits) if self.softcap else logits * self.scale
        return capped.float() / self.temperature

    def share_of_cap(self, logits: Tensor) -> Tensor:
        """Logits over their bound, in [-1, 1]; the slope of the cap is 1 - its square."""
        return torch.tanh(logits * self.scale / self.softcap)

    def run(
        self, tile: _Tile, moments: bool, is_first: bool = True, out: Tensor | None = None,
        upstream: Tensor | None = None, dfactor: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Compute a tile's statistics if ``is_first``, and ``out`` as gradient for ``upstream``."""
        rows, room = tile.logits.shape
        vocabulary, first = len(self.weight), tile.span.start
        rows_kernel[(rows,)](
            tile.logits,
            out,
            None if self.targets is None else self.targets[first:],
            self.scale,
            tile.found,
            tile.classes,
            upstream,
            dfactor,
            self.kept,
            first,
            rows,
            vocabulary,
            room,
            *((0, 0) if upstream is None else upstream.stride()),
            self.softcap,
            self.temperature,
            SOFTCAP=self.softcap > 0,
            TEMPERATURE=self.temperature != 1.0,
            TARGETS=self.targets is not None,
            MOMENTS=moments,
            STATISTICS=is_first,
            GRADIENT=out is not None,
            RESCALE=dfactor is not None,
            CLEAR=out is not None and (tile.by_library or self.lora_b is not None),
            **row_config(vocabulary, moments),
            enable_fp_fusion=FP_FUSION,
        )

    def add_top(
        self, tile: _Tile, out: Tensor, raw: Tensor, upstream: Mapping[str, Any],
        dfactor: Tensor | None,
    ) -> None:  # fmt: skip
        """Add the gradients of the top classes, whose logits were ``raw``, to ``out``."""
        classes, grad = (upstream[name][tile.span] for name in ("topk_indices", "topk_values"))
        if self.softcap:
            grad = grad * (1.0 - self.share_of_cap(raw).float().square())
        live = self.keep.index_select(0, tile.rows).unsqueeze(1)  # others hold no logits
        if dfactor is not None:
            dfactor += torch.where(live, grad * raw.float(), 0.0).sum(1)
            grad = grad * self.scale
        out.scatter_add_(1, classes, torch.where(live, grad, 0.0).to(out.dtype))

    def restore(self, t: Tensor) -> Tensor:
        """``t``, whose rows are sorted, in the order of x; zero where a row does not count."""
        t = torch.empty_like(t).index_copy_(0, self.order, t)
        keep = self.keep.view(-1, *([1] * (t.dim() - 1)))
        return torch.where(keep, t, torch.zeros((), dtype=t.dtype, device=t.device))


class _Gradients(HeadGradients):
    """Gradients of the operands; the head's and the bias's stop at the rows that count."""

    def __init__(self, tiles: _Tiles, wanted: Sequence[bool]) -> None:
        super().__init__(tiles.x, tiles.weight, tiles.narrow, tiles.lora_b, wanted)
        self.kept = tiles.kept
        # one product is rounded once in any case
        self.alone = dtype_of_sums(self.x) is self.x.dtype and tiles.spans == [(0, tiles.known)]

    def add(self, tile: Any, dlogits: Tensor) -> None:
        """Add the gradients of a tile but that of the scale."""
        super().add(tile, dlogits)
        if self.wanted[2]:
            ones = tile.x.new_ones((len(dlogits), 1))
            self._add_bounded(self.dbias.view(-1, 1), tile, dlogits, ones)

    def of_rows(self, tile: Any, dlogits: Tensor) -> Tensor:
        """Compute the gradient of a tile's rows."""
        if tile.by_library:
            return mm(dlogits[:, : len(self.weight)], self.weight)
        part = torch.zeros_like(tile.x)  # rows past the bound stay zero
        bounded_product(part, dlogits, self.weight, self.kept, tile.span.start, "rows")
        return part

    def add_to_weight(self, tile: Any, dlogits: Tensor) -> None:
        """Add the gradient of the head from a tile."""
        if self.alone:
            self.dweight = mm(dlogits[:, : len(self.weight)].t(), tile.x)
            return
        if self.dweight is None:
            self.dweight = tile.x.new_zeros(self.weight.shape, dtype=torch.float32)
        self._add_bounded(self.dweight, tile, dlogits, tile.x)

    def _add_bounded(self, total: Tensor, tile: Any, dlogits: Tensor, rows: Tensor) -> None:
        bounded_product(total, dlogits.t(), rows, self.kept, tile.span.start, "inner")


def compute(
    x: Tensor, weight: Tensor, bias: Tensor | None, narrow: Tensor | None, lora_b: Tensor | None,
    targets: Tensor | None, factor: Tensor | None, outputs: list[str], upstream: list[str],
    terms: list[float], grads: list[Tensor], top_k: int, ignore_index: int, temperature: float,
    softcap: float, logit_scale: float, wanted: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Take the arguments of ``head_plain.compute``, and return the same."""
    tiles = _Tiles(
        x, weight, bias, narrow, lora_b, targets, factor, ignore_index, temperature, softcap,
        logit_scale,
    )  # fmt: skip
    n, f32 = len(x), {"dtype": torch.float32, "device": x.device}
    columns, classes = torch.zeros((len(COLUMNS), n), **f32), tiles.order.new_zeros(n)
    top = any(name.startswith("topk") for name in outputs)
    values, indices = torch.zeros((n, top_k), **f32), tiles.order.new_zeros((n, top_k))
    sorted_grads = [t.index_select(0, tiles.order) for t in grads]
    upstreams = upstreams_of(upstream, terms, sorted_grads)
    weights = [_columns(one, n, x.device) for one in upstreams]
    dfactor = torch.zeros(n, **f32)
    gradients = [_Gradients(tiles, wanted) for _ in upstreams]
    moments = not {"entropy", "sum_p2", "argmax"}.isdisjoint([*outputs, *upstream])
    for tile in tiles.each():
        span, logits = tile.span, tile.logits[:, : len(weight)]
        if top:
            values[span], indices[span] = tiles.final(logits).topk(top_k, 1)
        for i, (one, by, total) in enumerate(zip(upstreams, weights, gradients, strict=True)):
            out = tile.logits if total is gradients[-1] else torch.empty_like(tile.logits)
            sums = dfactor[span] if wanted[5] else None
            raw = logits.gather(1, one["topk_indices"][span]) if "topk_indices" in one else None
            tiles.run(tile, moments, i == 0, out, by[:, span], sums)
            if raw is not None:
                tiles.add_top(tile, out, raw, one, sums)
            total.add(tile, out)
        if not upstreams:
            tiles.run(tile, moments)
        columns[:, span], classes[span] = tile.found, tile.classes
    every = dict(zip(COLUMNS, columns, strict=True))
    every |= {"argmax": classes, "topk_values": values, "topk_indices": indices}
    for total in gradients:
        total.dfactor = dfactor.sum()
    of_others = [t for total in gradients for t in total.sums()] if any(wanted[1:]) else []
    made = (tiles.restore(every[name]) for name in outputs)
    return [*made, *(total.dx for total in gradients), *of_others]


def _columns(upstream: Mapping[str, Tensor | float], rows: int, device: torch.device) -> Tensor:
    """The upstream gradients (6, rows) of statistics; constants have no step from row to row."""
    varies = any(isinstance(by, Tensor) for by in upstream.values())
    shape = len(COLUMNS), rows if varies else 1
    columns = torch.zeros(shape, dtype=torch.float32, device=device)
    for name, by in upstream.items():
        if name in COLUMNS:
            columns[COLUMNS.index(name)] = by
    return columns if varies else columns.expand(-1, rows)
