"""Residual add and RMSNorm in one kernel (twin of ``kernels/norms/add_rms_norm.py``).

The kernels are those of RMSNorm, with the residual (forward) and the gradient of the sum
(backward) as further inputs.
"""

from __future__ import annotations

from torch import Tensor

from .rms_norm_kernels_triton import backward_case, forward_case
from .rms_norm_triton import launch_forward


def forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, outer: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Add and norm rows (..., D).

    Returns:
        (sum, y, rstd): sum and y in x's shape and strides; rstd (..., 1) in fp32.
    """
    total, y, rstd = launch_forward(x, residual, weight, eps, offset, outer)
    assert total is not None
    return total, y, rstd


_BF16 = ("bf16", "bf16", "bf16")
AOT = (
    forward_case("D=576", 576, _BF16, residual=True),
    forward_case("D=2048 offset", 2048, _BF16, residual=True, offset=True, outer=True),
    forward_case("D=4096 fp32 weight", 4096, ("bf16", "fp32", "fp32"), residual=True),
    forward_case("D=8192", 8192, _BF16, residual=True),
    forward_case("D=16384 no weight", 16384, _BF16, residual=True, weight=False),
    backward_case("D=576", 576, _BF16[:2], extra=True),
    backward_case("D=4096 frozen", 4096, _BF16[:2], extra=True, need_weight=False),
    backward_case("D=8192 offset", 8192, _BF16[:2], extra=True, offset=True, outer=True),
)
"""The tile shapes again, with the residual's branches."""
