"""Triton twin of ``kernels/loss/linear_logprob_tiles.py``: tiles of rows, nothing read back.

As in ``linear_cross_entropy_triton.py``, the rows that count are sorted to the front. As many as
the host knows to count, which without targets are all, are multiplied by the library; past those,
programs return at once if they are past the number that the device knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..launch import FP_FUSION, gpu_of
from ..matmul import mm
from .head_tiles import project
from .linear_cross_entropy_matmul_triton import bounded_product, logits_tile
from .linear_cross_entropy_triton import known_rows, tiles_of
from .linear_logprob_kernels_triton import AOT, row_config, slope_kernel, statistics_kernel
from .linear_logprob_strips import INTEGERS, unit_upstream

__all__ = ["AOT", "compute", "differentiate"]

COLUMNS = ("logprob", "entropy", "sum_p2", "mean_logit", "logsumexp")
"""The outputs that ``statistics_kernel`` finds, in the order in which it stores them."""


class _Tiles:
    """The rows that count, sorted to the front, and their logits tile by tile."""

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor | None,
        ignore_index: int, factor: Tensor | None, logit_scale: float, softcap: float,
        temperature: float,
    ) -> None:  # fmt: skip
        n, device = x.shape[0], x.device
        self.x, self.weight, self.bias = x, weight, bias
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

    def each(self) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """First row, places in x, rows, logits, statistics (5, R) and classes of each tile."""
        vocabulary, size = self.weight.shape[0], self.x.element_size()
        tiles = tiles_of(
            self.x.shape[0], self.known, vocabulary * size, self.weight.numel() * size
        )  # fmt: skip
        for first, end in tiles:
            places, rows = self.order[first:end], end - first
            xt = self.x.index_select(0, places)
            logits = logits_tile(xt, vocabulary)
            if first < self.known:
                project(xt, self.weight, self.bias, logits[:, :vocabulary])
            else:
                bounded_product(logits, xt, self.weight.t(), self.kept, first, "rows", self.bias)
            found = torch.zeros((len(COLUMNS), rows), dtype=torch.float32, device=xt.device)
            classes = torch.zeros(rows, dtype=torch.int64, device=xt.device)
            statistics_kernel[(rows,)](
                logits,
                None if self.targets is None else self.targets[first:],
                self.scale,
                found,
                classes,
                self.kept,
                first,
                rows,
                vocabulary,
                logits.shape[1],
                self.softcap,
                self.temperature,
                SOFTCAP=self.softcap > 0,
                TARGETS=self.targets is not None,
                **row_config(vocabulary),
                enable_fp_fusion=FP_FUSION,
            )
            yield first, places, xt, logits, found, classes

    def final(self, logits: Tensor) -> Tensor:
        """A tile's final logits, for the top classes."""
        logits = logits[:, : self.weight.shape[0]]
        capped = self.softcap * self.share_of_cap(logits) if self.softcap else logits * self.scale
        return capped.float() / self.temperature

    def share_of_cap(self, logits: Tensor) -> Tensor:
        """What of the bound logits reach, in [-1, 1]; the slope of the cap is 1 - its square."""
        return torch.tanh(logits * self.scale / self.softcap)

    def slope(
        self, first: int, logits: Tensor, out: Tensor, found: Tensor,
        upstream: Mapping[str, Tensor | float], dfactor: Tensor | None,
    ) -> None:  # fmt: skip
        """Write the gradient of a tile's logits for the upstream gradients of its outputs."""
        (rows, room), vocabulary = logits.shape, self.weight.shape[0]
        weights = _weights(upstream, found, vocabulary)
        slope_kernel[(rows,)](
            logits,
            out,
            None if self.targets is None else self.targets[first:],
            self.scale,
            found,
            weights,
            dfactor,
            self.kept,
            first,
            rows,
            vocabulary,
            room,
            self.softcap,
            self.temperature,
            SOFTCAP=self.softcap > 0,
            TARGETS="logprob" in upstream,
            RESCALE=dfactor is not None,
            CLEAR=first < self.known,
            **row_config(vocabulary),
            enable_fp_fusion=FP_FUSION,
        )

    def through_head(self, first: int, dlogits: Tensor) -> Tensor:
        """The gradient of a tile's rows, zero for those that do not count."""
        if first < self.known:
            return mm(dlogits[:, : self.weight.shape[0]], self.weight)
        found = self.x.new_zeros(dlogits.shape[0], self.x.shape[1])  # rows past the bound stay
        bounded_product(found, dlogits, self.weight, self.kept, first, "rows")
        return found

    def restore(self, t: Tensor) -> Tensor:
        """``t``, whose rows are sorted, in the order of x; zero where a row does not count."""
        t = torch.empty_like(t).index_copy_(0, self.order, t)
        keep = self.keep.view(-1, *([1] * (t.dim() - 1)))
        return torch.where(keep, t, torch.zeros((), dtype=t.dtype, device=t.device))


def _weights(upstream: Mapping[str, Tensor | float], found: Tensor, vocabulary: int) -> Tensor:
    """What ``slope_kernel`` multiplies 1, log p, p, and so on by: (5, R)."""
    weights = torch.zeros_like(found)
    if "logsumexp" in upstream:
        weights[0] += upstream["logsumexp"]
    if "logprob" in upstream:
        weights[0] -= upstream["logprob"]
        weights[4] = upstream["logprob"]
    if "entropy" in upstream:
        weights[0] -= upstream["entropy"] * found[1]
        weights[1] -= upstream["entropy"]
    if "sum_p2" in upstream:
        twice = 2 * upstream["sum_p2"]
        weights[0] -= twice * found[2]
        weights[2] = twice
    if "mean_logit" in upstream:
        weights[3] = upstream["mean_logit"] / vocabulary
    return weights


def compute(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor | None, factor: Tensor | None,
    outputs: list[str], made: list[str], top_k: int, ignore_index: int, temperature: float,
    softcap: float, logit_scale: float,
) -> list[Tensor]:  # fmt: skip
    """Same arguments and results as ``linear_logprob_tiles.compute``."""
    tiles = _Tiles(
        x, weight, bias, targets, ignore_index, factor, logit_scale, softcap, temperature
    )
    n, f32 = x.shape[0], {"dtype": torch.float32, "device": x.device}
    columns, classes = torch.zeros((len(COLUMNS), n), **f32), tiles.order.new_zeros(n)
    top = any(name.startswith("topk") for name in outputs)
    values, indices = torch.zeros((n, top_k), **f32), tiles.order.new_zeros((n, top_k))
    terms = [x.new_zeros(x.shape) for _ in made]
    for first, places, xt, logits, found, best in tiles.each():
        span = slice(first, first + xt.shape[0])
        columns[:, span], classes[span] = found, best
        if top:
            values[span], indices[span] = tiles.final(logits).topk(top_k, 1)
        for name, term in zip(made, terms, strict=True):
            out = logits if name == made[-1] else torch.empty_like(logits)
            upstream = {name: unit_upstream(name, weight.shape[0])}
            tiles.slope(first, logits, out, found, upstream, None)
            term.index_copy_(0, places, tiles.through_head(first, out))
    every = dict(zip(COLUMNS, columns, strict=True))
    every |= {"argmax": classes, "topk_values": values, "topk_indices": indices}
    return [*(tiles.restore(every[name]) for name in outputs), *terms]


def differentiate(
    grads: list[Tensor | None], picked: Tensor | None, x: Tensor, weight: Tensor,
    bias: Tensor | None, targets: Tensor | None, factor: Tensor | None, outputs: list[str],
    ignore_index: int, temperature: float, softcap: float, logit_scale: float, wanted: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Same arguments and results as ``linear_logprob_tiles.differentiate``."""
    tiles = _Tiles(
        x, weight, bias, targets, ignore_index, factor, logit_scale, softcap, temperature
    )
    (vocabulary, hidden), n = weight.shape, x.shape[0]
    f32 = {"dtype": torch.float32, "device": x.device}
    given = _sorted(outputs, grads, picked, tiles, 1.0 if wanted[3] else tiles.scale)
    dx = x.new_zeros(x.shape if wanted[0] else (0, hidden))
    dweight = torch.zeros((vocabulary if wanted[1] else 0, hidden), **f32)
    dbias = torch.zeros(vocabulary if wanted[2] else 0, **f32)
    dfactor = torch.zeros(n, **f32)
    for first, places, xt, logits, found, _ in tiles.each():
        span = slice(first, first + xt.shape[0])
        here = {name: t[span] for name, t in given.items()}
        of_top = here.pop("topk_values", None), here.pop("topk_indices", None)
        sums = dfactor[span] if wanted[3] else None
        raw = None if of_top[0] is None else logits.gather(1, of_top[1])
        tiles.slope(first, logits, logits, found, here, sums)
        if raw is not None:
            grad = of_top[0]
            if softcap:
                grad = grad * (1.0 - tiles.share_of_cap(raw).float().square())
            live = tiles.keep.index_select(0, places).unsqueeze(1)  # other rows hold no logits
            if sums is not None:
                sums += torch.where(live, grad * raw.float(), 0.0).sum(1)
                grad = grad * tiles.scale
            grad = torch.where(live, grad, 0.0)
            logits.scatter_add_(1, of_top[1], grad.to(logits.dtype))
        if wanted[0]:
            dx.index_copy_(0, places, tiles.through_head(first, logits))
        if wanted[1]:
            bounded_product(dweight, logits.t(), xt, tiles.kept, first, "inner")
        if wanted[2]:
            ones = x.new_ones((xt.shape[0], 1))
            bounded_product(dbias.view(-1, 1), logits.t(), ones, tiles.kept, first, "inner")
    return [dx, dweight.to(x.dtype), dbias, dfactor.sum()]


def _sorted(
    outputs: Sequence[str], grads: Sequence[Tensor | None], picked: Tensor | None, tiles: _Tiles,
    scale: Tensor | float,
) -> dict[str, Tensor]:  # fmt: skip
    """The upstream gradients of the final logits' projection, in the order of the tiles."""
    given = {}
    for name, grad in zip(outputs, grads, strict=True):
        if grad is not None and name not in INTEGERS:
            ordered = grad.index_select(0, tiles.order) * (scale / tiles.temperature)
            given[name] = ordered
    if "topk_values" in given:
        assert picked is not None
        given["topk_indices"] = picked.index_select(0, tiles.order)
    return given
