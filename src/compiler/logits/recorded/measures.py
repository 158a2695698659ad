"""Numbers per row of a head's logits, from its operands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ....kernels.loss.linear_logprob import linear_logprob
from ..head_parts import Operands
from .together import NEVER


def measure(o: Operands, name: str, targets: Tensor | None = None, **more: Any) -> Tensor:
    """One output of ``linear_logprob``."""
    settings = {"ignore_index": NEVER, **more}
    result: Tensor = linear_logprob(
        o.x, o.weight, o.bias, targets, (name,), temperature=o.temperature, softcap=o.softcap,
        logit_scale=o.scale, **settings,
    )[0]  # fmt: skip
    return result


def weighted_sum(o: Operands, weights: Mapping[str, float]) -> Tensor:
    """A sum of several measures, in one pass over the logits."""
    # The gradients of a mean logit and of a log-sum-exp nearly cancel: they are added before they
    # are multiplied with the head, by backward, and not as one term of each that forward has made.
    names = list(weights)
    outputs = linear_logprob(
        o.x, o.weight, o.bias, None, names, ignore_index=NEVER, temperature=o.temperature,
        softcap=o.softcap, logit_scale=o.scale,
        deferred=names if {"mean_logit", "logsumexp"} <= set(names) else (),
    )  # fmt: skip
    total: Tensor = sum(t * weights[n] for n, t in zip(names, outputs, strict=True))  # type: ignore[assignment]
    return total


def mean_logit(o: Operands) -> Tensor:
    """(N,): the mean over the vocabulary; linear in the rows where nothing caps it."""
    if o.softcap is not None:
        return measure(o, "mean_logit")
    # no matrix product: autocast would round that
    result = (wide(o.x) * o.weight.mean(0, dtype=wide(o.x).dtype)).sum(-1)
    if o.bias is not None:
        result = result + wide(o.bias).mean()
    return result * (wide(o.scale) if isinstance(o.scale, Tensor) else o.scale) / o.temperature


def picked(o: Operands, index: Tensor) -> Tensor:
    """(N, K): some logits of each row."""
    result: Tensor = Pick.apply(wide(o.x), o.weight, index)  # type: ignore[no-untyped-call]
    if o.bias is not None:
        result = result + wide(o.bias)[index]
    result = result * (wide(o.scale) if isinstance(o.scale, Tensor) else o.scale)
    if o.softcap is not None:
        result = torch.tanh(result / o.softcap) * o.softcap
    return result / o.temperature


def wide(t: Tensor) -> Tensor:
    """``t`` in fp32; fp64 stays."""
    return t if t.dtype is torch.float64 else t.float()


def flat_rows(t: Tensor) -> Tensor:
    """``t`` as (N, vocabulary), in fp32; fp64 stays."""
    return wide(t).reshape(-1, t.shape[-1])


class Pick(torch.autograd.Function):
    """Single logits before scale and soft cap: ``x[n] · weight[index[n, k]]``, in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
        """Compute one product per row and column; x (N, H), weight (V, H), index (N, K)."""
        ctx.save_for_backward(x, weight, index)
        return torch.stack([(x * weight.index_select(0, i)).sum(-1) for i in index.unbind(-1)], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the rows, and of the head in the precision of ``grad``."""
        x, weight, index = ctx.saved_tensors
        dx = dweight = None
        columns = list(zip(grad.unbind(-1), index.unbind(-1), strict=True))
        if ctx.needs_input_grad[0]:
            dx = torch.zeros_like(x)
            for g, i in columns:
                dx += g.unsqueeze(-1) * weight[i]
        if ctx.needs_input_grad[1]:
            total = torch.zeros(weight.shape, dtype=grad.dtype, device=grad.device)
            for g, i in columns:
                total.index_add_(0, i, (g.unsqueeze(-1) * x).to(grad.dtype))
            dweight = total.to(weight.dtype)
        return dx, dweight, None
