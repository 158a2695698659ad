"""RMSNorm inside a matmul."""

from __future__ import annotations

from fusewright.kernels.norms.rms_norm_linear_triton import matmul_kernel, tile_of
from tests.kernels.aot import AotCase


def _case(
    name: str, rows: int, *, weight: bool = True, offset: bool = False, bias: bool = False,
    divisible: tuple[str, ...] = ("features", "dim", "x_stride", "weight_stride"),
) -> AotCase:  # fmt: skip
    block_rows, block_features, block_dim, warps, stages = tile_of(rows)
    pointers = ("x_ptr", "norm_weight_ptr", "weight_ptr", "bias_ptr", "out_ptr")
    signature = dict.fromkeys(pointers, "*bf16") | {"rstd_ptr": "*fp32"}
    signature |= dict.fromkeys(("rows", "features", "dim", "x_stride", "weight_stride"), "i32")
    signature |= {"eps": "fp32", "offset": "fp32"}
    constants = {"HAS_NORM_WEIGHT": weight, "HAS_OFFSET": offset, "OUTER": offset}
    constants |= {"HAS_BIAS": bias, "BLOCK_ROWS": block_rows, "BLOCK_FEATURES": block_features}
    constants |= {"BLOCK_DIM": block_dim, "GROUP": 8}
    return AotCase(name, matmul_kernel, signature, constants, warps, stages, divisible)


AOT = (
    _case("16 rows, no weight", 16, weight=False),
    _case("16 rows, a factor", 16, weight=False, offset=True),
    _case("64 rows, bias", 64, bias=True),
    _case("128 rows, offset", 128, offset=True),
    _case("128 rows, odd features", 128, divisible=("dim", "x_stride", "weight_stride")),
)
"""Every tile shape."""
