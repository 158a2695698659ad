"""A stack of weights with low-rank updates, as one node: ``W[e] + Σ sᵢ·Lᵢ[e]·Rᵢ[e]``.

The sum is as large as the stack. As one node it says what it is made of, in one spelling, and has
its own autocast.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch._dynamo.allow_in_graph  # type: ignore[untyped-decorator]  # 2026-11-30: no types
def updated_stack(
    weight: Tensor, left: Sequence[Tensor], right: Sequence[Tensor], scale: Sequence[float]
) -> Tensor:
    """The sum (E, M, N): weight (E, M, N), left (E, M, r), right (E, r, N), any r and dtype.

    As PEFT adds adapters to a parameter: a single one in the dtype of ``weight``, without autocast;
    several to each other first.
    """
    if len(left) == 1:
        one, other = left[0].to(weight.dtype), right[0].to(weight.dtype)
        with torch.autocast(weight.device.type, enabled=False):
            return torch.baddbmm(weight, one, other, alpha=scale[0])
    parts = [((a @ b) * s).to(weight.dtype) for a, b, s in zip(left, right, scale, strict=True)]
    delta = parts[0]
    for part in parts[1:]:
        delta = delta + part
    return weight + delta
