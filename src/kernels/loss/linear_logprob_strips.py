"""The element-wise work of ``linear_logprob``: statistics of a strip, gradients of its logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .head_tiles import row_strips, scale_and_cap, softmax_into, target_logprobs

INTEGERS = ("argmax", "topk_indices")
"""Outputs that are classes."""

Upstream = Mapping[str, Tensor | float]
"""Output -> its upstream gradient, a column (R, 1) or one number; of ``topk_values`` (R, k)."""


@dataclass(frozen=True)
class Transform:
    """What turns the projection's logits into final ones."""

    scale: Tensor | float  # factor on the logits; a 0-d tensor where it is learnt
    softcap: float  # their bound, or 0
    temperature: float  # what they are divided by last, in fp32


@dataclass
class LogitStrip:
    """Some rows of a tile."""

    f: Tensor  # (R, V), final logits in fp32 or fp64
    p: Tensor  # (R, V), their softmax
    y: Tensor | None  # (R, 1), targets
    spare: Tensor  # (R, V) to write into
    cap_slope: Tensor | None  # (R, V), the derivative of the cap, where gradients need it
    raw: Tensor | None  # (R, V), the projection's logits, where they are kept
    stats: dict[str, Tensor] = field(default_factory=dict)  # (R,) each, topk_indices (R, k)
    plogp: Tensor | None = None  # (R, V), p·log p, once there is an entropy


def unit_upstream(name: str, vocabulary: int) -> float:
    """The upstream gradient for which forward makes an output's gradient term."""
    # It saves a pass (``logprob``), or is exact in narrow dtypes (``mean_logit``).
    if name == "mean_logit":
        return vocabulary / float(1 << (vocabulary.bit_length() - 1))
    return -1.0 if name == "logprob" else 1.0


def dtype_of(name: str, x: Tensor) -> torch.dtype:
    """The dtype of an output."""
    if name in INTEGERS:
        return torch.int64
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def each_strip(
    logits: Tensor, transform: Transform, targets: Tensor | None, gradients: bool = False,
    keep_raw: bool = False,
) -> Iterator[tuple[slice, LogitStrip]]:  # fmt: skip
    """Each strip of a tile (R, V) with its softmax; the logits of x's dtype become final in place.

    ``gradients`` says that ``slope`` will be called, ``keep_raw`` that the projection's logits are
    needed later.
    """
    wide = torch.float64 if logits.dtype is torch.float64 else torch.float32
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
        scale_and_cap(strip, transform.scale, transform.softcap, cap_slope)
        f = strip if in_place else wider[:rows].copy_(strip)
        if transform.temperature != 1.0:
            f.div_(transform.temperature)
        p = softmax_into(f, softmax[:rows], exact=in_place)
        y = None if targets is None else targets[part].unsqueeze(1)
        yield part, LogitStrip(f, p, y, spare[:rows], cap_slope, raw)


def find_statistics(strip: LogitStrip, outputs: Sequence[str], top_k: int) -> None:
    """Compute ``outputs`` of a strip into ``strip.stats``."""
    f, p, stats = strip.f, strip.p, strip.stats
    if {"entropy", "logsumexp", "argmax"} & set(outputs):
        top, index = f.max(1, keepdim=True)
        lse = top - p.gather(1, index).log()
        stats |= {"argmax": index.squeeze(1), "logsumexp": lse.squeeze(1)}
    if "logprob" in outputs:
        assert strip.y is not None
        stats["logprob"] = target_logprobs(f, p, strip.y)
    if "entropy" in outputs:
        strip.plogp = (f - lse).mul_(p)
        stats["entropy"] = strip.plogp.sum(1).neg_()
    if "sum_p2" in outputs:
        stats["sum_p2"] = p.square().sum(1)
    if "mean_logit" in outputs:
        stats["mean_logit"] = f.mean(1)
    if "topk_values" in outputs or "topk_indices" in outputs:
        stats["topk_values"], stats["topk_indices"] = f.topk(top_k, 1)


def slope(strip: LogitStrip, upstream: Upstream, may_write: bool) -> Tensor:
    """The gradient (R, V) of scaled logits, times the temperature, in a strip's own memory.

    With ``H`` the entropy, ``S = Σp²``, and ``g`` the upstream gradients:
    ``g_logprob·([v = y] - p) - g_entropy·p·(log p + H) + g_sum_p2·2p·(p - S) + g_mean/V
    + g_logsumexp·p + [v in topk]·g_topk``, times the derivative of the cap. The strip must have the
    statistics that the formula needs; ``may_write`` says that its softmax is not needed any more.
    """
    p, stats = strip.p, strip.stats
    linear: Tensor | float = 0.0  # what p is multiplied by
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
    if "logprob" in upstream:
        assert strip.y is not None
        dl.scatter_add_(1, strip.y, _column(upstream["logprob"], dl))
    if "topk_values" in upstream:
        dl.scatter_add_(1, stats["topk_indices"], _column(upstream["topk_values"], dl))
    return dl if strip.cap_slope is None else dl.mul_(strip.cap_slope)


def _column(value: Tensor | float, like: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else like.new_full((like.shape[0], 1), value)
