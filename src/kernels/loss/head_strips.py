"""The element-wise work of the head op: statistics of a strip, and gradients of its logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

STRIP_ELEMENTS = 1 << 18
"""fp32 elements of a strip per thread: with its softmax they fill a 2 MiB second-level cache."""

INTEGERS = ("argmax", "topk_indices")
"""Outputs that are classes."""

OF_TARGETS = ("logprob", "picked")
"""Outputs that read the targets' logits."""

Upstream = Mapping[str, Tensor | float]
"""Output -> its upstream gradient, a column (R, 1) or one number; of ``topk_values`` (R, k).

With that, ``topk_indices`` has the classes (R, k).
"""


def upstreams_of(
    names: Sequence[str], terms: Sequence[float], grads: Sequence[Tensor]
) -> list[dict[str, Tensor | float]]:
    """Return the upstream gradients of each sum: rows of ``terms``, or ``grads`` of one sum."""
    if grads:
        return [dict(zip(names, grads, strict=True))]
    rows = (terms[i : i + len(names)] for i in range(0, len(terms), len(names) or 1))
    return [{name: by for name, by in zip(names, row, strict=True) if by} for row in rows]


@dataclass(frozen=True)
class Transform:
    """Constants between the projection's logits and the final ones."""

    scale: Tensor | float  # factor on the logits; a 0-d tensor where it is learnt
    softcap: float  # their bound, or 0
    temperature: float  # divides them last, in fp32


@dataclass
class LogitStrip:
    """Some rows of a tile."""

    f: Tensor  # (R, V), final logits in fp32 or fp64
    p: Tensor  # (R, V), their softmax
    y: Tensor | None  # (R, 1), targets
    spare: Tensor  # (R, V) to write into
    cap_slope: Tensor | None  # (R, V), the derivative of the cap, where gradients need it
    raw: Tensor | None  # (R, V), the projection's logits, where they are kept
    stats: dict[str, Tensor] = field(default_factory=dict)  # (R,) each, topk_* (R, k)
    plogp: Tensor | None = None  # (R, V), p·log p, once there is an entropy


def dtype_of(name: str, x: Tensor) -> torch.dtype:
    """The dtype of an output."""
    return torch.int64 if name in INTEGERS else torch.promote_types(x.dtype, torch.float32)


def dtype_of_sums(x: Tensor) -> torch.dtype:
    """The dtype of the head's gradient: x's, but fp32 for fp16, whose range sums may leave."""
    return torch.float32 if x.dtype is torch.float16 else x.dtype


def row_strips(rows: int, vocabulary: int) -> Iterator[slice]:
    """Split a tile of ``rows`` into strips; the first is the highest."""
    height = max(1, STRIP_ELEMENTS * torch.get_num_threads() // vocabulary)
    return (slice(start, min(rows, start + height)) for start in range(0, rows, height))


def each_strip(
    logits: Tensor, transform: Transform, targets: Tensor | None, gradients: bool = False,
    keep_raw: bool = False,
) -> Iterator[tuple[slice, LogitStrip]]:  # fmt: skip
    """Yield each strip of a tile (R, V) with its softmax; logits become final in place.

    ``gradients`` announces calls of ``slope``; ``keep_raw`` keeps the projection's logits.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    strips = list(row_strips(*logits.shape))
    in_place = logits.dtype is wide
    shape = (strips[0].stop if strips else 0, logits.shape[1])
    softmax, wider, spare, caps = (
        torch.empty(shape if used else (0, 0), dtype=wide, device=logits.device)
        for used in (True, not in_place, gradients, gradients and transform.softcap)
    )
    for part in strips:
        strip, rows = logits[part], part.stop - part.start
        raw = strip.to(wide, copy=True) if keep_raw else None
        cap_slope = caps[:rows] if gradients and transform.softcap else None
        _scale_and_cap(strip, transform, cap_slope)
        f = strip if in_place else wider[:rows].copy_(strip)
        if transform.temperature != 1.0:
            f.div_(transform.temperature)
        p = torch.softmax(f, 1, out=softmax[:rows])
        if in_place:  # its running sum over a large vocabulary is 1e-6 off: use a better one
            p.div_(p.sum(1, keepdim=True))
        y = None if targets is None else targets[part].unsqueeze(1)
        yield part, LogitStrip(f, p, y, spare[:rows], cap_slope, raw)


def _scale_and_cap(strip: Tensor, transform: Transform, slope: Tensor | None) -> None:
    # In place and in the dtype of the logits, rounding where the model rounds. ``slope`` (R, V),
    # fp32 or fp64, takes the derivative of the capped logits.
    if isinstance(transform.scale, Tensor) or transform.scale != 1.0:
        strip.mul_(transform.scale)
    if transform.softcap:
        strip.div_(transform.softcap).tanh_()
        if slope is not None:  # of tanh itself: where it is near 1, another rounding is too much
            t = strip if strip.dtype is slope.dtype else slope.copy_(strip)
            torch.addcmul(slope.new_ones(()), t, t, value=-1.0, out=slope)
        strip.mul_(transform.softcap)


def find_statistics(strip: LogitStrip, outputs: Sequence[str], top_k: int) -> None:
    """Compute ``outputs`` of a strip into ``strip.stats``."""
    f, p, stats = strip.f, strip.p, strip.stats
    if {"entropy", "logsumexp", "argmax"} & set(outputs):
        top, index = f.max(1, keepdim=True)
        lse = top - p.gather(1, index).log()
        stats |= {"argmax": index.squeeze(1), "logsumexp": lse.squeeze(1)}
    if "logprob" in outputs:
        stats["logprob"] = _logprobs(strip)
    if "picked" in outputs:
        assert strip.y is not None
        stats["picked"] = f.gather(1, strip.y).squeeze(1)
    if "entropy" in outputs:
        strip.plogp = (f - lse).mul_(p)
        stats["entropy"] = strip.plogp.sum(1).neg_()
    if "sum_p2" in outputs:
        stats["sum_p2"] = p.square().sum(1)
    if "mean_logit" in outputs:
        stats["mean_logit"] = f.mean(1)
    if "topk_values" in outputs or "topk_indices" in outputs:
        stats["topk_values"], stats["topk_indices"] = f.topk(top_k, 1)


def _logprobs(strip: LogitStrip) -> Tensor:
    # picked - lse, without the cancellation and another pass over f
    assert strip.y is not None
    target_p = strip.p.gather(1, strip.y).squeeze(1)
    logprobs = target_p.log()
    underflow = target_p < 1e-30  # too near the end of fp32's range: read it from the logits
    if bool(underflow.any()):
        these = strip.f[underflow]
        picked = these.gather(1, strip.y[underflow]).squeeze(1)
        logprobs[underflow] = picked - these.logsumexp(1)
    return logprobs


def slope(strip: LogitStrip, upstream: Upstream, may_write: bool) -> Tensor:
    """Return the gradient (R, V) of scaled logits times the temperature, in the strip's memory.

    With ``H`` the entropy, ``S = Σp²``, and ``g`` the upstream gradients:
    ``g_logprob·([v = y] - p) + g_picked·[v = y] - g_entropy·p·(log p + H) + g_sum_p2·2p·(p - S)
    + g_mean/V + g_logsumexp·p + [v in topk]·g_topk``, times the derivative of the cap. The strip
    must have the statistics that the formula needs. ``may_write`` lets the softmax be overwritten.
    """
    p, stats = strip.p, strip.stats
    linear: Tensor | float = 0.0  # the factor of p
    if "logsumexp" in upstream:
        linear = linear + upstream["logsumexp"]
    if "logprob" in upstream:
        linear = linear - upstream["logprob"]
    if "entropy" in upstream:
        linear = linear - upstream["entropy"] * stats["entropy"].unsqueeze(1)
    if "sum_p2" in upstream:
        twice = 2 * upstream["sum_p2"]
        dl = torch.mul(p, twice, out=strip.spare)
        dl.add_(linear - twice * stats["sum_p2"].unsqueeze(1)).mul_(p)
    elif may_write and isinstance(linear, float) and linear == 1.0:
        dl = p
    else:
        dl = torch.mul(p, linear, out=p if may_write else strip.spare)
    if "entropy" in upstream:
        assert strip.plogp is not None
        dl.addcmul_(strip.plogp, _column(upstream["entropy"], dl), value=-1)
    if "mean_logit" in upstream:
        dl.add_(upstream["mean_logit"] / dl.shape[1])
    at_target = [upstream[name] for name in OF_TARGETS if name in upstream]
    if at_target:
        assert strip.y is not None
        dl.scatter_add_(1, strip.y, _column(sum(at_target), dl))
    if "topk_values" in upstream:
        classes, top = upstream["topk_indices"], upstream["topk_values"]
        assert isinstance(classes, Tensor)
        assert isinstance(top, Tensor)
        dl.scatter_add_(1, classes, top)
    return dl if strip.cap_slope is None else dl.mul_(strip.cap_slope)


def _column(value: Tensor | float, like: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else like.new_full((like.shape[0], 1), value)
