"""Stacks of weights that are never made: with low-rank updates, or in few bits.

``W[e] + Σ sᵢ·Lᵢ[e]·Rᵢ[e]`` is as large as the stack. As one node it says what it is made of, in one
spelling, and has its own autocast. A stack in few bits is bitsandbytes' or computed by a formula:
then each expert's matrix is the formula of its own rows of the tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ...kernels.moe.packed_experts import PackedExperts


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


@torch._dynamo.allow_in_graph  # type: ignore[untyped-decorator]  # 2026-11-30: no types
def packed_stack(
    parts: Sequence[Tensor | None], shape: tuple[int, int], blocksize: int, kind: str,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The ``PackedExperts`` of these fields, to a tracer a plain stack (E, *shape)."""
    first = next(t for t in parts if t is not None)
    if isinstance(first, FakeTensor):
        return torch.empty(first.shape[0], *shape, dtype=dtype, device=first.device)
    return PackedExperts((shape, blocksize, kind), tuple(parts), dtype)
