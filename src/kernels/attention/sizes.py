"""Shapes, FLOPs and memory of a call of attention, known without its numbers.

Which scores a mask hides is not known: all count.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def fake_like(like: Tensor, dim: int) -> Tensor:
    """Heads of ``dim`` features, in the memory order of projections."""
    batch, heads, time, _ = like.shape
    return like.new_empty(batch, time, heads, dim).transpose(1, 2)


def fake_forward(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    """Outputs (B, H, T, E)."""
    return fake_like(q, v.shape[-1])


def fake_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> list[Tensor]:
    """The needed gradients; ``rest`` ends in the sinks, the softcap, and which are needed."""
    sinks, _, needs = rest[-3:]
    every = zip((q, k, v), needs[:3], strict=True)
    grads = [fake_like(t, t.shape[-1]) for t, needed in every if needed]
    return [*grads, sinks.new_empty(sinks.shape)] if needs[3] else grads


def _visible(q: Tensor, k: Tensor, causal: bool, window: int | None) -> int:
    time, seen = q.shape[2], min(k.shape[2], window or k.shape[2])
    hidden = seen * (seen - 1) // 2 if causal else 0
    return q.shape[0] * q.shape[1] * (time * seen - hidden)


def forward_flops(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Any, window: int | None,
    *_: Any,
) -> int:  # fmt: skip
    """FLOPs of the scores and the outputs."""
    return 2 * _visible(q, k, causal, window) * (q.shape[3] + v.shape[3])


def backward_flops(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Any,
    window: int | None, sinks: Any, softcap: Any, needs: list[bool],
) -> int:  # fmt: skip
    """The scores again, ``dV``, and for ``dQ``, ``dK`` and sinks the gradient of the scores."""
    need_q, need_k, need_v, need_sinks = needs
    dim, value_dim = q.shape[3], v.shape[3]
    width = (1 + need_q + need_k) * dim + (need_v + (need_q or need_k or need_sinks)) * value_dim
    return 2 * _visible(q, k, causal, window) * width
