"""LayerNorm."""

from __future__ import annotations

from fusewright.kernels.norms.layer_norm_triton import backward_kernel, forward_kernel
from fusewright.kernels.norms.rms_norm_triton import COLUMNS, tile_of
from tests.kernels.aot import AotCase


def _forward_case(
    name: str, dim: int, x: str, w: str, *, weight: bool = True, bias: bool = True
) -> AotCase:
    rows, block, warps = tile_of(dim)
    signature = {f"{k}_ptr": f"*{x}" for k in ("x", "y")}
    signature |= {f"{k}_ptr": f"*{w}" for k in ("weight", "bias")}
    signature |= {f"{k}_ptr": "*fp32" for k in ("mean", "rstd")}
    signature |= dict.fromkeys(("rows", "dim", "heads", "x_stride", "y_stride"), "i32")
    constants = {"HAS_WEIGHT": weight, "HAS_BIAS": bias, "ROWS": rows, "BLOCK": block}
    divisible = () if dim % 16 else ("dim", "x_stride", "y_stride")
    return AotCase(
        f"forward {name}", forward_kernel, signature | {"eps": "fp32"}, constants, warps,
        divisible=divisible,
    )  # fmt: skip


def _backward_case(
    name: str, dim: int, x: str, w: str, *, weight: bool = True, need_x: bool = True,
    need_weight: bool = True, need_bias: bool = True,
) -> AotCase:  # fmt: skip
    rows, block, warps = tile_of(dim if need_x else min(dim, COLUMNS))
    signature = {f"{k}_ptr": f"*{x}" for k in ("grad", "x", "dx")} | {"weight_ptr": f"*{w}"}
    signature |= {f"{k}_ptr": "*fp32" for k in ("mean", "rstd", "dw", "db")}
    strides = ("grad_stride", "x_stride", "dx_stride")
    signature |= dict.fromkeys(("rows", "dim", "heads", "tiles", *strides), "i32")
    constants = {"HAS_WEIGHT": weight, "NEED_X": need_x, "NEED_WEIGHT": need_weight}
    constants |= {"NEED_BIAS": need_bias, "ROWS": rows, "BLOCK": block}
    divisible = () if dim % 16 else ("dim", *strides)
    return AotCase(
        f"backward {name}", backward_kernel, signature, constants, warps, divisible=divisible
    )


AOT = (
    _forward_case("D=128", 128, "bf16", "bf16", bias=False),
    _forward_case("D=507 fp32 weight", 507, "bf16", "fp32"),
    _forward_case("D=2048", 2048, "bf16", "bf16"),
    _forward_case("D=4096 no weight", 4096, "bf16", "bf16", weight=False, bias=False),
    _forward_case("D=8192 fp16", 8192, "fp16", "fp16"),
    _forward_case("D=16384 fp32", 16384, "fp32", "fp32"),
    _backward_case("D=128 no bias", 128, "bf16", "bf16", need_bias=False),
    _backward_case("D=507 fp32 weight", 507, "bf16", "fp32"),
    _backward_case("D=2048 frozen", 2048, "bf16", "bf16", need_weight=False, need_bias=False),
    _backward_case("D=4096 only db", 4096, "bf16", "bf16", need_x=False, need_weight=False),
    _backward_case("D=8192 fp16, only parameters", 8192, "fp16", "fp16", need_x=False),
    _backward_case("D=16384, only parameters", 16384, "bf16", "bf16", need_x=False),
    _backward_case(
        "D=16384 no weight", 16384, "fp32", "fp32", weight=False, need_weight=False, need_bias=False
    ),
)
"""Every tile shape, each with another mix of the branches; one odd size."""
