"""RMSNorm."""

from __future__ import annotations

from fusewright.kernels.norms.rms_norm_triton import (
    COLUMNS,
    backward_kernel,
    forward_kernel,
    tile_of,
)
from tests.kernels.aot import AotCase


def forward_case(
    name: str, dim: int, types: tuple[str, str, str], *, weight: bool = True, offset: bool = False,
    outer: bool = False, residual: bool = False,
) -> AotCase:  # fmt: skip
    """The forward kernel for rows of ``dim``; ``types`` of x, weight and y."""
    rows, block, warps = tile_of(dim)
    x, w, y = types
    pointers = {"x": x, "residual": x, "weight": w, "sum": x, "y": y, "rstd": "fp32"}
    signature = {f"{k}_ptr": f"*{v}" for k, v in pointers.items()}
    signature |= dict.fromkeys(("rows", "dim", "x_stride", "residual_stride"), "i32")
    signature |= {"sum_stride": "i32", "y_stride": "i32", "eps": "fp32", "offset": "fp32"}
    constants = {"HAS_RESIDUAL": residual, "HAS_WEIGHT": weight, "HAS_OFFSET": offset}
    constants |= {"OUTER": outer, "ROWS": rows, "BLOCK": block}
    divisible = () if dim % 16 else ("dim", "x_stride", "residual_stride", "sum_stride", "y_stride")
    return AotCase(
        f"forward {name}", forward_kernel, signature, constants, warps, divisible=divisible
    )


def backward_case(
    name: str, dim: int, types: tuple[str, str], *, weight: bool = True, offset: bool = False,
    outer: bool = False, extra: bool = False, need_x: bool = True, need_weight: bool = True,
) -> AotCase:  # fmt: skip
    """The backward kernel for rows of ``dim``; ``types`` of x (and its gradients) and weight."""
    rows, block, warps = tile_of(dim if need_x else min(dim, COLUMNS))
    x, w = types
    pointers = {"grad": x, "x": x, "weight": w, "rstd": "fp32", "extra": x, "dx": x}
    signature = {f"{k}_ptr": f"*{v}" for k, v in (pointers | {"partial": "fp32"}).items()}
    signature |= dict.fromkeys(("rows", "dim", "tiles", "grad_stride", "x_stride"), "i32")
    signature |= {"extra_stride": "i32", "dx_stride": "i32", "offset": "fp32"}
    constants = {"HAS_WEIGHT": weight, "HAS_OFFSET": offset, "OUTER": outer, "HAS_EXTRA": extra}
    constants |= {"NEED_X": need_x, "NEED_WEIGHT": need_weight, "ROWS": rows, "BLOCK": block}
    divisible = () if dim % 16 else ("dim", "grad_stride", "x_stride", "extra_stride", "dx_stride")
    return AotCase(
        f"backward {name}", backward_kernel, signature, constants, warps, divisible=divisible
    )


_BF16 = ("bf16", "bf16", "bf16")
AOT = (
    forward_case("D=128", 128, _BF16),
    forward_case("D=507 fp32 weight", 507, ("bf16", "fp32", "fp32")),
    forward_case("D=2048 offset", 2048, _BF16, offset=True, outer=True),
    forward_case("D=4096 inner offset", 4096, _BF16, offset=True),
    forward_case("D=8192 fp16", 8192, ("fp16", "fp16", "fp16")),
    forward_case("D=16384 no weight", 16384, ("fp32", "fp32", "fp32"), weight=False),
    forward_case("D=64 only a factor", 64, _BF16, weight=False, offset=True, outer=True),
    backward_case("D=128", 128, _BF16[:2]),
    backward_case("D=507 fp32 weight", 507, ("bf16", "fp32")),
    backward_case("D=2048 offset", 2048, _BF16[:2], offset=True, outer=True),
    backward_case("D=4096 frozen, inner offset", 4096, _BF16[:2], offset=True, need_weight=False),
    backward_case("D=8192 fp16, only dW", 8192, ("fp16", "fp16"), need_x=False),
    backward_case("D=16384, frozen", 16384, _BF16[:2], need_weight=False),
    backward_case("D=16384, only dW", 16384, _BF16[:2], need_x=False),
    backward_case("D=64 factor", 64, _BF16[:2], weight=False, offset=True, need_weight=False),
    backward_case("D=16384 no weight", 16384, ("fp32", "fp32"), weight=False, need_weight=False),
    forward_case("sum D=576", 576, _BF16, residual=True),
    forward_case("sum D=2048 offset", 2048, _BF16, residual=True, offset=True, outer=True),
    forward_case("sum D=4096 fp32 weight", 4096, ("bf16", "fp32", "fp32"), residual=True),
    forward_case("sum D=8192", 8192, _BF16, residual=True),
    forward_case("sum D=16384 no weight", 16384, _BF16, residual=True, weight=False),
    backward_case("sum D=576", 576, _BF16[:2], extra=True),
    backward_case("sum D=4096 frozen", 4096, _BF16[:2], extra=True, need_weight=False),
    backward_case("sum D=8192 offset", 8192, _BF16[:2], extra=True, offset=True, outer=True),
)
"""Every tile shape, each with another mix of the branches; one odd size."""
