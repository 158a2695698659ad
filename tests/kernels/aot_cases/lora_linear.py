"""Products of adapters."""

from __future__ import annotations

import torch

from fusewright.kernels.launch import gpu_of
from fusewright.kernels.linear.lora_linear_triton import (
    _WIDE_TILES,
    _WIDE_TILES_IN_REGISTERS,
    _config,
    rank_update_kernel,
    wide_product_kernel,
)
from tests.kernels.aot import AotCase


def _aot(base: str, factor: str, rank: int, precision: str) -> AotCase:
    config = _config(rank, gpu_of(torch.empty(0)))
    pointers = {"base": f"*{base}", "left": f"*{factor}", "right": f"*{factor}", "out": f"*{base}"}
    integers = ("rows", "columns", "rank", "base_stride", "left_stride_n", "left_stride_r")
    return AotCase(
        name=f"rank_update-{base}-{factor}-r{rank}-{precision}",
        kernel=rank_update_kernel,
        signature=pointers | dict.fromkeys((*integers, "right_stride_r", "right_stride_m"), "i32"),
        constants={"PRECISION": precision} | {k: config[k] for k in config if k.isupper()},
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )


def _aot_wide(
    tile: tuple[int, int], by_columns: bool, tiles: dict[tuple[int, int], dict[str, int]]
) -> AotCase:
    config = tiles[tile]
    integers = ("rows", "columns", "inner", "share", "wide_stride_m", "wide_stride_k")
    others = ("narrow_stride_k", "narrow_stride_r", "out_stride_m", "out_stride_r")
    unit = ("wide_stride_m", "out_stride_m") if by_columns else ("wide_stride_k", "out_stride_r")
    return AotCase(
        name=f"wide_product-{tile[0]}x{tile[1]}x{config['BLOCK_K']}-by_columns{by_columns:d}",
        kernel=wide_product_kernel,
        signature={"wide": "*bf16", "narrow": "*fp32", "out": "*fp32", "scale": "fp32"}
        | dict.fromkeys((*integers, *others), "i32"),
        constants={"BLOCK_M": tile[0], "BLOCK_R": tile[1], "BLOCK_K": config["BLOCK_K"]}
        | dict.fromkeys(unit, 1),
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        divisible=tuple(name for name in (*integers, *others) if name not in (*unit, "columns")),
    )


AOT = (
    _aot("bf16", "bf16", 16, "ieee"),
    _aot("bf16", "fp32", 32, "ieee"),
    _aot("fp16", "fp32", 64, "ieee"),
    _aot("fp32", "fp32", 16, "ieee"),
    _aot("fp32", "fp32", 64, "tf32"),
    *(_aot_wide(tile, by, _WIDE_TILES) for tile in _WIDE_TILES for by in (False, True)),
    *(_aot_wide((64, 16), by, _WIDE_TILES_IN_REGISTERS) for by in (False, True)),
)
